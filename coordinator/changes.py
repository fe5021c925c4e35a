"""Waiting for the world to become as it should be: a predicate, a deadline, and a bell that rings at each change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Changes:
    """`ring` wakes all waiters; each checks its own predicate. One event loop."""

    def __init__(self) -> None:
        self._bell = asyncio.Event()

    def ring(self) -> None:
        bell, self._bell = self._bell, asyncio.Event()
        bell.set()

    async def wait(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `predicate()` holds or time is over; give whether it holds."""
        deadline_s = time.monotonic() + timeout_s
        while not predicate():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            try:
                await asyncio.wait_for(self._bell.wait(), min(left_s, 1.0))
            except asyncio.TimeoutError:
                continue
        return True
