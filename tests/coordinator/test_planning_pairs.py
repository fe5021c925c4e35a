"""A plan is made with the pairs that it would use: they are measured once, and never in haste or under answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator import preparing as preparing_module
from coordinator.journal import DeployRequest
from coordinator.planning.plan import Plan
from tests.coordinator.memory_site import running, until
from tests.coordinator.operations_site import Site, silent
from tests.planning import boards
from tests.planning.test_pair_figures import pair
from wire import topics

URLS = {name: f"mqtt://10.0.0.{number}:1884" for number, name in enumerate("abc", 1)}
NEAR = {("a", "c")}
"""On one switch; every other way is as long as through the site's broker."""


class Paired(Site):
    """Boards some milliseconds from the site's broker, which measure pairs when asked."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, blocks=12)
        coordinator = self.lab.coordinator
        coordinator.data_brokers = lambda: URLS  # type: ignore[method-assign]
        coordinator.calls.call = self._call  # type: ignore[method-assign, assignment]
        self.asked: list[tuple[str, str]] = []
        self.ways = 0

    async def known(self, delay_s: float) -> None:
        await self.lab.with_boards(*URLS)
        for name in URLS:
            made = boards.profile(name, link_to_broker=boards.link(delay_s, 2.5e6 if delay_s > 0.001 else 1e8))
            self.lab.boards[name].say(topics.PROFILE, msgspec.json.encode(made), name)
        await until(lambda: set(URLS) <= set(self.lab.coordinator.profiles()), "profiles")

    async def _call(self, device: str, verb: str, there: Callable[[], bool], timeout_s: float, **arguments: Any) -> Any:
        if verb == "probe-ways":
            self.ways += 1
            return {"round_trip_s": dict.fromkeys(arguments["brokers"], 0.05), "failed": {}}
        if not arguments["measure"]:
            return {}
        peer = arguments["peer"]
        self.asked.append((device, peer))
        delay_s = 0.0005 if (device, peer) in NEAR else 0.012
        profiles = self.lab.coordinator.profiles
        found = pair(peer, delay_s, 1e7, 1e7, time.time())
        made = msgspec.structs.replace(profiles()[device], pairs=(*profiles()[device].pairs, found))
        self.lab.boards[device].say(topics.PROFILE, msgspec.json.encode(made), device)
        await until(lambda: profiles()[device].pairs == made.pairs, "the profile")
        return {}

    async def planned(self, in_haste: bool = False, **changes: Any) -> Plan:
        request = DeployRequest(model="tiny", boards_at_least=2, boards_at_most=2, **changes)
        plan, _, _ = await self.operations.preparing.plan(request, silent, in_haste)
        return plan


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(preparing_module, "FIRST_BOARD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(preparing_module, "MORE_BOARDS_TIMEOUT_S", 0.1)

    def run(scenario: Callable[[Paired], Awaitable[None]], delay_s: float = 0.006) -> None:
        async def whole() -> None:
            async with running(tmp_path / "state") as lab:
                site = Paired(lab, tmp_path)
                await site.known(delay_s)
                await scenario(site)

        asyncio.run(whole())

    return run


def test_all_pairs_of_a_small_fleet_are_measured_once_and_the_neighbours_chosen(play: Callable[..., None]) -> None:
    async def scenario(site: Paired) -> None:
        plan = await site.planned()
        assert sorted(site.asked) == [("a", "b"), ("a", "c"), ("b", "c")]
        assert {stage.device for stage in plan.stages} == {"a", "c"}
        assert plan.topology == "direct" and all(stage.inbox.broker for stage in plan.stages)
        assert sum(stage.hop_s for stage in plan.stages) == pytest.approx(0.001, rel=0.05)
        assert site.ways == 0, "what pairs say need not be asked for again"
        assert await site.planned() == plan and len(site.asked) == 3

    play(scenario)


def test_in_haste_nothing_is_measured_and_what_is_known_is_used(play: Callable[..., None]) -> None:
    async def scenario(site: Paired) -> None:
        await site.planned(in_haste=True)
        assert site.asked == []
        plan = await site.planned()
        assert await site.planned(in_haste=True) == plan

    play(scenario)


def test_nothing_is_measured_where_hops_are_short_or_the_sites_broker_is_asked_for(play: Callable[..., None]) -> None:
    async def scenario(site: Paired) -> None:
        plan = await site.planned(topology="central")
        assert site.asked == [] and plan.topology == "central"

    play(scenario)

    async def short(site: Paired) -> None:
        await site.planned()
        assert site.asked == []

    play(short, 0.0001)


def test_boards_on_which_answers_run_are_not_disturbed(play: Callable[..., None]) -> None:
    async def scenario(site: Paired) -> None:
        site.operations.preparing.pairs._is_used = lambda device: device == "c"
        await site.planned()
        assert site.asked == [("a", "b")]

    play(scenario)


def test_a_link_that_is_slow_now_makes_its_pairs_slow(play: Callable[..., None]) -> None:
    async def scenario(site: Paired) -> None:
        await site.planned()
        site.lab.coordinator.slow_links.changed("a", 0.060, 0.006, 0.0, 1e9)
        plan = await site.planned(in_haste=True)
        assert {stage.device for stage in plan.stages} == {"b", "c"}
        [left] = [left for left in plan.left_out if left.device == "a"]
        assert left.because

    play(scenario)
