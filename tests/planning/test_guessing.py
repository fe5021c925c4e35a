"""Whether tokens are guessed on a plan follows from its figures, and is said."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planning.guessing import MOST_ROW_COST, guessing_of
from coordinator.planning.plan import Plan
from tests.coordinator.plans import plan_of


def plan(hop_s: float, chunk_s: float | None = 0.022, transfer_s: float = 0.0, boards: int = 4) -> Plan:
    """Stages of 2.5 ms a token; a chunk of 32 rows of theirs takes 0.022 s: 0.63 ms for each further row."""
    made = plan_of(*(f"board{number}" for number in range(boards)))
    stages = tuple(
        msgspec.structs.replace(stage, compute_s=0.0025, hop_s=hop_s, prefill_chunk_s=chunk_s, transfer_s=transfer_s)
        for stage in made.stages
    )
    token_s = boards * 0.0025 + (boards * hop_s if boards > 1 else 0.0)
    return msgspec.structs.replace(made, stages=stages, prefill_chunk_tokens=32, predicted_token_s=token_s)


def test_where_links_take_most_of_a_round_tokens_are_guessed() -> None:
    found = guessing_of(plan(0.0065, transfer_s=0.0005))
    assert found.pays  # 4.5 ms of 36 ms
    assert found.because == "tokens are guessed: links take 72% of a round, a further row adds 13%"


@pytest.mark.parametrize("hop_s", [0.0, 0.0003, 0.0016])
def test_where_steps_take_most_of_it_none_are(hop_s: float) -> None:
    found = guessing_of(plan(hop_s))
    assert not found.pays and "below 50%" in found.because


def test_one_board_has_no_links_whatever_its_way_to_the_broker() -> None:
    assert not guessing_of(plan(0.0065, boards=1)).pays


def test_a_board_that_has_not_measured_several_rows_is_taken_to_need_much_for_them() -> None:
    found = guessing_of(plan(0.0065, chunk_s=None))
    assert found.pays and found.because.endswith("a further row adds 11%")  # 0.4 of 10 ms, of 36 ms


def test_rows_that_cost_too_much_are_not_guessed() -> None:
    found = guessing_of(plan(0.0065, transfer_s=0.0030))
    assert not found.pays and "above 30%" in found.because


@given(st.floats(0.0, 0.1), st.floats(0.0, 0.1), st.floats(0.0, 0.05))
def test_what_is_guessed_costs_little_by_the_plan(hop_s: float, chunk_s: float, transfer_s: float) -> None:
    made = plan(hop_s, chunk_s, transfer_s)
    row_s = 4 * (max(0.0, chunk_s - 0.0025) / 31 + transfer_s)
    if guessing_of(made).pays:
        assert row_s <= (MOST_ROW_COST + 1e-9) * made.predicted_token_s
        assert 4 * hop_s >= 0.5 * made.predicted_token_s
