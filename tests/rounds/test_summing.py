"""When a sum is begun, of whom it is, and that what may have been revealed is never another's."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coordinator.rounds.machine import Look
from coordinator.rounds.summing import NEXT, STEP_AGAIN_S, SumState
from models.secure.session import threshold_of

ALL = ("a", "b", "c", "d")
READY = dict.fromkeys(ALL, "w1")


def state_of(fixed: tuple[str, ...] = ()) -> SumState:
    return SumState(3, ALL, 3, 100.0, 25.0, fixed)


def trained() -> SumState:
    """All have trained, and keys are asked for."""
    state = state_of()
    assert state.look(0.0, READY) == Look(ALL, "waits")
    for name in ALL:
        state.count(name)
    assert state.look(1.0, READY) == Look(ALL, "waits") and state.step == "keys"
    return state


def through(state: SumState, step: str) -> None:
    """All answer, until this step has begun."""
    while state.step != step:
        for name in state.missing:
            state.answer(name)
        state.look(2.0, READY)


def test_a_sum_begins_when_all_have_trained_and_goes_step_by_step() -> None:
    state = trained()
    for step in ("shares", "masked", "reveal"):
        assert state.missing == ALL
        for name in ALL[:3]:
            state.answer(name)
        assert state.look(1.0, READY) == Look((), "waits")
        state.answer("d")
        assert state.look(1.0, READY) == Look(ALL, "waits") and state.step == step
    for name in ALL[:2]:
        state.answer(name)
    assert state.look(1.0, READY).verdict == "waits"
    state.answer("c")
    assert state.look(1.0, READY) == Look((), "over"), "shares of two thirds are enough"
    assert state.survivors == ALL and state.missing == ()


def test_who_says_nothing_is_asked_again_and_all_are_when_the_connection_was_lost() -> None:
    state = trained()
    state.answer("a")
    assert state.look(1.0 + STEP_AGAIN_S - 0.1, READY).ask == ()
    assert state.look(1.0 + STEP_AGAIN_S, READY).ask == ALL[1:]
    state.ask_all_again()
    assert state.look(30.0, READY).ask == ALL[1:]


def test_a_worker_that_is_lost_before_the_deadline_trains_again_and_the_sum_begins_anew() -> None:
    state = trained()
    through(state, "masked")
    assert state.look(3.0, {**READY, "b": "w2"}) == Look(("b",), "waits") and state.step == "train"
    state.count("b")
    assert state.look(4.0, {**READY, "b": "w2"}) == Look(ALL, "waits")
    assert (state.step, state.attempt) == ("keys", 2)


def test_behind_the_deadline_enough_are_enough_after_some_patience() -> None:
    state = trained()
    through(state, "masked")
    for name in ALL[:3]:
        state.answer(name)
    without = {name: worker for name, worker in READY.items() if name != "d"}
    assert state.look(99.0, without).verdict == "waits" and state.step == "masked"
    state.look(100.0, without)
    assert state.step == "reveal" and state.survivors == ALL[:3], "25 s and more since the step began"
    assert state.among == ALL


def test_a_step_that_begins_behind_the_deadline_is_given_its_time() -> None:
    state = state_of()
    state.look(0.0, READY)
    for name in ALL[:3]:
        state.count(name)
    assert state.look(99.0, READY).verdict == "waits" and state.step == "train"
    state.look(100.0, READY)
    assert state.step == "keys" and state.missing == ALL[:3]
    for name in ALL[:2]:
        state.answer(name)
    state.look(124.0, READY)
    assert state.step == "keys"
    state.look(125.5, READY)
    assert state.step == "keys" and state.attempt == 2, "two are too few: it is begun anew"


def test_shares_that_are_refused_by_too_many_end_the_round() -> None:
    state = trained()
    through(state, "reveal")
    state.refuse("a", "no")
    assert state.look(3.0, READY).verdict == "waits"
    state.refuse("b", "no, too")
    assert state.look(3.0, READY).verdict == "failed"
    assert state.refused == {"a": "no", "b": "no, too"}


def test_when_too_many_lose_their_keys_the_sum_is_of_the_same_or_none() -> None:
    state = trained()
    state.refuse("d", "nonsense")
    through(state, "reveal")
    assert state.survivors == ALL[:3]
    lost = {**READY, "a": "w2", "b": "w2"}
    assert state.look(3.0, lost).ask == ("a", "b") and state.step == "train"
    state.count("a")
    assert state.look(1e4, lost).verdict == "waits", "however late it is, b is waited for"
    state.count("b")
    assert state.look(1e4, lost).ask == ALL[:3] and state.devices == ALL[:3]
    state.refuse("c", "broken")
    assert state.look(1e4, lost).verdict == "failed"


def test_a_restarted_coordinator_sums_the_boards_that_it_had_settled_on() -> None:
    state = state_of(fixed=("a", "b", "d"))
    assert state.look(0.0, READY).ask == ("a", "b", "d")


def test_too_few_that_are_left_fail() -> None:
    state = state_of()
    state.look(0.0, READY)
    state.refuse("a", "broken")
    assert state.look(1.0, READY).verdict == "waits"
    state.refuse("b", "broken")
    assert state.look(1.0, READY).verdict == "failed"


@settings(deadline=None)
class Sums(RuleBasedStateMachine):
    """Whatever comes, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.state = state_of()
        self.now_s = 0.0
        self.starts = dict.fromkeys(ALL, 1)
        self.there = set(ALL)
        self.asked_to_reveal: set[tuple[str, ...]] = set()

    @rule(passed_s=some.sampled_from([0.0, 1.0, 30.0, 200.0]))
    def look(self, passed_s: float) -> None:
        self.now_s += passed_s
        before = self.state.step
        ready = {name: f"w{self.starts[name]}" for name in ALL if name in self.there}
        look = self.state.look(self.now_s, ready)
        assert set(look.ask) <= ready.keys()
        if look.verdict != "over":
            assert self.state.step in (before, NEXT.get(before), "train", "keys")
        if self.state.step == "reveal" and look.ask:
            self.asked_to_reveal.add(self.state.survivors)

    @rule(name=some.sampled_from(ALL))
    def says(self, name: str) -> None:
        if self.state.step == "train" and self.state.wanted(name):
            self.state.count(name)
        elif self.state.expects(name):
            self.state.answer(name)

    @rule()
    def all_say(self) -> None:
        for name in self.state.missing:
            if not self.state.over:
                self.says(name)

    @rule(name=some.sampled_from(ALL), back=some.booleans())
    def goes_or_comes(self, name: str, back: bool) -> None:
        if back and name not in self.there:
            self.starts[name] += 1
        (self.there.add if back else self.there.discard)(name)

    @rule(name=some.sampled_from(ALL))
    def is_restarted(self, name: str) -> None:
        self.starts[name] += 1

    @rule(name=some.sampled_from(ALL))
    def is_refused(self, name: str) -> None:
        self.state.refuse(name, "broken")

    @rule()
    def connection_is_lost(self) -> None:
        self.state.ask_all_again()

    @invariant()
    def one_sum_is_revealed_at_most(self) -> None:
        assert len(self.asked_to_reveal) <= 1

    @invariant()
    def sums_are_of_enough(self) -> None:
        state = self.state
        if state.survivors:
            assert set(state.survivors) <= set(state.among) <= set(state.members) <= set(ALL)
            assert len(state.survivors) >= max(3, threshold_of(len(state.members)))


TestSums = Sums.TestCase
