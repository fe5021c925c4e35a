"""How long boards with data take by themselves in a round of agent.workers.splitwork, as who hears their states sees
it. Pure.

A board's clock runs from the moment in which it was answered until its next states are there: the way to it, what it
computes, its gradient and its states on their way back. It stands while the board waits for the blocks or for others.
"""

from __future__ import annotations

from collections.abc import Iterable


class OwnTimes:
    """Of the boards in `devices`, in seconds, since `now_s`."""

    def __init__(self, devices: Iterable[str], now_s: float) -> None:
        self._since_s = dict.fromkeys(devices, now_s)
        """Whose clocks run."""
        self.own_s = dict.fromkeys(self._since_s, 0.0)

    def came(self, device: str, now_s: float, last: bool) -> None:
        """Something of it that was waited for; `last`: the board has no more to do for now."""
        since_s = self._since_s.pop(device, None)
        if since_s is None:
            return
        self.own_s[device] += now_s - since_s
        if not last:
            self._since_s[device] = now_s

    def answered(self, device: str, now_s: float) -> None:
        self._since_s[device] = now_s
