"""What an answer knows of itself while it grows."""

from __future__ import annotations

import pytest

from coordinator.inference.answer import Answer
from coordinator.inference.requests import Guesses, Token
from tests.coordinator.test_serving import FakePrepared


def answer(tokens: int, guesses: Guesses | None) -> Answer:
    made = Answer([1, 2], FakePrepared(), ())  # type: ignore[arg-type]
    made.tokens = [Token(id=7, index=index, arrived_s=float(index), final=False) for index in range(tokens)]
    made.guesses = guesses
    return made


@pytest.mark.parametrize(
    ("tokens", "guesses", "rows"),
    [
        (1, None, 0),
        (4, None, 3),
        (4, Guesses(), 3),
        (4, Guesses(most=7), 1),
        (1, Guesses(most=7), 0),
        (20, Guesses(most=7), 12),
    ],
)
def test_an_answer_waits_for_the_figures_of_one_step_at_least_if_it_took_any(
    tokens: int, guesses: Guesses | None, rows: int
) -> None:
    assert answer(tokens, guesses).least_rows == rows
