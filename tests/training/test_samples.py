"""Rows of ids: what is learnt of a sample, what is held out, and which rows a step takes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as some

from models.training.data import Sample
from models.training.samples import IGNORED, Row, batch_of, batches, drawn, labelled_rows, rows_of, split


def letters(text: str, at_start: bool) -> list[int]:
    """A tokenizer of letters; 1 begins a text."""
    return [*([1] if at_start else []), *(ord(letter) for letter in text)]


def rows(count: int) -> list[Row]:
    return [Row(np.full(2 + number % 3, number, np.int64), 1) for number in range(count)]


def test_a_prompt_is_given_and_its_text_is_learnt() -> None:
    [row] = rows_of([Sample("xy", "ab")], letters, 16, 2)
    assert row.ids.tolist() == [1, 97, 98, 120, 121, 2] and row.learnt_from == 3
    batch = batch_of([row])
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 120, 121, 2, IGNORED]]
    assert batch.counted == 3


def test_a_text_is_learnt_from_its_first_id_on_and_cut() -> None:
    [row] = rows_of([Sample("abcdef")], letters, 4, 2)
    assert row.ids.tolist() == [1, 97, 98, 99] and row.learnt_from == 1


def test_what_teaches_nothing_is_left_out() -> None:
    samples = [Sample("x", "a" * 20), Sample("x"), Sample("abc")]
    assert len(rows_of(samples, lambda text, _: [], 4, None, keep_all=True)) == len(samples), (
        "whatever a tokenizer does"
    )
    assert [row.ids.tolist() for row in rows_of(samples, lambda text, _: [ord(x) for x in text], 4, None)] == [
        [97, 98, 99]
    ]


def test_shorter_rows_are_filled_up_with_what_counts_for_nothing() -> None:
    batch = batch_of([Row(np.array([5, 6]), 1), Row(np.array([7, 8, 9]), 1)])
    assert batch.ids.tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch.targets.tolist() == [[6, IGNORED, IGNORED], [8, 9, IGNORED]]


@given(some.integers(1, 40), some.floats(0, 0.99), some.integers(0, 2**63 - 1))
def test_what_is_held_out_is_never_trained_on(count: int, share: float, seed: int) -> None:
    all_rows = rows(count)
    found = split(all_rows, share, seed)
    assert len(found.trained) + len(found.held_out) == count and found.trained
    trained = {id(row) for row in found.trained}
    assert not trained & {id(row) for row in found.held_out}
    assert (len(found.held_out) >= 1) == (share > 0 and count > 1)
    again = split(all_rows, share, seed)
    assert [id(row) for row in again.held_out] == [id(row) for row in found.held_out]


@given(some.integers(1, 12), some.integers(1, 5), some.integers(0, 100), some.integers(0, 20))
def test_each_turn_takes_every_row_once(count: int, at_once: int, seed: int, number: int) -> None:
    all_rows = [Row(np.array([place, place]), 1) for place in range(count)]
    at_once = min(at_once, count)
    steps = [drawn(all_rows, at_once, seed, number, step).ids[:, 0].tolist() for step in range(3 * count)]
    taken = [place for step in steps for place in step]
    for turn in range(len(taken) // count):
        assert sorted(taken[turn * count : (turn + 1) * count]) == list(range(count))
    assert steps == [drawn(all_rows, at_once, seed, number, step).ids[:, 0].tolist() for step in range(3 * count)]


def test_all_rows_in_order() -> None:
    assert [batch.ids.shape[0] for batch in batches(rows(5), 2)] == [2, 2, 1]


def test_a_text_is_cut_but_for_the_token_that_ends_it_and_other_labels_are_left_out() -> None:
    samples = [Sample("abc", label="x"), Sample("ab", label="z"), Sample("abcdef", label="y"), Sample("a")]
    encode = lambda text, _: [1, *map(ord, text), 2]  # noqa: E731
    found = labelled_rows(samples, encode, 5, ("x", "y"))
    assert [(row.ids.tolist(), row.label) for row in found] == [([1, 97, 98, 99, 2], 0), ([1, 97, 98, 99, 2], 1)]
    kept = labelled_rows(samples, encode, 5, ("x", "y"), keep_all=True)
    assert [row.label for row in kept] == [0, IGNORED, 1, IGNORED]
    assert [row.teaches for row in kept] == [True, False, True, False]


def test_a_batch_of_labels_says_how_long_its_texts_are() -> None:
    found = batch_of([Row(np.array([1, 5, 2]), 1, 1), Row(np.array([1, 2]), 1, IGNORED)])
    assert found.ids.tolist() == [[1, 5, 2], [1, 2, 0]] and found.lengths.tolist() == [3, 2]
    assert found.targets.tolist() == [1, IGNORED] and found.counted == 1
    assert [piece.ids.tolist() for piece in found.pieces(1)] == [[[1, 5, 2]]], "the other one has nothing to say"
