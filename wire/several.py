"""Several connections that one thread serves: one wait for all of them, and each does its own reading and writing.

A stage with a broker on its own board has up to three: to its board's broker, to that of the next stage, and to the
site's. Polling one after the other would let a message wait for the others' time-outs.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Sequence
from typing import Protocol


class Joinable(Protocol):
    """A transport that says what it waits for; wire.mqtt.MqttTransport is one."""

    def watched(self) -> tuple[float, tuple[tuple[int, int], ...]]: ...

    def serve(self, ready: Sequence[tuple[int, int]]) -> int: ...

    def poll(self, timeout_s: float) -> int: ...

    def wake(self) -> None: ...


class Several:
    """Polls all of `members` as one. They must be started; the first one's wake-up pipe wakes all."""

    def __init__(self, members: Sequence[Joinable]) -> None:
        self._members = tuple(members)
        self._woken = False
        self._poller = select.poll()
        self._polled: tuple[tuple[int, int], ...] = ()
        self._owner: dict[int, Joinable] = {}

    def poll(self, timeout_s: float) -> int:
        """As wire.transport.Transport.poll, over all members: until one has handled a message, or the time is over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            due_s = self._watch()
            now_s = time.monotonic()
            wait_s = max(0.0, min(deadline_s, due_s) - now_s)
            ready = self._poller.poll(None if wait_s == math.inf else math.ceil(wait_s * 1000))
            handled = 0
            if ready:
                for one in ready:
                    handled += self._owner[one[0]].serve((one,))
            elif due_s <= time.monotonic():
                for member in self._members:
                    handled += member.poll(0.0)
            if handled or self._woken or time.monotonic() >= deadline_s:
                self._woken = False
                return handled

    def wake(self) -> None:
        """Make a running or the next `poll` return soon. Any thread."""
        self._woken = True
        self._members[0].wake()

    def _watch(self) -> float:
        """Let the poller watch what the members wait for now; give when something is due without it."""
        due_s = math.inf
        polled: tuple[tuple[int, int], ...] = ()
        owner: dict[int, Joinable] = {}
        for member in self._members:
            member_due_s, watched = member.watched()
            due_s = min(due_s, member_due_s)
            polled += watched
            for descriptor, _ in watched:
                owner[descriptor] = member
        if polled != self._polled:
            # A descriptor that was closed and opened again is another connection: the poller is made anew.
            self._poller = select.poll()
            for descriptor, events in polled:
                self._poller.register(descriptor, events)
            self._polled = polled
        self._owner = owner
        return due_s
