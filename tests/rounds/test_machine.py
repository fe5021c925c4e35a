"""A round counts each device once, asks whom it must, and is over when it should be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coordinator.rounds.machine import ASK_AGAIN_S, Look, RoundState

DEVICES = ("a", "b", "c")


def test_who_is_ready_is_asked_once_and_the_next_worker_again() -> None:
    state = RoundState(0, DEVICES, 1, 100.0)
    assert state.look(0.0, {"a": "w1"}) == Look(("a",), "waits")
    assert state.look(1.0, {"a": "w1", "b": "w1"}) == Look(("b",), "waits")
    assert state.look(2.0, {"a": "w2", "b": "w1"}) == Look(("a",), "waits")
    state.count("a")
    state.ask_all_again()
    assert state.look(3.0, {"a": "w3", "b": "w1"}) == Look(("b",), "waits")
    assert state.look(3.0 + ASK_AGAIN_S, {"b": "w1"}).ask == ("b",)


def test_it_is_over_when_all_have_answered() -> None:
    state = RoundState(0, DEVICES, 2, 100.0)
    state.count("a")
    state.refuse("b", "NaN")
    assert state.look(0.0, {}).verdict == "waits"
    state.count("c")
    assert state.look(0.0, {}).verdict == "over"


def test_behind_the_deadline_enough_are_enough() -> None:
    state = RoundState(0, DEVICES, 2, 100.0, counted=("a",))
    assert state.look(101.0, {}).verdict == "waits"
    state.count("b")
    assert state.look(99.0, {}).verdict == "waits"
    assert state.look(101.0, {}).verdict == "over" and state.missing == ("c",)


def test_it_fails_when_too_few_are_left() -> None:
    state = RoundState(0, DEVICES, 2, 100.0)
    state.refuse("a", "")
    state.refuse("b", "")
    state.count("c")
    assert state.look(0.0, {}).verdict == "failed"


class Rounds(RuleBasedStateMachine):
    """Whatever comes in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.state = RoundState(3, DEVICES, 2, 50.0)
        self.now_s = 0.0
        self.times_counted = dict.fromkeys(DEVICES, 0)
        self.last: Look | None = None

    @rule(device=some.sampled_from((*DEVICES, "stranger")))
    def an_update_comes(self, device: str) -> None:
        if self.state.wanted(device):
            self.state.count(device)
            self.times_counted[device] += 1

    @rule(device=some.sampled_from((*DEVICES, "stranger")))
    def one_is_refused(self, device: str) -> None:
        self.state.refuse(device, "because")

    @rule(
        passed_s=some.floats(0, 40),
        ready=some.dictionaries(some.sampled_from((*DEVICES, "stranger")), some.sampled_from(("w1", "w2"))),
    )
    def somebody_looks(self, passed_s: float, ready: dict[str, str]) -> None:
        self.now_s += passed_s
        self.last = self.state.look(self.now_s, ready)
        assert all(self.state.wanted(device) and device in ready for device in self.last.ask)
        missing, counted = self.state.missing, self.state.counted
        if self.last.verdict == "over":
            assert len(counted) >= 2 and (not missing or self.now_s >= 50.0)
        elif self.last.verdict == "failed":
            assert len(counted) < 2 and not missing
        else:
            assert missing

    @invariant()
    def each_counts_once(self) -> None:
        assert all(times <= 1 for times in self.times_counted.values())
        assert not self.state.counted & set(self.state.refused)


TestRounds = Rounds.TestCase


@given(some.permutations(DEVICES))
def test_the_order_in_which_they_come_changes_nothing(order: list[str]) -> None:
    state = RoundState(0, DEVICES, 3, 10.0)
    for device in order:
        state.count(device)
    assert state.look(0.0, {}).verdict == "over"
