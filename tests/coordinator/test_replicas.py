"""Copies of stages: ordered beside the ring, put into it after a loss, and made again on what is left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.converge import same_load
from coordinator import operations as operations_module
from coordinator import replicas as replicas_module
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.planning.best import best_plan
from coordinator.planning.plan import Plan
from coordinator.planning.replicas import covered, with_standbys
from coordinator.replicas import ways_after_losses
from coordinator.screens.plain import plan_text
from coordinator.screens.top import _stages
from coordinator.standbys import ready_copies
from coordinator.turns import Hold
from coordinator.view import deployment_row, device_rows
from tests.coordinator.memory_site import running, until
from tests.coordinator.operations_site import Site, silent
from tests.planning import boards
from tests.planning.boards import MB
from wire.errors import EdgelamError, Refused, UsageError
from wire.messages import StageOrder, StageReport

Scenario = Callable[["CopySite"], Awaitable[None]]


class CopySite(Site):
    """Boards that say of each stage whether it is a copy that waits."""

    phases: dict[str, str]
    """Device -> what it says of its copies, instead of 'ready'."""

    def report(self, phase: str = "ready", detail: str = "") -> None:
        for name, board in self.lab.boards.items():
            if not board.orders:
                continue
            desired = board.orders[-1]
            reports = [
                StageReport(
                    deployment=order.deployment,
                    epoch=order.epoch,
                    stage=order.stage,
                    phase=self.phases.get(name, phase) if order.standby else phase,  # type: ignore[arg-type]
                    detail=detail,
                    standby=order.standby,
                )
                for order in desired.stages
            ]
            board.apply(desired.epoch, *reports)

    def told(self, name: str) -> dict[int, StageOrder]:
        """Stage -> the order that a device has for it now."""
        orders = self.lab.boards[name].orders
        return {order.stage: order for order in orders[-1].stages} if orders else {}

    async def deployed(self, hold: Hold | None = None, **changes: Any) -> DeploymentRecord:
        fields = {"boards_at_least": 2, "boards_at_most": 2, "replicas": 2, **changes}
        record: DeploymentRecord = await self.ensured(hold or Hold(), **fields)
        await until(lambda: self._copies_ready(record.plan) or bool(self.phases), "copies ready")
        return record

    def _copies_ready(self, plan: Plan) -> bool:
        self.report()
        coordinator = self.lab.coordinator
        return len(ready_copies(plan, coordinator.applied(), coordinator.is_online)) == len(plan.standbys)

    async def copies_fail(self) -> None:
        """All copies that there are fail on their boards."""

        def told() -> bool:
            self.report(detail="out of memory")
            rows = deployment_row(self.lab.coordinator, "tiny")["standbys"]
            return bool(rows) and all(row["phase"] == "failed" for row in rows)

        await until(told, "failed copies")

    async def lose(self, name: str) -> None:
        self.lab.boards.pop(name).leave()
        await until(lambda: not self.lab.coordinator.is_online(name), f"{name} gone")

    async def recovered(self, record: DeploymentRecord) -> DeploymentRecord:
        """What a request does after a loss."""
        hold = Hold()
        work = asyncio.ensure_future(self.operations.ensure(record.request, self.said.append, hold, in_haste=True))
        try:
            await self.carry_out(work)
        finally:
            hold.close()
        found: DeploymentRecord = (await work)[0]
        return found

    @property
    def record(self) -> DeploymentRecord:
        [record] = self.lab.coordinator.records()
        return record


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Scenario], None]:
    monkeypatch.setattr(operations_module, "_stage_graph", lambda _prepared, plan, stage: b"%d" % stage.stage)

    def run(scenario: Scenario) -> None:
        async def whole() -> None:
            async with running(tmp_path / "state") as lab:
                site = CopySite(lab, tmp_path)
                site.phases = {}
                await scenario(site)

        asyncio.run(whole())

    return run


Play = Callable[[Scenario], None]


def test_copies_are_ordered_apart_from_the_ring_and_the_answer_does_not_wait_for_them(play: Play) -> None:
    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b", "c")
        site.phases = dict.fromkeys("abc", "fetching")
        record = await site.deployed()
        plan = record.plan
        assert covered(plan) and {stage.device for stage in plan.stages} < {"a", "b", "c"}
        for standby in plan.standbys:
            order, active = site.told(standby.device)[standby.stage], record.plan.stages[standby.stage]
            assert order.standby and order.inbox == order.next
            assert order.inbox.topic not in {stage.inbox.topic for stage in plan.stages}
            of_ring = site.told(active.device)[standby.stage]
            assert not of_ring.standby and (order.graph, order.weights) == (of_ring.graph, of_ring.weights)
            assert order.epoch == plan.epoch
        row = deployment_row(site.lab.coordinator, "tiny")
        assert row["ready"] and row["text"] == "ready; 0 of 2 standbys ready"
        assert {copy["phase"] for copy in row["standbys"]} == {"fetching"}

    play(scenario)


def test_screens_say_what_is_a_copy(play: Play) -> None:
    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b", "c")
        record = await site.deployed()
        standby = record.plan.standbys[0]
        await until(lambda: any("(standby): ready" in row["running"] for row in device_rows(site.lab.coordinator)))
        row = next(row for row in device_rows(site.lab.coordinator) if row["device"] == standby.device)
        assert f"tiny {standby.stage} (standby): ready" in row["running"]
        assert f"tiny/{standby.stage} standby ready" in _stages(row)
        text = plan_text(msgspec.to_builtins(record.plan))
        assert "2 copies of each stage" in text and f"stage {standby.stage} on {standby.device} too" in text
        assert deployment_row(site.lab.coordinator, "tiny")["text"] == "ready; 2 of 2 standbys ready"

    play(scenario)


def test_a_lost_boards_copy_takes_over_with_what_it_has_loaded(play: Play) -> None:
    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b", "c")
        before = await site.deployed()
        victim = before.plan.stages[1].device
        [heir] = [standby.device for standby in before.plan.standbys if standby.stage == 1]
        was = site.told(heir)[1]
        await site.lose(victim)
        after = await site.recovered(before)
        assert after.plan.epoch > before.plan.epoch
        assert [stage.device for stage in after.plan.stages] == [before.plan.stages[0].device, heir]
        order = site.told(heir)[1]
        assert same_load(order, was)
        assert not order.standby and order.inbox == before.plan.stages[1].inbox and order.epoch == after.plan.epoch
        assert order.next == before.plan.stages[0].inbox
        assert site.lab.notices("copy-took-over") == [f"tiny: stage 1 goes on on {heir}"]
        assert "fewer for now" in after.plan.replicas_because

    play(scenario)


def test_two_boards_are_enough_to_go_on_with_one_and_the_next_plan_uses_both_again(play: Play) -> None:
    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b")
        before = await site.deployed(objective="throughput")
        victim, left = before.plan.stages[0].device, before.plan.stages[1].device
        board = site.lab.boards[victim]
        await site.lose(victim)
        after = await site.recovered(before)
        assert [stage.device for stage in after.plan.stages] == [left, left]
        assert {order.stage for order in site.told(left).values()} == {0, 1}
        assert not any(order.standby for order in site.told(left).values())
        site.lab.boards[victim] = board
        board.join()
        await until(lambda: site.lab.coordinator.is_online(victim))
        work = asyncio.ensure_future(site.operations.deploy(before.request, silent))
        await site.carry_out(work)
        assert {stage.device for stage in (await work).plan.stages} == {victim, left} and covered((await work).plan)

    play(scenario)


def test_a_copy_that_is_not_loaded_yet_does_not_take_over(play: Play) -> None:
    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b", "c")
        site.phases = dict.fromkeys("abc", "loading")
        before = await site.deployed()
        await site.lose(before.plan.stages[1].device)
        after = await site.recovered(before)
        assert site.lab.notices("copy-took-over") == [] and site.operations.usable(after)

    play(scenario)


def test_the_loss_of_a_board_with_copies_only_interrupts_nobody(play: Play) -> None:
    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b", "c")
        record = await site.deployed(objective="throughput")
        lost: list[str] = []
        site.lab.coordinator.on_deployment_lost = lambda name, _reason: lost.append(name)
        [spare] = {"a", "b", "c"} - {stage.device for stage in record.plan.stages}
        assert {standby.device for standby in record.plan.standbys} == {spare}
        site.phases = {spare: "failed"}
        await site.copies_fail()
        await site.lose(spare)
        assert lost == [] and site.operations.usable(record)
        assert {row["phase"] for row in deployment_row(site.lab.coordinator, "tiny")["standbys"]} == {"offline"}

    play(scenario)


def test_missing_copies_are_made_again_after_a_while_and_the_ring_stays(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas_module, "MAKE_AGAIN_AFTER_S", 60.0)

    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b", "c")
        before = await site.deployed()
        await site.lose(before.plan.stages[1].device)
        after = await site.recovered(before)
        lost: list[str] = []
        site.lab.coordinator.on_deployment_lost = lambda name, _reason: lost.append(name)
        replicas, now_s = site.operations.replicas, time.monotonic()
        assert not await replicas.complete(site.record, now_s), "what was lost may be back in a moment"
        assert not await replicas.complete(site.record, now_s + 59)
        assert await replicas.complete(site.record, now_s + 61)
        made = site.record.plan
        assert covered(made) and made.replicas_because == "" and (made.stages, made.epoch) == (
            after.plan.stages, after.plan.epoch,
        )  # fmt: skip
        assert lost == [], "answers go on"
        await until(lambda: all(s.stage in site.told(s.device) for s in made.standbys), "orders")
        for stage in made.stages:
            assert site.told(stage.device)[stage.stage] in after.orders[stage.device]
        assert not await replicas.complete(site.record, now_s + 200), "and then all is well"
        assert msgspec.json.decode(msgspec.json.encode(site.record), type=DeploymentRecord) == site.record

    play(scenario)


def test_a_board_that_is_back_in_time_keeps_its_copies(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "MAKE_AGAIN_AFTER_S", 60.0)

    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b", "c", "d")
        record = await site.deployed(objective="throughput")
        name = record.plan.standbys[0].device
        replicas, now_s = site.operations.replicas, time.monotonic()
        board = site.lab.boards[name]
        board.leave()
        await until(lambda: not site.lab.coordinator.is_online(name))
        assert not await replicas.complete(site.record, now_s)
        board.join()
        await until(lambda: site.lab.coordinator.is_online(name))
        site.report()
        assert not await replicas.complete(site.record, now_s + 59)
        board.leave()
        await until(lambda: not site.lab.coordinator.is_online(name))
        assert not await replicas.complete(site.record, now_s + 70), "it is counted from the second loss"
        assert await replicas.complete(site.record, now_s + 131)
        assert name not in {standby.device for standby in site.record.plan.standbys} and covered(site.record.plan)

    play(scenario)


def test_a_copy_that_fails_is_made_elsewhere_or_missed_and_said(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "MAKE_AGAIN_AFTER_S", 0.0)

    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b", "c")
        record = await site.deployed(objective="throughput")
        [spare] = {standby.device for standby in record.plan.standbys}
        site.phases = {spare: "failed"}
        await site.copies_fail()
        assert await site.operations.replicas.complete(site.record, 1.0)
        assert spare not in {standby.device for standby in site.record.plan.standbys} and covered(site.record.plan)
        for stage in record.plan.stages:
            site.phases[stage.device] = "failed"
        await site.copies_fail()
        assert await site.operations.replicas.complete(site.record, 2.0)
        assert site.record.plan.standbys == () and site.record.plan.replicas_because
        [said] = site.lab.notices("copies-missing")
        assert "2 copies of each stage" in said
        assert not await site.operations.replicas.complete(site.record, 3.0), "nothing changed: not tried again"

    play(scenario)


def test_copies_are_made_again_by_themselves(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "MAKE_AGAIN_AFTER_S", 0.0)
    monkeypatch.setattr(replicas_module, "LOOK_PERIOD_S", 0.01)

    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b", "c")
        before = await site.deployed()
        keeping = asyncio.ensure_future(site.operations.replicas.run())
        await site.lose(before.plan.stages[0].device)
        await site.recovered(before)
        await until(lambda: covered(site.record.plan), "made again")
        assert not keeping.done()
        keeping.cancel()
        await asyncio.wait([keeping])

    play(scenario)


def test_after_the_loss_an_answer_goes_on_where_copies_are_impossible_and_a_new_plan_is_refused(play: Play) -> None:
    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b")
        before = await site.deployed(boards_at_least=1, boards_at_most=1)
        await site.lose(before.plan.stages[0].device)
        once = await site.recovered(before)
        assert len(once.plan.stages) == 1 and once.plan.standbys == ()
        with pytest.raises(Refused, match="need 2 boards, and there are 1"):
            await site.operations.preparing.plan(before.request, silent)

    play(scenario)


def test_a_device_is_not_given_what_copies_of_other_models_need(play: Play) -> None:
    async def scenario(site: CopySite) -> None:
        await site.measured("a", "b")
        request = DeployRequest(model="other")

        def free() -> dict[str, int]:
            return {found.device: found.usable_memory_bytes for found in site.operations.preparing.candidates(request)}

        before = free()
        record = await site.deployed(boards_at_least=1, boards_at_most=1)
        [standby] = record.plan.standbys
        assert before[standby.device] - free()[standby.device] == standby.memory_bytes > 50 * MB

    play(scenario)


@pytest.mark.parametrize("changes", [{"replicas": 0}, {"replicas": 9}, {"replicas": 2, "pins": (("head", "a"),)}])
def test_impossible_copies_are_refused_before_any_work(play: Play, changes: dict[str, Any]) -> None:
    async def scenario(site: CopySite) -> None:
        with pytest.raises(UsageError, match="copies of each stage") as caught:
            await site.operations.ensure(DeployRequest(model="tiny", **changes), silent, Hold())
        assert isinstance(caught.value, EdgelamError) and caught.value.try_

    play(scenario)


def test_ways_round_each_copy_are_measured_ahead() -> None:

    graph, found = boards.graph(6), [boards.board(name) for name in "abc"]

    plan = best_plan(graph, found, boards.request(boards_at_least=2, boards_at_most=2), boards.address)
    brokers = {name: f"mqtt://{name}" for name in "abc"}
    bare = {way.device for way in ways_after_losses(plan, brokers)}
    assert bare == {stage.device for stage in plan.stages}
    with_copies = with_standbys(plan, graph, found, 2)
    assert {way.device for way in ways_after_losses(with_copies, brokers)} == bare | {
        standby.device for standby in with_copies.standbys
    }
