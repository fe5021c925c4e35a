"""Which pairs of boards are measured, when, and how often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from coordinator.calls import CallFailed
from coordinator.pairs import BUDGET_S, FRESH_S, SMALL_FLEET, TRY_AGAIN_S, Pair, Pairs, pair_of, pairs_worth
from coordinator.planning.pairs import PairCost
from tests.planning.test_topology import plan

URLS = {name: f"mqtt://10.0.0.{number}:1884" for number, name in enumerate("abcd")}
AB, AC, BC = Pair("a", "b"), Pair("a", "c"), Pair("b", "c")


class Boards:
    """Answers probe-pair in simulated time; keeps who was asked what."""

    def __init__(self, takes_s: float = 4.0, fails: Callable[[str], bool] = lambda _device: False) -> None:
        self.now_s = 0.0
        self.takes_s = takes_s
        self.fails = fails
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def call(
        self, device: str, verb: str, there: Callable[[], bool], timeout_s: float, **arguments: Any
    ) -> dict[str, Any]:
        assert verb == "probe-pair" and there()
        self.asked.append((device, arguments))
        self.now_s += self.takes_s / 2
        if self.fails(device):
            raise CallFailed(f"{device}: nothing came back")
        return {}


def made(boards: Boards, used: Callable[[str], bool] = lambda _device: False) -> Pairs:
    return Pairs(boards, lambda _device: True, used, lambda: boards.now_s, lambda: 7)  # type: ignore[arg-type]


def measure(pairs: Pairs, due: list[Pair]) -> list[str]:
    said: list[str] = []
    asyncio.run(pairs.measure(due, URLS, said.append))
    return said


def cost(at_unix: float) -> PairCost:
    return PairCost(one_way_s=0.001, probe_bytes=1200, bytes_per_s=1e6, measured_at_unix=at_unix)


def test_neighbours_come_first_and_in_a_small_fleet_all_others_too() -> None:
    ring = plan(devices=("c", "a"))
    assert pairs_worth(ring, "abc") == [AC, AB, BC]
    many = [f"x{number}" for number in range(SMALL_FLEET)] + ["a", "c"]
    assert pairs_worth(ring, many) == [AC]
    assert pairs_worth(plan(devices=("a",)), ["a"]) == []


def test_both_ends_are_asked_with_their_own_brokers_and_one_token_one_pair_after_the_other() -> None:
    boards = Boards()
    said = measure(made(boards), [AB, AC])
    assert said == ["measuring the way between a and b", "measuring the way between a and c"]
    first, second = boards.asked[:2]
    assert first == (
        "a",
        {"peer": "b", "measure": True, "token": 7, "inward": URLS["a"], "outward": URLS["b"]},
    )
    assert second == (
        "b",
        {"peer": "a", "measure": False, "token": 7, "inward": URLS["b"], "outward": URLS["a"]},
    )
    assert [device for device, _ in boards.asked] == ["a", "b", "a", "c"]


def test_what_is_known_and_fresh_is_not_measured_again_and_what_is_old_is() -> None:
    pairs, now = made(Boards()), 1e9
    known = {tuple(AB): cost(now - FRESH_S / 2), tuple(AC): cost(now - FRESH_S - 1)}
    assert pairs.due([AB, AC, BC], known, URLS, now) == [AC, BC]  # type: ignore[arg-type]


def test_boards_without_a_broker_and_boards_on_which_answers_run_are_left_alone() -> None:
    boards = Boards()
    pairs = made(boards, lambda device: device == "c")
    assert pairs.due([AB, AC], {}, URLS, 0.0) == [AB]
    assert pairs.due([AB], {}, {**URLS, "b": ""}, 0.0) == []
    assert measure(pairs, [AC]) == [] and not boards.asked, "answers may have begun meanwhile"


def test_the_budget_ends_it_and_the_rest_is_due_the_next_time() -> None:
    boards = Boards(takes_s=BUDGET_S / 2)
    pairs, wanted = made(boards), [AB, AC, BC]
    measure(pairs, wanted)
    assert len(boards.asked) == 4
    assert pairs.due(wanted, {}, URLS, 0.0) == [BC]


@pytest.mark.parametrize("failing", ["a", "b"])
def test_a_pair_that_fails_says_why_and_is_not_tried_again_at_once(failing: str) -> None:
    boards = Boards(fails=lambda device: device == failing)
    pairs = made(boards)
    measure(pairs, [AB])
    assert pairs.failed[AB] == f"{failing}: nothing came back"
    assert pairs.due([AB], {}, URLS, 0.0) == []
    boards.now_s += TRY_AGAIN_S
    assert pairs.due([AB], {}, URLS, 0.0) == [AB]
    boards.fails = lambda _device: False
    measure(pairs, [AB])
    assert AB not in pairs.failed


def test_a_board_that_promises_figures_and_sends_none_is_not_asked_for_ever() -> None:
    boards = Boards(takes_s=0.0)
    pairs = made(boards)
    measure(pairs, [AB])
    assert pairs.due([AB], {}, URLS, 0.0) == []


def test_pairs_have_one_name_whoever_sends() -> None:
    assert pair_of("b", "a") == pair_of("a", "b") == AB
