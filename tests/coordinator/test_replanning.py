"""What runs moves away from a board that became too slow: once, when it pays, and never to the harm of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator import operations as operations_module
from coordinator import preparing as preparing_module
from coordinator import replanning
from coordinator.distrust import WINDOWS
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.planning.explain import explain
from coordinator.planning.planner import make_plan
from coordinator.promised import promised_s, stage_modules
from coordinator.replanning import FIRST_PAUSE_S, LEAST_GAIN, Replanner, fetch_s, gain_of
from coordinator.screens.plain import devices_text
from coordinator.turns import Hold
from coordinator.view import device_rows
from tests.coordinator.memory_site import running, until
from tests.coordinator.operations_site import Site
from tests.planning import boards
from wire import topics
from wire.messages import DeviceState, StageCounters, StepMark, Telemetry

STEPS = 20
WINDOW_S = 2.0
SLOW_WINDOWS = 5
"""The first report only begins a window, and in the next one nobody has others to be compared with."""


class Board(Site):
    """A site of boards whose stages take so many times as long as their profiles say, and a clock of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, blocks=12)
        self.times: dict[str, float] = {}
        self.rows = 1
        self.now_s = 5000.0
        self.stays = ""
        self.lost: list[str] = []
        self.counters: dict[tuple[str, int, int], StageCounters] = {}
        self.replanner = Replanner(
            self.lab.coordinator, self.operations, lambda _name: self.stays, clock=lambda: self.now_s, **options
        )
        self.lab.coordinator.on_deployment_lost = lambda _name, reason: self.lost.append(reason)

    async def deployed(self, hold: Hold | None = None, **changes: Any) -> DeploymentRecord:
        """On two boards at least, with stages that are equally long."""
        fields = {"boards_at_least": 2, "objective": "throughput", **changes}
        record: DeploymentRecord = await self.ensured(hold or Hold(), **fields)
        return record

    @property
    def record(self) -> DeploymentRecord:
        [record] = self.lab.coordinator.records()
        return record

    @property
    def shares(self) -> dict[str, int]:
        """Blocks of each board."""
        return {stage.device: stage.end_block - stage.first_block for stage in self.record.plan.stages}

    async def work(self, windows: int, grant: bool = True) -> None:
        """All stages decode through so many windows, each as fast as its board."""
        for _ in range(windows):
            self.now_s += WINDOW_S
            self.report("ready")
            for stage in self.record.plan.stages:
                await self._beat(stage.device, stage.stage)
            await self.replanner.look()
            if grant:
                await self.replanner.grant()

    async def _beat(self, device: str, number: int) -> None:
        record = self.record
        stage = record.plan.stages[number]
        profile = self.lab.coordinator.profiles()[device]
        key = (device, record.plan.epoch, number)
        before = self.counters.get(key, StageCounters(deployment=record.name, epoch=record.plan.epoch, stage=number))
        graph = (await self.shelf.prepare("tiny", "int4", self.said.append)).packed.graph
        promised = promised_s(graph, record.plan, stage, profile, 100)
        assert promised is not None
        cost = 1 + 0.3 * (self.rows - 1)
        told = msgspec.structs.replace(
            before,
            decode_steps=before.decode_steps + STEPS,
            decode_rows_run=before.decode_rows_run + STEPS * self.rows,
            decode_busy_s=before.decode_busy_s + STEPS * promised * cost * self.times.get(device, 1.0),
            decode_context_tokens=before.decode_context_tokens + 100 * STEPS * self.rows,
            marks=self.marks(number),
        )
        self.counters[key] = told
        board = self.lab.boards[device]
        board.seq += 1
        board.say(
            topics.TELEMETRY,
            Telemetry(
                seq=board.seq, boot=board.boot, mono_s=self.now_s, cpu_fraction=0.5, memory_used_bytes=1,
                memory_bytes=2, temperature_c=81.0, stages=(told,),
            ),
            device,
        )  # fmt: skip
        known = self.lab.coordinator.telemetry
        await until(lambda: device in known() and known()[device].seq == board.seq, "telemetry")

    def marks(self, number: int) -> tuple[StepMark, ...]:
        """What a stage tells of its last steps; nothing unless hops are the subject."""
        return ()

    def rest(self, seconds: float) -> None:
        self.now_s += seconds


Play = Callable[..., None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    monkeypatch.setattr(operations_module, "_stage_graph", lambda _prepared, _plan, stage: b"%d" % stage.stage)
    monkeypatch.setattr(preparing_module, "FIRST_BOARD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(preparing_module, "MORE_BOARDS_TIMEOUT_S", 0.1)

    def run(scenario: Callable[[Board], Awaitable[None]], **options: Any) -> None:
        async def whole() -> None:
            async with running(tmp_path / "state") as lab:
                site = Board(lab, tmp_path, **options)
                await site.measured("a", "b", "c")
                await scenario(site)

        asyncio.run(whole())

    return run


def test_what_runs_moves_away_from_a_board_that_became_slow_and_says_why(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold(), boards_at_most=2)
        slow = before.plan.stages[0].device
        await site.work(5)
        assert site.record is before and not site.lab.coordinator.slowness.slow
        site.times[slow] = 3.0
        await site.work(SLOW_WINDOWS - 1)
        assert slow not in site.shares and len(site.shares) == 2, "there is a third board"
        assert site.record.plan.epoch > before.plan.epoch and site.record.request == before.request
        [left] = [left for left in site.record.plan.left_out if left.device == slow]
        assert "runs at 0.33 of its profile since" in left.because
        [notice] = site.lab.notices("device-slow")
        assert slow in notice and "runs at 0.33 of its profile" in notice and "81 °C" in notice
        [moved] = site.lab.notices("deployment-moved")
        assert f"epoch {site.record.plan.epoch}" in moved and f"{slow} runs at 0.33" in moved
        assert any(f"{slow} runs at 0.33 of its profile" in reason for reason in site.lost), "the answers are told"
        row = next(row for row in device_rows(site.lab.coordinator) if row["device"] == slow)
        assert row["speed"] == pytest.approx(1 / 3) and "0.33" in row["speed_because"]

    play(scenario)


def test_a_slow_board_that_is_needed_keeps_what_it_can_carry(play: Play) -> None:
    async def scenario(site: Board) -> None:
        record = await site.deployed(Hold(), excluded=("c",))
        equal = site.shares
        slow = record.plan.stages[0].device
        site.times[slow] = 1.8
        await site.work(SLOW_WINDOWS)
        assert 0 < site.shares[slow] < equal[slow]
        [reason] = [stage.because for stage in site.record.plan.stages if stage.device == slow]
        assert "1.8 times slower per block" in reason and "runs at 0.56 of its profile since" in reason

    play(scenario)


def test_boards_that_became_slow_alike_move_nothing(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold())
        await site.work(5)
        site.times = dict.fromkeys("abc", 2.0)
        await site.work(10)
        assert site.record is before and not site.lab.coordinator.slowness.slow

    play(scenario)


def test_steps_of_several_rows_move_nothing(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold())
        await site.work(3)
        site.rows = 8
        await site.work(10)
        assert site.record is before and not site.lab.coordinator.slowness.slow

    play(scenario)


def test_a_board_that_measures_itself_is_not_judged_by_what_it_does_meanwhile(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold())
        slow = before.plan.stages[0].device
        board = site.lab.boards[slow]
        board.say(topics.STATE, DeviceState(state="busy", boot=board.boot, since_unix=0.0), slow)
        await until(lambda: site.lab.coordinator.is_measuring(slow), "it measures")
        site.times[slow] = 3.0
        await site.work(10)
        assert site.record is before and not site.lab.coordinator.slowness.slow

    play(scenario)


def test_answers_that_must_not_be_disturbed_are_waited_for(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold())
        slow = before.plan.stages[0].device
        site.stays = "an answer is to be exact"
        site.times[slow] = 3.0
        await site.work(10)
        assert site.record is before and site.lab.notices("device-slow")
        site.stays = ""
        await site.work(1)
        assert site.record.plan.epoch > before.plan.epoch

    play(scenario)


def test_a_deployment_that_nobody_uses_moves_whatever_answers_would_say(play: Play) -> None:
    async def scenario(site: Board) -> None:
        hold = Hold()
        before = await site.deployed(hold)
        site.times[before.plan.stages[0].device] = 3.0
        site.stays = "an answer is to be exact"
        hold.close()
        await site.work(SLOW_WINDOWS)
        assert site.record.plan.epoch > before.plan.epoch

    play(scenario)


def test_weights_that_would_travel_for_long_wait_until_nobody_uses_the_deployment(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(site: Board) -> None:
        monkeypatch.setattr(replanning, "LONGEST_FETCH_S", 0.001)
        hold = Hold()
        before = await site.deployed(hold)
        site.times[before.plan.stages[0].device] = 3.0
        await site.work(8)
        assert site.record is before
        [stays] = site.lab.notices("deployment-stays")
        assert "until nobody uses it: weights would travel" in stays
        hold.close()
        await site.work(2)
        assert site.record is before, "it was used a moment ago"
        await site.work(1)
        assert site.record.plan.epoch > before.plan.epoch

    play(scenario)


def test_switched_off_it_is_said_and_reckoned_with_but_nothing_moves(play: Play) -> None:
    async def scenario(site: Board) -> None:
        hold = Hold()
        before = await site.deployed(hold)
        slow = before.plan.stages[0].device
        site.times[slow] = 3.0
        await site.work(10)
        assert site.record is before and site.lab.notices("device-slow")
        hold.close()
        work = asyncio.ensure_future(site.operations.deploy(before.request, site.said.append))
        await site.carry_out(work)
        assert site.shares.get(slow, 0) < 6, "a plan that somebody asks for counts with it"

    play(scenario, moves=False)


def test_a_board_that_is_well_again_is_used_again_when_nobody_is_disturbed(play: Play) -> None:
    async def scenario(site: Board) -> None:
        hold = Hold()
        # Without a third board: the slow one keeps a stage, and is heard.
        before = await site.deployed(hold, excluded=("c",))
        slow = before.plan.stages[-1].device
        equal = site.shares
        site.times[slow] = 3.0
        await site.work(SLOW_WINDOWS)
        moved = site.record
        assert site.shares[slow] < equal[slow]
        del site.times[slow]
        await site.work(25)
        assert site.lab.notices("device-as-measured") and site.record.plan.epoch == moved.plan.epoch
        # Who used the old epoch goes on on the new one.
        next_hold = Hold()
        ensured = await site.deployed(next_hold, excluded=("c",))
        assert ensured.plan.epoch == moved.plan.epoch
        site.rest(FIRST_PAUSE_S)
        await site.work(3)
        assert site.record.plan.epoch == moved.plan.epoch, "somebody uses it"
        next_hold.close()
        await site.work(3)
        assert site.shares == equal

    play(scenario)


def test_a_board_that_comes_and_goes_moves_a_deployment_once(play: Play) -> None:
    async def scenario(site: Board) -> None:
        await site.deployed(Hold(), excluded=("c",))
        slow = site.record.plan.stages[-1].device
        for _ in range(12):
            site.times[slow] = 3.0
            await site.work(5)
            del site.times[slow]
            await site.work(5)
        assert len(site.lab.notices("deployment-moved")) == 1

    play(scenario)


def test_boards_that_become_slow_one_after_the_other_wait_for_the_pause(play: Play) -> None:
    async def scenario(site: Board) -> None:
        await site.deployed(Hold(), boards_at_most=2)
        first = site.record.plan.stages[0].device
        site.times[first] = 3.0
        await site.work(SLOW_WINDOWS)
        one = site.record
        second = next(name for name in site.shares if name != first)
        hold = Hold()
        await site.deployed(hold, boards_at_most=2)
        site.times[second] = 12.0
        await site.work(8)
        # The second one may never have been as fast as it measured: then its profile is not believed.
        assert len(site.lab.notices("device-slow")) + len(site.lab.notices("profile-doubted")) == 2
        assert site.record is one
        site.rest(FIRST_PAUSE_S)
        await site.work(1)
        assert site.record.plan.epoch > one.plan.epoch

    play(scenario)


def test_a_new_profile_ends_it(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold())
        slow = before.plan.stages[0].device
        site.times[slow] = 3.0
        await site.work(SLOW_WINDOWS)
        assert slow in site.lab.coordinator.slowness.slow
        measured = boards.profile(slow, block_s=3e-3)
        site.lab.boards[slow].say(topics.PROFILE, msgspec.json.encode(measured), slow)
        await until(lambda: site.lab.coordinator.profiles()[slow].modules == measured.modules, "profile")
        await site.replanner.look()
        assert slow not in site.lab.coordinator.slowness.slow and site.lab.notices("device-as-measured")

    play(scenario)


def test_a_board_whose_pace_is_not_seen_is_forgiven_and_that_moves_nothing(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold(), boards_at_most=2)
        slow = before.plan.stages[0].device
        site.times[slow] = 3.0
        await site.work(SLOW_WINDOWS)
        moved = site.record
        site.rest(301)
        await site.work(2)
        [said] = site.lab.notices("device-forgiven")
        assert slow in said and site.record is moved

    play(scenario)


def test_a_plan_that_can_not_be_made_is_said(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold())
        slow = before.plan.stages[0].device
        site.times[slow] = 3.0
        await site.work(SLOW_WINDOWS - 2)

        async def refuse(*_arguments: object) -> None:
            raise operations_module.Refused("no")

        site.operations.move = refuse  # type: ignore[assignment]
        await site.work(2)
        [said] = site.lab.notices("deployment-stays")
        assert said.endswith("no") and site.record is before
        await site.work(2)
        assert len(site.lab.notices("deployment-stays")) == 1

    play(scenario)


def test_it_looks_and_grants_by_itself_until_it_is_ended(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(site: Board) -> None:
        monkeypatch.setattr(replanning, "TICK_S", 0.01)
        before = await site.deployed(Hold())
        site.times[before.plan.stages[0].device] = 3.0
        running = asyncio.ensure_future(site.replanner.run())
        await site.work(SLOW_WINDOWS + 1, grant=False)
        await until(lambda: site.record.plan.epoch > before.plan.epoch, "it moved")
        assert not running.done()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    play(scenario)


def test_copies_of_stages_are_not_given_up_for_speed(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold(), replicas=2)
        assert before.plan.standbys
        whole = site.operations.preparing.plan

        async def without_copies(*arguments: Any, **options: Any) -> Any:
            plan, *others = await whole(*arguments, **options)
            return msgspec.structs.replace(plan, standbys=()), *others

        site.operations.preparing.plan = without_copies  # type: ignore[method-assign]
        site.times[before.plan.stages[0].device] = 3.0
        await site.work(SLOW_WINDOWS)
        [stays] = site.lab.notices("deployment-stays")
        assert "has room for fewer copies" in stays and site.record is before

    play(scenario)


# What a move saves and costs.


def test_a_gain_is_a_share_of_the_figure_that_was_asked_for() -> None:
    graph = boards.graph(12)
    candidates = [boards.board("a"), boards.board("b", slower=3.0), boards.board("c")]
    plan = make_plan(graph, candidates, boards.request(boards_at_least=2), boards.address)
    slower = msgspec.structs.replace(
        plan, stages=plan.stages[::-1], predicted_token_s=2 * plan.predicted_token_s, predicted_slowest_s=1.0
    )
    assert gain_of(slower, plan) == pytest.approx(0.5) and gain_of(plan, plan) == 0.0
    assert gain_of(None, plan) == 1.0 > LEAST_GAIN
    assert gain_of(plan, slower) < 0


def test_only_weights_that_are_not_there_travel_and_the_slowest_link_decides() -> None:
    graph = boards.graph(12)
    pair = [boards.board("a"), boards.board("b", link_to_broker=boards.link(1e-3, 1e6))]
    both = make_plan(graph, pair, boards.request(boards_at_least=2), boards.address)
    profiles = {candidate.device: candidate.profile for candidate in pair if candidate.profile is not None}
    assert fetch_s(both, both, graph, profiles) == 0.0
    alone = make_plan(graph, pair[1:], boards.request(), boards.address)
    held = {stage.device: stage for stage in both.stages}["b"]
    here = {module.name for module in stage_modules(graph, held)}
    new_bytes = sum(module.weight_bytes for module in graph.modules if module.name not in here)
    assert fetch_s(both, alone, graph, profiles) == pytest.approx(new_bytes / 1e6, rel=0.1)
    assert fetch_s(both, alone, graph, {}) == float("inf")


# Boards that lie.


async def lying(site: Board, device: str, times: float = 10.0) -> None:
    """The board's profile becomes so many times too good; its steps take as long as before."""
    honest = boards.profile(device)
    liar = boards.profile(
        device, block_s=1e-3 / times, overhead_s=2e-4 / times, embedding_s=3e-4 / times, head_s=4e-3 / times
    )
    site.lab.boards[device].say(topics.PROFILE, msgspec.json.encode(liar), device)
    profiles = site.lab.coordinator.profiles
    await until(lambda: profiles()[device] == liar and liar != honest, "the profile")
    site.times[device] = times


def test_the_first_deployment_shows_that_a_profile_is_ten_times_too_good_and_is_mended(play: Play) -> None:
    async def scenario(site: Board) -> None:
        await lying(site, "a")
        before = await site.deployed(Hold())
        shares = site.shares
        assert shares["a"] > max(blocks for device, blocks in shares.items() if device != "a")
        promised = before.plan.predicted_slowest_s
        await site.work(WINDOWS + 2)
        assert site.record.plan.epoch > before.plan.epoch, "another plan is in force"
        assert 0 < site.shares["a"] < shares["a"] and site.shares["a"] <= max(site.shares["b"], site.shares["c"])
        assert site.record.plan.predicted_slowest_s > promised, "and the prediction is none of a miracle"
        [said] = site.lab.notices("profile-doubted")
        assert said.startswith("the profile of a is not believed: it took 10.0 times as long as its profile says")
        assert not site.lab.notices("device-slow"), "it is not slow: it never was faster"
        row = next(row for row in device_rows(site.lab.coordinator) if row["device"] == "a")
        assert row["speed"] == pytest.approx(0.1) and row["profile"].endswith(", not believed")
        assert "took 10.0 times" in row["profile_doubted"]
        moved = site.record
        await site.work(20)
        assert site.record is moved, "once is enough"

    play(scenario)


def test_a_liar_that_works_alone_is_found_out_too(play: Play) -> None:
    async def scenario(site: Board) -> None:
        await lying(site, "a", 20.0)
        site.times["a"] = 40.0  # half as fast as the others, in truth
        await site.deployed(Hold(), boards_at_least=1, objective="latency")
        assert set(site.shares) == {"a"}, "who would share with such a board?"
        await site.work(WINDOWS + 2)
        assert site.lab.notices("profile-doubted") and "a" not in site.shares

    play(scenario)


def test_what_is_not_believed_is_remembered_over_a_restart_until_it_is_measured_anew(
    play: Play, tmp_path: Path
) -> None:
    async def scenario(site: Board) -> None:
        await lying(site, "a")
        await site.deployed(Hold())
        await site.work(WINDOWS + 2)
        assert site.lab.coordinator.trust.of("a") is not None

    async def after(site: Board) -> None:
        await lying(site, "a")
        site.replanner._profiles.clear()
        await site.replanner.look()
        doubt = site.lab.coordinator.trust.of("a")
        assert doubt is not None and doubt.times == pytest.approx(10.0)
        [board] = [board for board in site.operations.preparing.candidates(DeployRequest(model="tiny"))
                   if board.device == "a"]  # fmt: skip
        assert board.slowed is not None and board.slowed.times == pytest.approx(10.0)
        await site.measured("a")
        await until(lambda: site.lab.coordinator.profiles()["a"] == boards.profile("a"), "measured anew")
        await site.replanner.look()
        assert site.lab.coordinator.trust.of("a") is None and site.lab.notices("profile-anew")
        assert site.lab.coordinator.journal.distrusts() == {}

    play(scenario)
    play(after)


def test_what_work_says_of_the_figures_is_shown_beside_them_and_changes_no_plan(play: Play) -> None:
    async def scenario(site: Board) -> None:
        before = await site.deployed(Hold())
        site.times = dict.fromkeys("abc", 1.2)
        await site.work(3)
        coordinator = site.lab.coordinator
        assert coordinator.borne.of("a") is None, "two windows are no pace"
        await site.work(10)
        rows = {row["device"]: row for row in device_rows(coordinator)}
        assert rows["a"]["borne_out"] == {"times": pytest.approx(1.2), "windows": 12}
        assert "steps take 1.20" in devices_text([rows["a"]], "lab")
        candidates = site.operations.preparing.candidates(DeployRequest(model="tiny"))
        assert all(board.slowed is None for board in candidates)
        graph = (await site.shelf.prepare("tiny", "int4", site.said.append)).packed.graph
        lines = explain(before.plan, graph, candidates)
        assert "  a: steps take 1.20 of what it measured (last 12 windows of work)" in lines
        assert site.record is before and coordinator.profiles()["a"] == boards.profile("a"), "nothing was touched"
        site.rows = 4
        await site.work(40)
        assert coordinator.borne.of("a").windows == 12, "of several rows it is not known what one takes"
        await lying(site, "a")
        await site.replanner.look()
        assert coordinator.borne.of("a") is None, "it is another profile"

    play(scenario)
