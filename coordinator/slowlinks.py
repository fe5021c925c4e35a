"""How much slower than measured the links of boards are, as planners shall reckon with. Pure: changes and times in.

As coordinator.slowness for boards: a correction, not a profile. A link that was found slow stays so until its hops are
seen to be faster, until the board has measured it anew, or until nobody has used it for a while, which doubles each
time that it is found slow again.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from coordinator.planning.slowed import Slowed

WELL: Final = 1.5
"""Below it a link is as good as measured."""

MOST_TIMES: Final = 100.0
FORGET_S: Final = 300.0
LONGEST_FORGET_S: Final = 3600.0


@dataclass(slots=True)
class _Link:
    times: float = 1.0
    crossing_s: float = 0.0
    since_unix: float = 0.0
    used_s: float = 0.0
    relapses: int = -1


class SlowLinks:
    """All boards of a site. `now_s` is monotonic and never falls; `now_unix` is for people."""

    def __init__(self) -> None:
        self._links: dict[str, _Link] = {}

    def changed(self, device: str, more_s: float, crossing_s: float, now_s: float, now_unix: float) -> bool:
        """A crossing of a board's link takes so much more (less, if below 0) than before; `crossing_s` is what it was
        measured to take. Gives whether it is to be reckoned with otherwise now."""
        link = self._links.setdefault(device, _Link())
        before = link.times
        times = min(MOST_TIMES, before + more_s / max(crossing_s, 1e-5))
        link.times, link.crossing_s = times if times >= WELL else 1.0, crossing_s
        link.used_s = now_s
        if before <= 1 < link.times:
            link.since_unix = now_unix
            link.relapses += 1
        return link.times != before

    def used(self, devices: Collection[str], now_s: float) -> None:
        """Their links are watched: what is known of them stays true until it is seen to be false."""
        for device in devices:
            if device in self._links:
                self._links[device].used_s = now_s

    def tick(self, now_s: float) -> list[str]:
        """Call every second or so; boards whose links are given another chance."""
        forgotten = []
        for device, link in self._links.items():
            if link.times > 1 and now_s - link.used_s >= min(LONGEST_FORGET_S, FORGET_S * 2 ** max(0, link.relapses)):
                link.times = 1.0
                forgotten.append(device)
        return forgotten

    def measured_anew(self, device: str) -> bool:
        """Its profile says what its link is now; whether that is news."""
        link = self._links.get(device)
        if link is None or link.times <= 1:
            return False
        link.times = 1.0
        return True

    def of(self, device: str) -> Slowed | None:
        """How a planner shall reckon with a board's link; None if its profile is right."""
        link = self._links.get(device)
        if link is None or link.times <= 1:
            return None
        since = time.strftime("%H:%M", time.localtime(link.since_unix))
        return Slowed(times=link.times, because=f"takes {link.times:.1f} times as long as it measured since {since}")

    def times(self, device: str) -> float:
        link = self._links.get(device)
        return link.times if link is not None else 1.0

    def more_s(self, device: str) -> float:
        """What a crossing of a board's link takes beyond what it was measured to take: on each way that it is part of,
        however long the rest of that is."""
        link = self._links.get(device)
        return (link.times - 1) * link.crossing_s if link is not None else 0.0

    def between_s(self, one: str, other: str) -> float:
        """The same of a way that crosses the links of both."""
        return self.more_s(one) + self.more_s(other)

    @property
    def slow(self) -> Mapping[str, float]:
        return {device: link.times for device, link in self._links.items() if link.times > 1}
