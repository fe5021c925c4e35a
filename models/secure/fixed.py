"""Changes of factors as integers mod 2^32, so that masks cancel to the last bit and sums are the same in whatever
order. Pure.

Device k's change d, no element farther than `farthest` from 0, counts by w = its samples / the most samples of a
member: q = round(w d scale). The scale leaves the sum of n members HEADROOM times the room that it can need: a sum of
numbers that came from nowhere (a mask that is left over) is out of range in nearly all of its elements.

What is lost: at most half a step for each element of each member, so the mean sum(q) / (scale sum(w)) is off by at most
n / (2 scale sum(w)) = n^2 farthest HEADROOM / (2^32 sum(w)); for ten boards of as many samples each 2e-8 of the
farthest that an element can go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from models.secure.keys import Integers

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

HEADROOM: Final = 8
PIECE: Final = 1 << 18
"""Elements at a time, since they take four times their room meanwhile."""


def weights_of(samples: Sequence[int]) -> tuple[float, ...]:
    """Of each member."""
    return tuple(one / max(samples) for one in samples)


def scale_of(members: int, farthest: float) -> float:
    """Steps per unit."""
    return 2.0**31 / (HEADROOM * members * farthest)


def integers_of(change: Floats, weight: float, scale: float, farthest: float) -> Integers:
    """[m] what a member adds to the sum, without masks; what is farther is cut to `farthest`. Raises ValueError for
    what are no numbers."""
    if not np.isfinite(change).all():
        raise ValueError("a change that is no number")
    steps: Integers = np.empty(len(change), np.uint32)
    for begin in range(0, len(change), PIECE):
        cut = np.clip(change[begin : begin + PIECE].astype(np.float64), -farthest, farthest)
        steps[begin : begin + PIECE] = np.rint(cut * (weight * scale)).astype(np.int64).astype(np.uint32)
    return steps


def mean_of(total: Integers, weights: Sequence[float], scale: float, farthest: float) -> Doubles:
    """[m] the weighted mean that a sum stands for, `weights` those of its members. Raises ValueError for a sum that no
    changes come to."""
    steps = total.view(np.int32).astype(np.float64)
    most = sum(weights) * farthest * scale + len(weights)
    beyond = int((np.abs(steps) > most).sum())
    if beyond:
        raise ValueError(f"{beyond} of {len(steps)} elements are farther than all members together can have gone")
    mean: Doubles = steps / (scale * sum(weights))
    return mean
