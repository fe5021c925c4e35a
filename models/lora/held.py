"""Factors that are held beside those that are trained: what a job with aggregation 'stack' has come to so far. Pure.

They travel as one vector as others do (models.lora.adapter.flat), of as many ranks as there are by now, the task module
behind them. Their product counts by the same scale as that of the factors that are trained.
"""

from __future__ import annotations

from collections.abc import Mapping

from models.lora.adapter import Floats, length_of, named

Shapes = Mapping[str, tuple[int, int]]


def at_rank(shaped: Shapes, rank: int) -> dict[str, tuple[int, int]]:
    """The same factors at another rank, 0 for none."""
    found: dict[str, tuple[int, int]] = {}
    for name, (rows, columns) in shaped.items():
        found[name] = {"a": (rank, columns), "b": (rows, rank)}.get(name[-1], (rows, columns))
    return found


def rank_of(shaped: Shapes, length: int) -> int:
    """Of held factors that are so many numbers, the task module among them; `shaped` at whatever rank. Raises
    ValueError for a length that no rank has."""
    others = length_of(shaped, ("c",))
    of_one = length_of(at_rank(shaped, 1), ("a", "b"))
    rank, left = divmod(length - others, of_one)
    if rank < 0 or left:
        raise ValueError(f"{length} numbers, held factors have {others} and {of_one} for each rank")
    return rank


def held_in(vector: Floats, shaped: Shapes) -> dict[str, Floats]:
    """The held factors, and the task module, by name; ValueError for a vector of a length that no rank has."""
    return named(vector, at_rank(shaped, rank_of(shaped, len(vector))))
