"""What the ways between boards take: each board is asked once for its round trips to the brokers of others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from coordinator.calls import CallFailed, Calls
from coordinator.planning.topology import Way

TIMEOUT_S: Final = 60.0
"""For all brokers that one board is asked about; it may be in the middle of measuring something else."""

TRY_AGAIN_S: Final = 60.0
"""What failed is asked again at the first plan after so long."""

LONGEST_S: Final = 60.0
"""A round trip beyond this is no figure."""


class Ways:
    """All methods run in the event loop's thread. `is_online(device)` is the fleet's."""

    def __init__(
        self, calls: Calls, is_online: Callable[[str], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.round_trips: dict[Way, float | str] = {}
        """Seconds, or in words why there are none. A way is known by the broker's address: with another one it is
        another way."""
        self._calls = calls
        self._is_online = is_online
        self._clock = clock
        self._failed_s: dict[Way, float] = {}

    async def measure(self, ways: Iterable[Way], say: Callable[[str], None]) -> None:
        """Have those measured that are not known, or failed some time ago; boards are asked at the same time."""
        asked: dict[str, list[str]] = {}
        for way in ways:
            known = self.round_trips.get(way)
            fresh = self._clock() - self._failed_s.get(way, -TRY_AGAIN_S) < TRY_AGAIN_S
            if known is None or (isinstance(known, str) and not fresh):
                asked.setdefault(way.device, []).append(way.broker)
        if asked:
            say(f"measuring the ways between boards: {', '.join(asked)}")
            await asyncio.gather(*(self._ask(device, brokers) for device, brokers in asked.items()))

    async def _ask(self, device: str, brokers: list[str]) -> None:
        try:
            result = await self._calls.call(
                device, "probe-ways", lambda: self._is_online(device), TIMEOUT_S, brokers=brokers
            )
        except CallFailed as error:
            result = {"failed": dict.fromkeys(brokers, error.message)}
        for broker in brokers:
            found = _found(result, broker)
            self.round_trips[Way(device, broker)] = found
            if isinstance(found, str):
                self._failed_s[Way(device, broker)] = self._clock()


def _found(result: dict[str, Any], broker: str) -> float | str:
    """What a reply says of one broker; a board may say anything."""
    times, failed = result.get("round_trip_s"), result.get("failed")
    seconds = times.get(broker) if isinstance(times, dict) else None
    if isinstance(seconds, (int, float)) and 0 < seconds < LONGEST_S:
        return float(seconds)
    reason = failed.get(broker) if isinstance(failed, dict) else None
    return str(reason)[:200] if reason else "it was not measured"
