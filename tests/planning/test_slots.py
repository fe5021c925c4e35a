"""How many requests at once: as many as go well, and why fewer."""

from __future__ import annotations

import pytest

from coordinator.planning.partition import Infeasible, Overloaded
from coordinator.planning.plan import Draft, Plan
from coordinator.planning.planner import Candidate
from coordinator.planning.slots import USUAL_SLOTS, plan_with_slots, slots_text
from tests.planning.boards import MB, board
from tests.planning.test_planner import plan


def planned(candidates: list[Candidate], asked: int | None = None, **changes: object) -> Plan:
    return plan_with_slots(lambda slots: Draft.of(plan(candidates, slots=slots, **changes)), asked)


def test_boards_with_memory_serve_the_usual_number() -> None:
    made = planned([board("a"), board("b")])
    assert (made.slots, made.slots_because) == (USUAL_SLOTS, "")
    assert slots_text(made.slots, made.slots_because) == "up to 8 requests at once"


def test_boards_with_little_memory_serve_fewer_and_say_why() -> None:
    boards = [board("a", 1.0, 260 * MB)]
    with pytest.raises(Infeasible):
        plan(boards, slots=8, context_tokens=2_048)
    made = planned(boards, context_tokens=2_048)
    assert 1 <= made.slots < USUAL_SLOTS
    assert f"of {made.slots * 2} requests do not fit" in made.slots_because
    plan(boards, slots=made.slots, context_tokens=2_048)
    with pytest.raises(Infeasible):
        plan(boards, slots=made.slots * 2, context_tokens=2_048)


def test_room_for_many_is_not_bought_with_slow_answers() -> None:
    boards = [board("near", 1.0, 330 * MB), board("far", 8.0)]
    assert len(plan(boards, slots=1, context_tokens=2_048).stages) == 1
    assert "far" in {stage.device for stage in plan(boards, slots=8, context_tokens=2_048).stages}
    made = planned(boards, context_tokens=2_048)
    assert made.slots < USUAL_SLOTS and "slower" in made.slots_because
    assert [stage.device for stage in made.stages] == ["near"]
    assert "slower" in slots_text(made.slots, made.slots_because)


def test_a_load_that_one_request_does_not_carry_is_planned_for_more() -> None:
    boards = [board("a"), board("b"), board("c")]
    alone = 1 / plan(boards, objective="throughput", slots=1).predicted_token_s
    made = planned(boards, objective="throughput", tokens_per_s=1.5 * alone)
    assert (made.slots, made.slots_because) == (USUAL_SLOTS, "") and len(made.stages) > 1
    small = [board(name, 1.0, 175 * MB) for name in "abcdef"]
    fewer = planned(small, objective="throughput", context_tokens=2_048, tokens_per_s=1.1 * alone)
    assert 1 < fewer.slots < USUAL_SLOTS and "do not fit" in fewer.slots_because
    with pytest.raises(Overloaded, match="more than these boards carry"):
        planned(boards, objective="throughput", tokens_per_s=100 * alone)
    with pytest.raises(Infeasible, match=r"missing|fits on no board"):
        planned([board("a", 1.0, 150 * MB)], objective="throughput", tokens_per_s=100 * alone)


def test_what_is_asked_for_is_kept_or_refused() -> None:
    made = planned([board("a")], asked=3)
    assert (made.slots, made.slots_because) == (3, "")
    with pytest.raises(Infeasible):
        planned([board("a", 1.0, 260 * MB)], asked=8, context_tokens=2_048)


def test_boards_too_small_for_one_are_refused_as_ever() -> None:
    with pytest.raises(Infeasible) as caught:
        planned([board("a", 1.0, 140 * MB)], context_tokens=2_048)
    assert "fewer slots" not in caught.value.try_
