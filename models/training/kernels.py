"""Features of a window of readings by random convolutions that nobody trains.

Each kernel has nine places, some distance apart (its dilation), over some of the columns. Its feature is the share of
places in the window at which it gives more than zero (the proportion of positive values of ROCKET: Dempster, Petitjean
and Webb, 2020; alone, as in MiniRocket, 2021), from -1 for none to 1 for all. Every other kernel sums to zero in each
column, and so sees form alone; the others see levels, too. Numbers are not divided by what a window happens to hold:
how strong a movement is tells something.

All of it comes from the seed: from the raw numbers of Philox, which are the same with every version of numpy.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

VERSION: Final = 1
"""Grows when the same seed would give other features."""
PLACES: Final = 9
WORKING_BYTES: Final = 16 << 20
"""Of what is computed at one time, unless a single window takes more."""
FLOAT: Final = 4


class Kernels:
    """For windows [n, window, columns]. `groups`: dilation, weights [PLACES, columns, k], biases [k]."""

    def __init__(self, columns: int, window: int, count: int, seed: int) -> None:
        """`window`: PLACES rows at least."""
        self.count, self.window, self.columns = count, window, columns
        self._chance = np.random.Philox(key=seed)
        self.groups: list[tuple[int, Floats, Floats]] = []
        dilations = dilations_of(window)
        for place, dilation in enumerate(dilations):
            size = count // len(dilations) + (place < count % len(dilations))
            if size:
                self.groups.append((dilation, *self._drawn(size)))

    def features(self, windows: Floats) -> Floats:
        """[n, window, columns] -> [n, count]."""
        at_once = max(1, WORKING_BYTES // working_bytes(self.columns, self.window, self.count))
        pieces = [self._features(windows[start : start + at_once]) for start in range(0, len(windows), at_once)]
        return np.concatenate(pieces) if pieces else np.zeros((0, self.count), np.float32)

    def _features(self, windows: Floats) -> Floats:
        found = []
        for dilation, weights, biases in self.groups:
            rows = self.window - (PLACES - 1) * dilation
            at = [windows[:, place * dilation : place * dilation + rows] for place in range(PLACES)]
            seen = np.concatenate(at, axis=2).reshape(len(windows) * rows, PLACES * self.columns)
            made = seen @ weights.reshape(PLACES * self.columns, -1) + biases
            share = (made > 0).reshape(len(windows), rows, -1).mean(axis=1, dtype=np.float32)
            found.append(2 * share - 1)
        return np.concatenate(found, axis=1)

    def _drawn(self, count: int) -> tuple[Floats, Floats]:
        """Weights of length 1 over so many columns as chance says, fewer rather than many; biases from -1 to 1."""
        columns = self.columns
        weights = self._normal(PLACES * columns * count).reshape(PLACES, columns, count)
        most = np.floor((columns + 1) ** self._uniform(count))
        order = np.argsort(np.argsort(self._uniform(columns * count).reshape(columns, count), axis=0), axis=0)
        weights *= order < most
        weights[:, :, ::2] -= weights[:, :, ::2].mean(axis=0)
        weights /= np.sqrt(np.square(weights).sum(axis=(0, 1)))
        return weights.astype(np.float32), (2 * self._uniform(count) - 1).astype(np.float32)

    def _uniform(self, count: int) -> npt.NDArray[np.float64]:
        """From 0 to 1, without 1."""
        raw = np.asarray(self._chance.random_raw(count), np.uint64)
        return np.asarray((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53)

    def _normal(self, count: int) -> npt.NDArray[np.float64]:
        """Box and Muller, 1958."""
        length = np.sqrt(-2 * np.log1p(-self._uniform(count)))
        return np.asarray(length * np.cos(2 * np.pi * self._uniform(count)))


def dilations_of(window: int) -> list[int]:
    """1, 2, 4 .. as long as a kernel fits into the window."""
    return [1 << power for power in range(window.bit_length()) if (PLACES - 1 << power) < window]


def working_bytes(columns: int, window: int, count: int) -> int:
    """What the features of one window take while they are computed, at most."""
    groups = len(dilations_of(window))
    return FLOAT * window * (2 * PLACES * columns + 2 * (count // groups + 1))
