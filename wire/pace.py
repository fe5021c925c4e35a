"""A token bucket (Turner, New directions in communications, 1986): so many bytes per second, and no more at once than
a burst."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

LEAST_BURST_S: Final = 0.5
"""Of the rate: whoever sends looks again sooner than that."""


class Pace:
    """Begins empty, so that n bytes take n / rate from the beginning on."""

    def __init__(self, bytes_per_s: float, burst_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        if not bytes_per_s > 0:
            raise ValueError(f"{bytes_per_s} bytes/s")
        self.bytes_per_s = bytes_per_s
        self._burst = max(float(burst_bytes), LEAST_BURST_S * bytes_per_s)
        self._clock = clock
        self._left = 0.0
        self._at_s = clock()

    def may_send(self, count: int) -> bool:
        """What is larger than a burst goes when the bucket is full, and is paid for afterwards."""
        now_s = self._clock()
        self._left = min(self._burst, self._left + (now_s - self._at_s) * self.bytes_per_s)
        self._at_s = now_s
        return self._left >= min(float(count), self._burst)

    def sent(self, count: int) -> None:
        self._left -= count
