"""A board that can't load a stage on the engine that was ordered is planned without it; nobody takes it for slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from coordinator import operations as operations_module
from coordinator import preparing as preparing_module
from coordinator.fallen import Failure, Fallen
from coordinator.planning.explain import explain
from coordinator.replanning import UNUSED_S
from coordinator.turns import Hold
from hwprofiles.profile import Profile
from tests.coordinator.memory_site import running, until
from tests.coordinator.test_replanning import Board
from tests.planning import boards
from wire import topics
from wire.messages import StageReport

WHY = "tensorrt: no kernel for this GPU; onnxruntime-cuda: not installed"


def with_gpu(name: str, times: float = 6.0) -> Profile:
    """Of a board whose GPU is so many times as fast as its processor."""
    slow = boards.profile(name)
    fast = boards.profile(
        name, block_s=1e-3 / times, overhead_s=2e-4 / times, embedding_s=3e-4 / times, head_s=4e-3 / times
    )
    gpu = tuple(msgspec.structs.replace(module, engine="tensorrt") for module in fast.modules)
    return msgspec.structs.replace(slow, modules=(*slow.modules, *gpu))


class Shelf(Board):
    async def tells(self, name: str, profile: Profile) -> None:
        self.lab.boards[name].say(topics.PROFILE, msgspec.json.encode(profile), name)
        await until(lambda: self.lab.coordinator.profiles().get(name) == profile, "profile")

    def fall_back(self, name: str) -> None:
        """The board has loaded what it was told to on another engine."""
        board = self.lab.boards[name]
        desired = board.orders[-1]
        reports = [
            StageReport(
                deployment=o.deployment, epoch=o.epoch, stage=o.stage, phase="ready", engine="CPU", fell_back=WHY
            )
            for o in desired.stages
        ]
        board.apply(desired.epoch, *reports)

    @property
    def engines(self) -> dict[str, str]:
        return {stage.device: stage.engine for stage in self.record.plan.stages}


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Shelf], Awaitable[None]]], None]:
    monkeypatch.setattr(operations_module, "_stage_graph", lambda _prepared, _plan, stage, *_: b"%d" % stage.stage)
    monkeypatch.setattr(preparing_module, "FIRST_BOARD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(preparing_module, "MORE_BOARDS_TIMEOUT_S", 0.1)

    def run(scenario: Callable[[Shelf], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with running(tmp_path / "state") as lab:
                site = Shelf(lab, tmp_path)
                await site.measured("orin", "pi5")
                await site.tells("orin", with_gpu("orin"))
                await scenario(site)

        asyncio.run(whole())

    return run


def test_what_can_not_be_loaded_on_a_gpu_is_said_and_planned_without_it_until_the_board_starts_anew(
    play: Callable[[Callable[[Shelf], Awaitable[None]]], None],
) -> None:
    async def scenario(site: Shelf) -> None:
        coordinator = site.lab.coordinator
        before = await site.deployed(boards_at_most=2)
        assert site.engines == {"orin": "tensorrt", "pi5": "onnxruntime"}
        on_gpu = site.shares["orin"]
        site.fall_back("orin")
        await until(lambda: bool(site.lab.notices("engine-fell-back")), "the notice")
        [said] = site.lab.notices("engine-fell-back")
        assert "orin runs stage" in said and WHY in said
        site.times["orin"] = 6.0  # than was promised for the GPU
        await site.work(4, grant=False)
        assert not coordinator.slowness.slow and not coordinator.trust.all, "the board did what its processor can do"
        site.rest(UNUSED_S + 1)
        await site.replanner.grant()
        assert site.engines == {"orin": "onnxruntime", "pi5": "onnxruntime"} and site.shares["orin"] < on_gpu
        assert site.record.plan.epoch > before.plan.epoch
        [moved] = site.lab.notices("deployment-moved")
        assert "orin can't run it on tensorrt" in moved
        assert any("without tensorrt, which failed there" in stage.because for stage in site.record.plan.stages)
        graph = (await site.shelf.prepare("tiny", "int4", site.said.append)).packed.graph
        assert explain(site.record.plan, graph, site.operations.preparing.candidates(site.record.request))
        # A fault of one deployment's stage says nothing of others, and nothing of the board after it started anew.
        assert not coordinator.without_engines("orin", "other")
        assert coordinator.without_engines("orin", "tiny") == {"tensorrt": WHY}
        site.lab.boards["orin"].boot = "b00701"
        site.lab.boards["orin"].join()
        await until(lambda: not coordinator.without_engines("orin", "tiny"), "another boot")

    play(scenario)


def test_a_running_plan_is_held_against_others_on_the_engine_that_it_runs_on(
    play: Callable[[Callable[[Shelf], Awaitable[None]]], None],
) -> None:
    async def scenario(site: Shelf) -> None:
        """Else a plan of before the GPU was measured would seem to be as fast as one that uses it."""
        await site.tells("orin", boards.profile("orin"))
        hold = Hold()
        await site.deployed(hold, boards_at_least=1, boards_at_most=1, objective="latency", excluded=("pi5",))
        hold.close()
        assert site.engines == {"orin": "onnxruntime"}
        await site.work(1)
        await site.tells("orin", msgspec.structs.replace(boards.profile("orin"), pending="tensorrt"))
        await site.work(1)
        await site.tells("orin", with_gpu("orin"))
        await site.replanner.look()
        site.rest(UNUSED_S + 1)
        await site.replanner.grant()
        assert site.engines == {"orin": "tensorrt"}

    play(scenario)


def test_failures_are_forgotten_with_their_boards_and_deployments() -> None:
    fallen = Fallen()
    fallen.saw(Failure("a", "tiny", "tensorrt"), "b1", "no memory")
    fallen.saw(Failure("b", "tiny", "tensorrt"), "b1", "no memory")
    fallen.saw(Failure("b", "other", "tensorrt"), "b1", "no memory")
    fallen.saw(Failure("b", "other", "tensorrt"), "b2", "no kernel")
    assert fallen.of("b", "other", "b1") == {} and fallen.of("b", "other", "b2") == {"tensorrt": "no kernel"}
    fallen.forget(["a"])
    assert {failure.device for failure in fallen.all} == {"b"}
    fallen.keep(["other"])
    assert fallen.all == {Failure("b", "other", "tensorrt")}
