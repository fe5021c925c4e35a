"""Who is silent is found out before anything is planned anew; who merely takes longer is left in peace."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.inference import silence
from coordinator.inference.patience import LEAST_ANSWER_S, LEAST_SAMPLES, MOST_ALARMS, Pace
from coordinator.inference.silence import UNSURE_S, Ask, FalseAlarm, Gone, Resume, Silence
from tests.coordinator.plans import plan_of
from wire.limits import MIN_DEADLINE_S
from wire.messages import Standing

DEADLINE_S, ANSWER_S = 0.25, 0.5


def quiet(stages: int = 3) -> Silence:
    return Silence(stages, 100.0, DEADLINE_S, ANSWER_S)


def asked(stages: int = 3) -> tuple[Silence, float]:
    """A silence whose stages were asked, and when."""
    found = quiet(stages)
    assert found.at(100.0 + DEADLINE_S, False) == Ask(1, tuple(range(stages)))
    return found, found.asked_s


def standing(stage: int, number: int = 1, known: bool = True, **changes: object) -> Standing:
    return Standing(stage=stage, number=number, known=known, **changes)  # type: ignore[arg-type]


def test_nothing_is_asked_before_the_deadline() -> None:
    assert quiet().at(100.0 + DEADLINE_S - 0.01, True) is None


def test_who_does_not_answer_twice_is_gone_and_the_others_are_not() -> None:
    found, at_s = asked()
    found.heard(standing(0), at_s + 0.1)
    assert found.at(at_s + ANSWER_S, False) == Ask(1, (1, 2))
    assert found.heard(standing(2), at_s + ANSWER_S + 0.1) is None
    assert found.at(at_s + 2 * ANSWER_S - 0.01, True) is None
    assert found.at(at_s + 2 * ANSWER_S, False) == Gone((1,))


def test_if_nobody_answers_only_heartbeats_prove_that_the_way_is_open() -> None:
    for heartbeats, expected in ((True, Gone((0, 1))), (False, None)):
        found, at_s = asked(2)
        assert found.at(at_s + ANSWER_S, heartbeats) == Ask(1, (0, 1))
        assert found.at(at_s + 2 * ANSWER_S, heartbeats) is None
        assert found.at(found.due_s, heartbeats) == expected
        assert found.due_s > at_s + 2 * ANSWER_S + UNSURE_S


def test_while_all_answer_and_work_patience_doubles_each_time() -> None:
    found, now_s, pauses = quiet(2), 100.0, []
    for number in range(1, 5):
        pauses.append(found.due_s - now_s)
        now_s = found.due_s
        assert found.at(now_s, False) == Ask(number, (0, 1))
        assert found.heard(standing(0, number, run=number), now_s) is None
        assert found.heard(standing(1, number, waiting=True), now_s) == FalseAlarm()
    assert pauses == [DEADLINE_S * 2**n for n in range(4)]


def test_a_stage_that_does_not_know_the_request_ends_the_waiting_when_all_have_answered() -> None:
    found, at_s = asked(2)
    assert found.heard(standing(0, known=False), at_s) is None, "the head's last token may be under way"
    assert found.heard(standing(1), at_s) == Resume("stage 0 does not know the request any more")


def test_a_request_that_rests_everywhere_at_the_same_rows_twice_lost_a_message() -> None:
    found, _ = asked(2)
    for number in (1, 2):
        if number == 2:
            found.at(found.due_s, False)
        found.heard(standing(0, number, filed=9, run=9), found.asked_s)
        last = found.heard(standing(1, number, filed=8, run=8), found.asked_s)
        assert last == (FalseAlarm() if number == 1 else Resume("a message was lost between two stages"))


@pytest.mark.parametrize("how", ["it moves", "it waits"])
def test_a_request_that_moves_or_waits_for_its_step_lost_nothing(how: str) -> None:
    found, _ = asked(1)
    for number in range(1, 6):
        if number > 1:
            found.at(found.due_s, False)
        moved = standing(0, number, run=number) if how == "it moves" else standing(0, number, run=3, waiting=True)
        assert found.heard(moved, found.asked_s) == FalseAlarm()


def test_answers_that_were_not_asked_for_change_nothing() -> None:
    found = quiet(1)
    assert found.heard(standing(0, 1), 100.1) is None
    found.at(found.due_s, False)
    for answer in (standing(0, 7), standing(5), standing(1)):
        assert found.heard(answer, 101.0) is None
    assert found.heard(standing(0), 101.0) == FalseAlarm()
    assert found.heard(standing(0), 101.0) is None, "a second time"


@settings(max_examples=200, deadline=None)
@given(
    stages=st.integers(1, 4),
    events=st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 4), st.booleans(), st.booleans(), st.floats(0, 2)), max_size=60
    ),
)
def test_whatever_comes_only_stages_that_did_not_answer_are_gone_and_time_goes_on(
    stages: int, events: list[tuple[int, int, bool, bool, float]]
) -> None:
    found, now_s, answered = quiet(stages), 100.0, set[int]()
    for stage, number, known, tick, passed_s in events:
        now_s += passed_s
        if tick:
            step = found.at(now_s, known)
            assert found.due_s > now_s or step is None
            if isinstance(step, Ask) and len(step.stages) == stages:
                answered = set() if found._times == 1 else answered
            if isinstance(step, Gone):
                assert step.stages and not answered & set(step.stages)
        else:
            waiting = found._state is silence._State.WAITING
            found.heard(standing(stage, number, known), now_s)
            if not waiting and number == found._number and stage < stages:
                answered.add(stage)


# Pace.


def test_the_deadline_is_three_times_the_99th_percentile_and_at_least_a_quarter_of_a_second() -> None:
    pace = Pace(plan_of("a", "b"))
    for _ in range(LEAST_SAMPLES * 3):
        pace.add(0.2)
    assert pace.deadline_s(1) == pytest.approx(0.6)
    quick = Pace(plan_of("a"))
    for _ in range(LEAST_SAMPLES):
        quick.add(0.01)
    assert quick.deadline_s(1) == MIN_DEADLINE_S


def test_before_enough_was_measured_the_plan_counts_and_so_do_other_requests() -> None:
    pace = Pace(plan_of("a", "b"))
    pace.add(9.0)
    assert MIN_DEADLINE_S < pace.deadline_s(1) < pace.deadline_s(40) < 3.0
    assert pace.first_deadline_s(1000, 1, 0) > pace.first_deadline_s(5, 1, 0) == MIN_DEADLINE_S
    assert pace.first_deadline_s(1000, 2, 0) == 2 * pace.first_deadline_s(1000, 1, 0)


def test_an_answer_may_take_as_long_as_the_longest_step_three_times() -> None:
    plan = plan_of("a", "b")
    assert Pace(plan).answer_s() == LEAST_ANSWER_S
    slow = msgspec.structs.replace(plan.stages[1], prefill_chunk_s=4.0, hop_s=0.0)
    assert Pace(msgspec.structs.replace(plan, stages=(plan.stages[0], slow))).answer_s() == pytest.approx(12.0)


def test_a_device_that_was_given_up_and_is_needed_again_gets_twice_the_time() -> None:
    first = Pace(plan_of("a", "b"))
    first.given_up.add("b")
    without, again = Pace(plan_of("a", "c", epoch=4), first), Pace(plan_of("b", epoch=4), first)
    assert without.answer_s() == first.answer_s() and again.answer_s() == 2 * first.answer_s()
    for epoch in range(5, 20):
        again.given_up.add("b")
        again = Pace(plan_of("b", epoch=epoch), again)
    assert again.answer_s() == MOST_ALARMS * first.answer_s()
    assert Pace(plan_of("b", epoch=30), again).answer_s() == first.answer_s(), "it kept its promise once"


def test_false_alarms_lengthen_all_deadlines_within_bounds() -> None:
    pace = Pace(plan_of("a"))
    before = (pace.deadline_s(1), pace.answer_s())
    pace.false_alarm()
    assert (pace.deadline_s(1), pace.answer_s()) == tuple(2 * seconds for seconds in before)
    for _ in range(20):
        pace.false_alarm()
    assert pace.deadline_s(1) == MOST_ALARMS * before[0]
