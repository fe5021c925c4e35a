"""When steps were made, as stages tell it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from agent.workers.marks import EVERY, KEPT, MAX_OPEN, Marks


def unit(request: int, row: int) -> Any:
    return SimpleNamespace(live=SimpleNamespace(request=request, run=row))


def test_all_stages_mark_the_same_rows_and_keep_the_last() -> None:
    marks = Marks(first=False)
    for row in range(EVERY * (KEPT + 5)):
        marks.ran((unit(1, row), unit(2, row + 1)), 0.002, float(row))
    assert len(marks.recent) == KEPT and all(mark.row % EVERY == 0 for mark in marks.recent)
    last = [mark for mark in marks.recent if mark.request == 1][-1]
    assert (last.ended_s, round(last.ended_s - last.began_s, 6)) == (float(last.row), 0.002)


def test_the_first_stage_waits_for_the_token_to_come_back() -> None:
    marks = Marks(first=True)
    marks.ran((unit(1, 8),), 0.002, 10.0)
    assert marks.recent == ()
    marks.ran((unit(2, 9),), 0.002, 10.5)
    assert marks.recent == (), "another answer's token"
    marks.ran((unit(1, 11),), 0.002, 11.0)
    [mark] = marks.recent
    assert (mark.row, mark.ended_s, mark.back_s) == (8, 10.0, 10.998), "guesses may have been right meanwhile"


def test_answers_that_never_come_back_are_forgotten_and_all_are_with_the_epoch() -> None:
    marks = Marks(first=True)
    for request in range(MAX_OPEN + 10):
        marks.ran((unit(request, 8),), 0.001, 1.0)
    assert len(marks._open) == MAX_OPEN
    marks.forget()
    marks.ran((unit(MAX_OPEN, 9),), 0.001, 2.0)
    assert marks.recent == ()


def test_requests_of_any_number_fit_a_message() -> None:
    marks = Marks(first=False)
    marks.ran((unit(2**63 + 5, 8),), 0.001, 1.0)
    assert marks.recent[0].request == 5
