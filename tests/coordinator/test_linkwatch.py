"""What runs moves away from a board whose link became slow: by the marks of its stages, asking only where it must."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator import operations as operations_module
from coordinator import preparing as preparing_module
from coordinator.calls import CallFailed
from coordinator.turns import Hold
from tests.coordinator.memory_site import running
from tests.coordinator.test_replanning import Board
from tests.planning import boards
from wire import topics
from wire.messages import StepMark

HEALTHY_S = 0.0006
"""A crossing of a link as these boards have measured it."""

LAPS = 6
WINDOWS = 5
"""Three, the one that the change fell into, and a report more until all stages have told of a lap."""


class Linked(Board):
    """Boards with clocks of their own, each of whose links takes so much longer than it measured."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.more_s: dict[str, float] = {}
        self.asked: list[str] = []
        self.answers = True
        self.late_s = 0.0
        """By which all boards answer late, whatever their links; 0: by what their links take."""
        self.lab.coordinator.calls.call = self._call  # type: ignore[method-assign, assignment]

    def marks(self, number: int) -> tuple[StepMark, ...]:
        """The laps of this window, as one stage saw them."""
        stages = self.record.plan.stages
        found = []
        for lap in range(LAPS):
            at_s = self.now_s + 0.1 * lap
            spans = []
            for stage, after in zip(stages, [*stages[1:], stages[0]], strict=True):
                spans.append((at_s, at_s + 0.004))
                at_s += 0.004 + sum(HEALTHY_S + self.more_s.get(end.device, 0.0) for end in (stage, after))
            offset_s = 100.0 * "abcd".index(stages[number].device)
            back_s = at_s + offset_s if number == 0 else 0.0
            row = 8 * round(10 * self.now_s + lap)
            found.append(StepMark(1, row, spans[number][0] + offset_s, spans[number][1] + offset_s, back_s))
        return tuple(found)

    async def _call(self, device: str, verb: str, there: Callable[[], bool], timeout_s: float, **arguments: Any) -> Any:
        assert verb == "probe-ways" and there()
        self.asked.append(device)
        if not self.answers:
            raise CallFailed(f"{device} gave no answer")
        [broker] = arguments["brokers"]
        return {"round_trip_s": {broker: 2 * (HEALTHY_S + (self.late_s or self.more_s.get(device, 0.0)))}, "failed": {}}

    async def deployed(self, hold: Hold | None = None, **changes: Any) -> Any:
        return await super().deployed(hold, objective="latency", **changes)

    async def looked(self, windows: int) -> None:
        """As `work`, and what is asked for is answered in between."""
        for _ in range(windows):
            await self.work(1)
            await asyncio.sleep(0.01)

    @property
    def used(self) -> list[str]:
        return [stage.device for stage in self.record.plan.stages]


Play = Callable[..., None]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    monkeypatch.setattr(operations_module, "_stage_graph", lambda _prepared, _plan, stage: b"%d" % stage.stage)
    monkeypatch.setattr(preparing_module, "FIRST_BOARD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(preparing_module, "MORE_BOARDS_TIMEOUT_S", 0.1)

    def run(scenario: Callable[[Linked], Awaitable[None]], names: str = "abcd", **options: Any) -> None:
        async def whole() -> None:
            async with running(tmp_path / "state") as lab:
                site = Linked(lab, tmp_path, **options)
                await site.measured(*names)
                await scenario(site)

        asyncio.run(whole())

    return run


def test_a_ring_leaves_a_board_whose_link_became_slow_once(play: Play) -> None:
    async def scenario(site: Linked) -> None:
        before = await site.deployed(Hold(), boards_at_least=3, boards_at_most=3)
        await site.looked(6)
        assert site.record is before and not site.lab.coordinator.slow_links.slow
        slow = site.used[1]
        site.more_s[slow] = 0.010
        ring = site.used
        await site.looked(WINDOWS + 1)
        assert slow not in site.used and len(site.used) == 3
        [notice] = site.lab.notices("link-slow")
        assert f"the link of {slow} is slower than it measured" in notice
        [moved] = site.lab.notices("deployment-moved")
        assert f"the link of {slow} takes" in moved
        assert site.lab.coordinator.slow_links.times(slow) == pytest.approx(1 + 0.010 / HEALTHY_S, rel=0.1)
        epoch = site.record.plan.epoch
        await site.looked(30)
        assert site.record.plan.epoch == epoch and sorted(site.asked) == sorted(ring)

    play(scenario)


def test_of_two_boards_each_is_asked_once_and_the_one_whose_round_trip_rose_is_left(play: Play) -> None:
    async def scenario(site: Linked) -> None:
        await site.deployed(Hold(), boards_at_most=2)
        pair = site.used
        await site.looked(4)
        site.more_s[pair[1]] = 0.010
        await site.looked(WINDOWS + 1)
        assert sorted(site.asked) == sorted(pair)
        assert pair[0] in site.used and pair[1] not in site.used
        assert len(site.lab.notices("link-slow")) == 1

    play(scenario, "abc")


def test_boards_that_do_not_say_move_nothing_and_people_are_told(play: Play) -> None:
    async def scenario(site: Linked) -> None:
        before = await site.deployed(Hold(), boards_at_most=2)
        await site.looked(4)
        site.answers = False
        site.more_s[site.used[1]] = 0.010
        await site.looked(WINDOWS + 1)
        assert site.record is before and len(site.asked) == 2
        [notice] = site.lab.notices("way-slow")
        assert "although their own links are well" in notice

    play(scenario, "abc")


def test_hops_that_are_longer_while_all_boards_answer_late_are_no_slow_link(play: Play) -> None:
    async def scenario(site: Linked) -> None:
        before = await site.deployed(Hold(), boards_at_least=3, boards_at_most=3)
        await site.looked(6)
        seen, site.late_s = site.used[1], 0.010
        site.more_s[seen] = 0.010
        await site.looked(WINDOWS + 1)
        assert site.record is before and not site.lab.notices("link-slow")

    play(scenario)


def test_a_slow_link_that_is_needed_stays_and_is_said(play: Play) -> None:
    async def scenario(site: Linked) -> None:
        before = await site.deployed(Hold(), boards_at_least=3)
        await site.looked(4)
        site.more_s[site.used[1]] = 0.010
        await site.looked(WINDOWS + 1)
        assert site.record is before
        assert len(site.lab.notices("link-slow")) == 1 and len(site.lab.notices("deployment-stays")) == 1
        site.more_s.clear()
        await site.looked(8)
        assert len(site.lab.notices("link-as-measured")) == 1 and not site.lab.coordinator.slow_links.slow

    play(scenario, "abc")


def test_a_link_that_was_measured_anew_is_as_it_measured(play: Play) -> None:
    async def scenario(site: Linked) -> None:
        await site.deployed(Hold(), boards_at_least=3)
        await site.looked(4)
        slow = site.used[1]
        site.more_s[slow] = 0.010
        await site.looked(WINDOWS + 1)
        assert slow in site.lab.coordinator.slow_links.slow
        anew = boards.profile(slow, link_to_broker=boards.link(0.010, 1e6))
        site.lab.boards[slow].say(topics.PROFILE, msgspec.json.encode(anew), slow)
        await site.looked(2)
        assert not site.lab.coordinator.slow_links.slow
        assert len(site.lab.notices("link-as-measured")) == 1

    play(scenario, "abc")
