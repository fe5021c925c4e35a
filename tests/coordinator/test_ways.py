"""Boards are asked once for the ways to others' brokers, and what they answer is not believed blindly."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import pytest

from coordinator.calls import CallFailed
from coordinator.planning.topology import Way
from coordinator.ways import TRY_AGAIN_S, Ways

A, B = "mqtt://10.0.0.1:1884", "mqtt://10.0.0.2:1884"


class Calls:
    """Answers as told, and keeps what was asked."""

    def __init__(self, answer: Callable[[str, list[str]], dict[str, Any]]) -> None:
        self.answer = answer
        self.asked: list[tuple[str, str, tuple[str, ...]]] = []

    async def call(
        self, device: str, verb: str, there: Callable[[], bool], timeout_s: float, **arguments: Any
    ) -> dict[str, Any]:
        self.asked.append((device, verb, tuple(arguments["brokers"])))
        return self.answer(device, arguments["brokers"])


def found(device: str, brokers: list[str]) -> dict[str, Any]:
    return {"round_trip_s": dict.fromkeys(brokers, 0.004), "failed": {}}


def made(calls: Calls, clock: Callable[[], float] = lambda: 0.0) -> Ways:
    return Ways(calls, lambda _device: True, clock)  # type: ignore[arg-type]


def measure(ways: Ways, *wanted: Way) -> list[str]:
    said: list[str] = []
    asyncio.run(ways.measure(wanted, said.append))
    return said


def test_each_board_is_asked_once_for_all_its_ways_and_never_again() -> None:
    calls = Calls(found)
    ways = made(calls)
    wanted = (Way("a", B), Way("b", B), Way("b", A))
    assert measure(ways, *wanted) == ["measuring the ways between boards: a, b"]
    assert calls.asked == [("a", "probe-ways", (B,)), ("b", "probe-ways", (B, A))]
    assert ways.round_trips == dict.fromkeys(wanted, 0.004)
    assert measure(ways, *wanted) == []
    assert len(calls.asked) == 2
    measure(ways, Way("a", "mqtt://10.0.0.2:9999"))
    assert len(calls.asked) == 3, "a broker at another address is another way"


def test_a_board_that_fails_is_asked_again_after_a_while() -> None:
    def fails(device: str, brokers: list[str]) -> dict[str, Any]:
        raise CallFailed(f"{device} went away during 'probe-ways'")

    now = [0.0]
    calls = Calls(fails)
    ways = made(calls, lambda: now[0])
    measure(ways, Way("a", B))
    assert ways.round_trips == {Way("a", B): "a went away during 'probe-ways'"}
    now[0] = TRY_AGAIN_S - 1
    assert measure(ways, Way("a", B)) == []
    now[0] = TRY_AGAIN_S
    calls.answer = found
    measure(ways, Way("a", B))
    assert ways.round_trips == {Way("a", B): 0.004}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"round_trip_s": [1, 2]},
        {"round_trip_s": {B: "fast"}},
        {"round_trip_s": {B: -1.0}},
        {"round_trip_s": {B: 0}},
        {"round_trip_s": {B: math.inf}},
        {"round_trip_s": {B: math.nan}},
        {"round_trip_s": {B: 1e9}},
        {"round_trip_s": {A: 0.004}, "failed": 7},
    ],
)
def test_an_answer_that_is_none_is_no_figure(answer: dict[str, Any]) -> None:
    ways = made(Calls(lambda _device, _brokers: answer))
    measure(ways, Way("a", B))
    assert ways.round_trips == {Way("a", B): "it was not measured"}


def test_the_reason_of_a_board_is_kept() -> None:
    ways = made(Calls(lambda _device, _brokers: {"failed": {B: "connection refused" * 100}}))
    measure(ways, Way("a", B))
    reason = ways.round_trips[Way("a", B)]
    assert isinstance(reason, str) and reason.startswith("connection refused") and len(reason) == 200
