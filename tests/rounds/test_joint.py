"""A round that all make together counts all at once or not at all, and is begun anew when somebody loses it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as some
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coordinator.rounds.joint import JointState
from coordinator.rounds.machine import Look
from coordinator.rounds.orders import TRUNK, trunk_names

ENDS = ("a", "b", "c")
ALL = dict.fromkeys((*ENDS, TRUNK), "w1")
TIMEOUT_S = 100.0


def state_of(at_least: int = 1) -> JointState:
    return JointState(3, ENDS, at_least, TIMEOUT_S, 0.0)


def test_it_begins_when_all_are_ready_and_anew_when_one_is_another() -> None:
    state = state_of()
    assert state.look(0.0, {**ALL, "b": "w1"} | {}) == Look((TRUNK, *ENDS), "waits") and state.attempt == 1
    assert state.look(1.0, ALL) == Look((), "waits")
    state.count("a")
    without = {name: worker for name, worker in ALL.items() if name != "b"}
    assert state.look(2.0, without) == Look((), "waits")
    assert state.look(3.0, {**ALL, "b": "w2"}) == Look((TRUNK, *ENDS), "waits") and state.attempt == 2
    assert state.missing == (*ENDS, TRUNK), "what came of the first attempt counts no more"


def test_a_trunk_of_several_is_waited_for_as_a_whole() -> None:
    trunk = trunk_names(2)
    assert trunk == ("the trunk, part 1", "the trunk, part 2")
    state = JointState(3, ENDS, 1, TIMEOUT_S, 0.0, trunk)
    ready = dict.fromkeys((*ENDS, *trunk), "w1")
    lacking = {name: worker for name, worker in ready.items() if name != trunk[1]}
    assert state.look(0.0, lacking) == Look((), "waits") and state.lacks_blocks
    assert state.look(1.0, ready).ask == (*trunk, *ENDS) and not state.lacks_blocks
    for name in (*ENDS, trunk[0]):
        state.count(name)
        assert state.look(2.0, ready).verdict == "waits"
    assert state.missing == (trunk[1],)
    state.count(trunk[1])
    assert state.look(3.0, ready).verdict == "over"
    state.refuse(trunk[0], "out of memory")
    assert state.look(4.0, ready).verdict == "failed"


def test_it_is_over_when_the_trunk_and_all_others_have_answered() -> None:
    state = state_of()
    state.look(0.0, ALL)
    for name in (TRUNK, "a", "b"):
        state.count(name)
        assert state.look(1.0, ALL).verdict == "waits"
    state.count("c")
    assert state.look(1.0, {}).verdict == "over"


def test_who_stays_away_for_too_long_is_left_out_as_long_as_enough_are_left() -> None:
    state = state_of(2)
    without = {name: worker for name, worker in ALL.items() if name != "c"}
    for now_s in (0.0, 99.0):
        assert state.look(now_s, without) == Look((), "waits")
    assert state.look(101.0, without, busy=("c",)) == Look((), "waits"), "it fetches its part"
    assert state.look(102.0, without) == Look((TRUNK, "a", "b"), "waits")
    assert state.refused == {"c": "away for 100 s"}
    without.pop("b")
    for now_s in (110.0, 230.0, 900.0):
        assert state.look(now_s, without) == Look((), "waits"), "one would be too few"
    assert state.look(901.0, {**without, "b": "w2"}) == Look((TRUNK, "a", "b"), "waits")


def test_a_short_absence_late_in_a_long_round_is_none() -> None:
    state = state_of()
    state.look(0.0, ALL)
    without = {name: worker for name, worker in ALL.items() if name != TRUNK}
    assert state.look(150.0, without) == Look((), "waits")
    assert TRUNK in state.look(151.0, ALL).ask and state.attempt == 1, "its worker is the same: it goes on"
    assert state.look(152.0, ALL) == Look((), "waits")
    assert state.look(190.0, without) == Look((), "waits")
    assert state.look(260.0, without) == Look((), "waits") and not state.refused
    assert state.look(290.0, without).verdict == "failed", "the trunk is what nothing can be without"


def test_who_was_away_when_it_was_asked_is_asked_again() -> None:
    state = state_of()
    state.look(0.0, ALL)
    without = {name: worker for name, worker in ALL.items() if name not in ("a", "b")}
    assert state.look(1.0, without) == Look((), "waits"), "the question may have gone nowhere"
    state.count("b")
    assert state.look(2.0, ALL) == Look(("a",), "waits") and state.attempt == 1 and state.counted == {"b"}
    assert state.look(3.0, ALL) == Look((), "waits")


def test_who_says_nothing_for_long_is_asked_again() -> None:
    state = JointState(3, ENDS, 1, 600.0, 0.0)
    state.look(0.0, ALL)
    state.count("c")
    assert state.look(119.0, ALL) == Look((), "waits")
    assert state.look(120.0, ALL) == Look((TRUNK, "a", "b"), "waits") and state.attempt == 1
    assert state.look(239.0, ALL) == Look((), "waits")
    assert state.look(240.0, ALL).ask == (TRUNK, "a", "b") and state.attempt == 1


def test_behind_a_lost_broker_all_are_asked_again_soon() -> None:
    state = JointState(3, ENDS, 1, 600.0, 0.0)
    state.look(0.0, ALL)
    state.ask_all_again()
    assert state.look(1.0, ALL).ask == (TRUNK, *ENDS) and state.attempt == 2
    assert state.look(5.9, ALL) == Look((), "waits")
    assert state.look(6.0, ALL).ask == (TRUNK, *ENDS) and state.attempt == 2, "they may not have been there"
    assert state.look(15.9, ALL) == Look((), "waits")
    assert state.look(16.0, ALL).ask == (TRUNK, *ENDS)
    assert [state.look(float(now_s), ALL).ask != () for now_s in (35, 36, 75, 76, 155, 156, 275, 276)] == [
        False,
        True,
    ] * 4


def test_no_round_is_too_long_and_who_does_not_say_what_it_saw_is_left_out() -> None:
    state = state_of()
    state.look(0.0, ALL)
    state.look(199.0, ALL)
    assert state.attempt == 1
    assert state.look(201.0, ALL).ask == (TRUNK, *ENDS) and state.attempt == 2
    state.look(600.0, ALL)
    assert state.attempt == 2, "it has twice the time now"
    for name in (TRUNK, "a", "c"):
        state.count(name)
    assert state.look(602.0, ALL).ask == (TRUNK, "a", "c")
    assert state.refused == {"b": "said nothing of what it saw"}


def test_without_a_trunk_nothing_comes_of_it() -> None:
    state = state_of()
    ends = dict.fromkeys(ENDS, "w1")
    assert state.look(1.0, ends).verdict == "waits"
    assert state.look(101.0, ends).verdict == "failed"
    state = state_of()
    state.look(0.0, ALL)
    state.refuse(TRUNK, "out of memory")
    assert state.look(1.0, ALL).verdict == "failed"


def test_who_is_refused_is_out_and_a_lost_broker_begins_it_anew() -> None:
    state = state_of()
    state.look(0.0, ALL)
    state.refuse("a", "NaN")
    state.refuse("nobody", "")
    assert state.look(1.0, ALL) == Look((TRUNK, "b", "c"), "waits")
    assert state.look(100.0, ALL).ask == ()
    state.ask_all_again()
    assert not state.begun
    assert state.look(102.0, ALL).ask == (TRUNK, "b", "c") and state.attempt == 3
    assert set(state.refused) == {"a"}


class Joint(RuleBasedStateMachine):
    """Whatever comes in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.state = state_of(2)
        self.now_s = 0.0
        self.of_attempt: set[str] = set()
        self.over = False

    @rule(name=some.sampled_from((*ENDS, TRUNK, "stranger")))
    def an_update_comes(self, name: str) -> None:
        if self.state.wanted(name):
            self.state.count(name)
            self.of_attempt.add(name)

    @rule(name=some.sampled_from((*ENDS, TRUNK, "stranger")))
    def one_is_refused(self, name: str) -> None:
        known = name in self.state.devices and name not in self.state.refused
        self.state.refuse(name, "because")
        if known:
            self.of_attempt.clear()

    @rule()
    def one_lost_it(self) -> None:
        self.state.anew()
        self.of_attempt.clear()

    @rule(
        passed_s=some.floats(0, 60),
        ready=some.dictionaries(some.sampled_from((*ENDS, TRUNK)), some.sampled_from(("w1", "w2"))),
    )
    def somebody_looks(self, passed_s: float, ready: dict[str, str]) -> None:
        self.now_s += passed_s
        before, out = self.state.attempt, len(self.state.refused)
        found = self.state.look(self.now_s, ready)
        if len(self.state.refused) > out:
            assert self.now_s >= TIMEOUT_S
            self.of_attempt.clear()
        if self.state.attempt == before:
            assert all(self.state.wanted(name) and name in ready for name in found.ask), "asked again"
        else:
            assert self.state.attempt == before + 1
            assert set(found.ask) == {TRUNK, *self.state.together} <= ready.keys(), "all begin, or nobody"
            self.of_attempt.clear()
        if found.verdict == "over":
            assert self.of_attempt == {TRUNK, *self.state.together} and len(self.state.together) >= 2
        if found.verdict == "failed":
            assert TRUNK in self.state.refused or len(self.state.together) < 2

    @invariant()
    def nobody_counts_and_is_out(self) -> None:
        assert not self.state.counted & self.state.refused.keys()
        assert self.state.counted == self.of_attempt


TestJoint = Joint.TestCase


@given(some.permutations((*ENDS, TRUNK)))
def test_the_order_of_answers_is_of_no_account(order: list[str]) -> None:
    state = state_of()
    state.look(0.0, ALL)
    for name in order:
        state.count(name)
    assert state.look(0.0, ALL).verdict == "over"
