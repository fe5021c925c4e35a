"""Who uses a deployment, and who may change it next.

A request holds the deployment that was chosen for it until its answer is over; a deployment that somebody holds is not
replaced. Whoever needs another one under the same name stands in the name's line, in which everybody waits his turn:
those who come later, and would be content with what runs, can't keep it running for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable

Key = tuple[str, int]
"""Name and epoch of a deployment."""


class Holds:
    """How many hold each deployment; `changed` is called when one lets go."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.changed = changed
        self._counts: Counter[Key] = Counter()

    def count(self, key: Key) -> int:
        return self._counts[key]

    def __len__(self) -> int:
        """Deployments that somebody holds."""
        return len(self._counts)

    def add(self, key: Key) -> None:
        self._counts[key] += 1

    def remove(self, key: Key) -> None:
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]
        self.changed()


class Hold:
    """What one request holds: one deployment at most, and none once it is closed."""

    def __init__(self) -> None:
        self._held: tuple[Holds, Key] | None = None
        self._closed = False

    def take(self, holds: Holds, key: Key) -> None:
        """Hold this deployment and no other any more. Nothing is held for a request that is over: what was cancelled
        may still be on its way to here."""
        self.release()
        if not self._closed:
            holds.add(key)
            self._held = (holds, key)

    def release(self) -> None:
        """Let go, perhaps to take another."""
        if self._held is not None:
            holds, key = self._held
            self._held = None
            holds.remove(key)

    def close(self) -> None:
        """Let go for good."""
        self._closed = True
        self.release()


class Seat:
    """The turn that one request has, on one deployment at most."""

    def __init__(self) -> None:
        self._turn: asyncio.Semaphore | None = None

    async def take(self, turn: asyncio.Semaphore) -> None:
        """Wait for this turn and have it and no other; who has it already keeps it."""
        if turn is not self._turn:
            self.leave()
            await turn.acquire()
            self._turn = turn

    def leave(self) -> None:
        if self._turn is not None:
            self._turn.release()
            self._turn = None


class Lines:
    """One line per name, first come, first served; a line in which nobody stands is forgotten."""

    def __init__(self) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._standing: Counter[str] = Counter()

    @contextlib.asynccontextmanager
    async def turn(self, name: str, must_wait: Callable[[], None]) -> AsyncIterator[None]:
        """Wait for the turn and have it; `must_wait` is called first if somebody else has it."""
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._standing[name] += 1
        try:
            if lock.locked():
                must_wait()
            async with lock:
                yield
        finally:
            self._standing[name] -= 1
            if not self._standing[name]:
                del self._standing[name], self._locks[name]

    def __len__(self) -> int:
        return len(self._locks)
