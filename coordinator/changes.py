"""Waiting for the world to become as it should be: a predicate, a deadline, and a bell that rings at each change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LOOK_AGAIN_S = 1.0
"""A predicate may depend on the time too: it is asked so often even if nothing rings."""


class Changes:
    """`ring` wakes all waiters; each checks its own predicate. One event loop."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def ring(self) -> None:
        for waiter in self._waiters:
            _wake(waiter)

    async def wait(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until `predicate()` holds or time is over; give whether it holds.

        A bare future and no asyncio.wait_for: up to Python 3.11 that loses a cancellation that comes with the bell, and
        whoever gave up would be waited for until the deadline.
        """
        loop = asyncio.get_running_loop()
        deadline_s = time.monotonic() + timeout_s
        while not predicate():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            waiter: asyncio.Future[None] = loop.create_future()
            timer = loop.call_later(min(left_s, LOOK_AGAIN_S), _wake, waiter)
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
                timer.cancel()
        return True


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
