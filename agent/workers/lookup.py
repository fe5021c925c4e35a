"""Guesses what comes next in a text from where its last words stood before: no second model, a few look-ups per token.

The index knows, for each run of 3, 2 and 1 tokens, what followed it the last time. It costs the same for every token,
and its memory is bounded: of what is older than `most` tokens, at most as much again is remembered.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

LENGTHS: Final = (3, 2, 1)
"""Tokens of a run, the longest first: the longer it is, the likelier what followed it follows again."""

MOST_INDEXED: Final = 8192
"""Tokens that the index is made of, or twice as many: some 10 MB."""


class Guess(NamedTuple):
    """What may come next, and how long the run was that it followed before; () and 0 if there was none."""

    tokens: tuple[int, ...]
    length: int


NOTHING: Final = Guess((), 0)


class Lookup:
    """Tokens of a prompt and its answer, in order."""

    def __init__(self, most: int = MOST_INDEXED) -> None:
        self._most = most
        self._tokens = array("i")
        self._followed: dict[tuple[int, ...], int] = {}
        """Run -> place of what followed it last."""
        self._older: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def __len__(self) -> int:
        return len(self._tokens)

    def add(self, tokens: Sequence[int]) -> None:
        """These come next."""
        for token in tokens[-self._most :] if len(tokens) > self._most else tokens:
            self._index()
            self._tokens.append(token)

    def _index(self) -> None:
        """Note that what follows the last runs stands at the place that is filled next."""
        place = len(self._tokens)
        if self._indexed >= self._most:
            self._older, self._followed, self._indexed = self._followed, {}, 0
        self._indexed += 1
        for length in LENGTHS:
            if length <= place:
                self._followed[tuple(self._tokens[place - length :])] = place

    def guess(self, most: int) -> Guess:
        """At most so many tokens: what followed the longest run known. Where that reaches the end it is taken to go on
        from there, as in a list that repeats itself."""
        end = len(self._tokens)
        for length in LENGTHS:
            if length > end or most < 1:
                continue
            run = tuple(self._tokens[end - length :])
            place = self._followed.get(run) or self._older.get(run)
            if place is not None:
                period = end - place
                found = self._tokens[place : place + most]
                return Guess(tuple(found[at % period] for at in range(most)), length)
        return NOTHING
