"""How many requests at once: as many as go well, and why fewer."""

from __future__ import annotations

import pytest

from coordinator.planning.partition import Infeasible
from coordinator.planning.plan import Plan
from coordinator.planning.planner import Candidate
from coordinator.planning.slots import USUAL_SLOTS, plan_with_slots, slots_text
from tests.planning.boards import MB, board
from tests.planning.test_planner import plan


def planned(candidates: list[Candidate], asked: int | None = None, **changes: object) -> Plan:
    return plan_with_slots(lambda slots: plan(candidates, slots=slots, **changes), asked)


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


def test_what_is_asked_for_is_kept_or_refused() -> None:
    made = planned([board("a")], asked=3)
    assert (made.slots, made.slots_because) == (3, "")
    with pytest.raises(Infeasible):
        planned([board("a", 1.0, 260 * MB)], asked=8, context_tokens=2_048)


def test_boards_too_small_for_one_are_refused_as_ever() -> None:
    with pytest.raises(Infeasible) as caught:
        planned([board("a", 1.0, 140 * MB)], context_tokens=2_048)
    assert "fewer slots" not in caught.value.try_
