"""Samples as rows of token ids, and which of them a step takes.

A row is the ids of a prompt, of the text behind it, and the token that ends a text if the model has one. Each id is to
say the one after it; the ids of the prompt are given, not learnt. Or it is the ids of a text, all of which are to say
its label. What is drawn depends on seed, round and step alone,
so that a device that begins a round again does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from models.training.data import Sample
from wire.errors import CorruptData

Ids = npt.NDArray[np.int64]

IGNORED: Final = -100
"""A target that counts for nothing."""

LEAST_LEARNT: Final = 1


class Row(NamedTuple):
    """`learnt_from`: the first of `ids` that is to be said by the row before it."""

    ids: Ids
    learnt_from: int
    label: int | None = None
    """The place of its label among the task's, or IGNORED; None where the text itself is learnt."""

    @property
    def teaches(self) -> bool:
        return self.learnt_from < len(self.ids) if self.label is None else self.label != IGNORED


NOTHING: Final = Row(np.zeros(1, np.int64), 1)
"""A row without anything to learn."""


class Batch(NamedTuple):
    """`ids` [n, T], filled up with zeros behind so many as `lengths` [n] says. `targets`: the ids that are to be said
    [n, T], or labels [n]; those that are IGNORED don't count."""

    ids: Ids
    targets: Ids
    lengths: Ids

    @property
    def counted(self) -> int:
        return int((self.targets != IGNORED).sum())

    def pieces(self, rows: int) -> list[Batch]:
        """The same in pieces of so many rows at most, those left out that have no target."""
        starts = range(0, len(self.ids), rows)
        found = [Batch(*(part[start : start + rows] for part in self)) for start in starts]
        return [piece for piece in found if piece.counted]


class Judged(NamedTuple):
    """What a model makes of a batch: mean loss over what counts, and how many labels it tells right."""

    loss: float
    counted: int
    right: int | None = None
    by_modality: Mapping[str, tuple[int, int]] = {}
    """Of several: labels of each, and how many of these."""


class Judging:
    """Of a round: what a model makes of all that is held out, batch by batch."""

    def __init__(self, held_out: Sequence[Batch]) -> None:
        self._held_out = held_out
        self._judged = 0
        self._held_out_loss = 0.0
        self.held_out_count = 0
        """Tokens, or texts with a label."""
        self.held_out_right: int | None = None
        """Of these, how many were told right, where that is asked."""
        self.held_out_by: dict[str, tuple[int, int]] = {}
        """Modality -> labels held out, and told right."""

    @property
    def held_out_loss(self) -> float | None:
        """The mean; None of nothing."""
        return self._held_out_loss / self.held_out_count if self.held_out_count else None

    @property
    def _to_judge(self) -> Batch | None:
        """The next batch; None when all were judged."""
        return self._held_out[self._judged] if self._judged < len(self._held_out) else None

    def _judge(self, found: Judged) -> None:
        self._held_out_loss += found.loss * found.counted
        self.held_out_count += found.counted
        if found.right is not None:
            self.held_out_right = (self.held_out_right or 0) + found.right
        for name, (count, right) in found.by_modality.items():
            counted, told = self.held_out_by.get(name, (0, 0))
            self.held_out_by[name] = counted + count, told + right
        self._judged += 1


class Split(NamedTuple):
    trained: tuple[Row, ...]
    held_out: tuple[Row, ...]


def encoder_of(tokenizer_json: str) -> Callable[[str, bool], list[int]]:
    """`encode(text, at_start)`: ids of a text as users write it; raises CorruptData for what is no tokenizer."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises bare Exception for all that it finds wrong
        raise CorruptData(f"tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True

    def encode(text: str, at_start: bool) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=at_start).ids
        return ids

    return encode


def rows_of(
    samples: Sequence[Sample],
    encode: Callable[[str, bool], list[int]],
    row_tokens: int,
    end_id: int | None,
    keep_all: bool = False,
) -> list[Row]:
    """Those that are long enough to teach something; what is longer than `row_tokens` is cut at its end. With
    `keep_all` the others, too, as rows without anything to learn: their number then says nothing of their texts."""
    found = []
    for sample in samples:
        given = encode(sample.prompt, True) if sample.prompt else []
        text = encode(sample.text, not given)
        ids = [*given, *text, *([end_id] if end_id is not None else [])][:row_tokens]
        learnt_from = max(1, len(given))
        if len(ids) - learnt_from >= LEAST_LEARNT:
            found.append(Row(np.array(ids, np.int64), learnt_from))
        elif keep_all:
            found.append(NOTHING)
    return found


def labelled_rows(
    samples: Sequence[Sample],
    encode: Callable[[str, bool], list[int]],
    row_tokens: int,
    labels: Sequence[str],
    keep_all: bool = False,
) -> list[Row]:
    """Those that have one of the labels; what is longer than `row_tokens` is cut, but for the token that ends it. With
    `keep_all` the others, too, as rows without anything to learn: their number then says nothing of their labels."""
    place = {label: number for number, label in enumerate(labels)}
    found = []
    for sample in samples:
        label = IGNORED if sample.prompt else place.get(sample.label, IGNORED)
        if label == IGNORED and not keep_all:
            continue
        ids = encode(sample.text, True)
        if len(ids) > row_tokens:
            ids = [*ids[: row_tokens - 1], ids[-1]]
        found.append(Row(np.array(ids, np.int64), 1, label))
    return found


def split(rows: Sequence[Row], held_out: float, seed: int) -> Split:
    """Which rows are never trained on: so many of them, drawn by the seed; one at least if any, and not all."""
    count = min(len(rows) - 1, max(1, round(held_out * len(rows)))) if held_out > 0 and len(rows) > 1 else 0
    order = np.random.default_rng([seed, 1]).permutation(len(rows))
    held = set(order[:count].tolist())
    return Split(
        tuple(row for number, row in enumerate(rows) if number not in held),
        tuple(row for number, row in enumerate(rows) if number in held),
    )


def drawn(rows: Sequence[Row], count: int, seed: int, round_number: int, step: int) -> Batch:
    """The batch of a step: rows go round in an order that is drawn anew each time all were taken in a round."""
    count = min(count, len(rows))
    start = step * count
    taken = []
    for place in range(start, start + count):
        turn, at = divmod(place, len(rows))
        order = np.random.default_rng([seed, 2, round_number, turn]).permutation(len(rows))
        taken.append(rows[int(order[at])])
    return batch_of(taken)


def batches(rows: Sequence[Row], count: int) -> list[Batch]:
    """All rows in order."""
    return [batch_of(rows[start : start + count]) for start in range(0, len(rows), count)]


def batch_of(rows: Sequence[Row]) -> Batch:
    """Of rows that are all of one kind."""
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row.ids)] = row.ids
    if rows[0].label is not None:
        return Batch(ids, np.array([row.label for row in rows], np.int64), lengths)
    targets = np.full(ids.shape, IGNORED, np.int64)
    for number, row in enumerate(rows):
        targets[number, row.learnt_from - 1 : len(row.ids) - 1] = row.ids[row.learnt_from :]
    return Batch(ids, targets, lengths)
