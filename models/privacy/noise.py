"""Random numbers that nobody can foretell who has not the key: for noise, and for who takes part in a step.

The stream is SHAKE-256 (FIPS 202) of key, label and a counter, so the same key and label give the same numbers again: a
board that does a round anew comes to the very message that it may have sent already, and tells nothing more by it.
Normal numbers are made by Box and Muller's rule from uniform ones of 53 bits. That a float has finitely many digits
can betray something of what was added to it (Mironov, On significance of the least significant bits for differential
privacy, 2012); against somebody who looks for that this does not help.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]

KEY_BYTES: Final = 32


class Stream:
    """Numbers by a key; `label` says what for: other labels give other numbers."""

    def __init__(self, key: bytes, label: str) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key of {len(key)} bytes, not {KEY_BYTES}")
        self._seed = hashlib.sha256(key + label.encode()).digest()
        self._calls = 0

    def uniform(self, count: int) -> Doubles:
        """[count] between 0 and 1, neither of them among them."""
        made = hashlib.shake_256(self._seed + self._calls.to_bytes(8, "little"))
        self._calls += 1
        words = np.frombuffer(made.digest(8 * count), "<u8")
        found: Doubles = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        return found

    def normal(self, count: int) -> Doubles:
        """[count] of mean 0 and variance 1."""
        half = (count + 1) // 2
        first, second = self.uniform(half), self.uniform(half)
        size, angle = np.sqrt(-2.0 * np.log(first)), (2 * math.pi) * second
        return np.concatenate([size * np.cos(angle), size * np.sin(angle)])[:count]

    def sampled(self, count: int, share: float) -> list[int]:
        """Which of `count` take part, each by itself with probability `share` (Poisson sampling)."""
        return [int(number) for number in np.flatnonzero(self.uniform(count) < share)]


def clipped(vector: Floats, most: float) -> Floats:
    """No longer than `most`, in the same direction; what has no length becomes nothing."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not math.isfinite(length):
        return np.zeros_like(vector)
    return vector if length <= most else (vector * (most / length)).astype(np.float32)


def noised(vector: Floats, deviation: float, stream: Stream) -> Floats:
    """With a normal number of that standard deviation added to each element."""
    return (vector + deviation * stream.normal(len(vector))).astype(np.float32)
