"""Pretends to be a slower processor: each step takes 1/speed of its time, the rest is slept.

What is stretched is processor time where one thread computes: a step that waited for a core which other programs held
was not slower for our sake, and virtual boards that share a machine must not slow each other twice. With several
threads wall time is stretched, since their processor times overlap.

Processor time itself grows, by two thirds or so, while a neighbour computes on the same core's other thread or empties
its caches; on boards of their own it would not. So a step is not charged more than what others of its kind took lately
when they took little (`FREE_SHARE`), as long as that explains the difference.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable
from typing import Final

from agent.workers.clock import REAL, Clocks

SHORTEST_SLEEP_S: Final = 150e-6
"""The kernel wakes a sleeper some 60 us late: shorter rests are waited out awake."""

REMEMBERED: Final = 64
"""So many steps of a kind are looked back on: a processor that really gets slower is believed within as many steps."""

FREE_SHARE: Final = 0.05
"""Of the steps of a kind, those that nobody is thought to have disturbed: a few are, also between busy neighbours."""

MOST_DISTURBED: Final = 2.0
"""Times as long may a step take for its neighbours' sake; what is beyond is its own."""

MAX_KINDS: Final = 1024

CONTEXT_STEP: Final = 64
"""Rows of context within which steps count as one kind."""


class Stretch:
    """Wrap each step in `begin` and `end`; `speed` 1.0 measures and sleeps nothing."""

    def __init__(
        self, speed: float, threads: int, clocks: Clocks = REAL, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._speed = speed
        self._stretched = speed < 1.0
        self._factor = 1.0 / speed
        self._by_processor = threads == 1
        self._wall_s = clocks.wall_s
        self._processor_s = clocks.processor_s
        self._sleep = sleep
        self._began_wall_s = 0.0
        self._began_processor_s = 0.0
        self._owed_s = 0.0
        self._undisturbed = Undisturbed()

    def throttle(self, share: float) -> None:
        """Have this share of the speed from the next step on."""
        self._stretched = self._speed * share < 1.0
        self._factor = 1.0 / (self._speed * share)

    def begin(self) -> None:
        if self._stretched and self._by_processor:
            self._began_processor_s = self._processor_s()
        self._began_wall_s = self._wall_s()

    def end(self, kind: str = "", rows: int = 0, context: int = 0) -> float:
        """Sleep what a slower processor would still compute, and give the seconds that the step took in all.

        Steps of one `kind` over as many `rows` behind about as many of `context` are taken to need the same time.
        """
        wall_s = self._wall_s() - self._began_wall_s
        if not self._stretched:
            return wall_s
        busy_s = self._processor_s() - self._began_processor_s if self._by_processor else wall_s
        if kind:
            busy_s = self._undisturbed.seconds(kind, rows, context, busy_s)
        target_s = max(wall_s, busy_s * self._factor) + self._owed_s
        rest_s = target_s - wall_s
        if rest_s > SHORTEST_SLEEP_S:
            self._sleep(rest_s)
        else:
            while self._wall_s() - self._began_wall_s < target_s:
                pass
        elapsed_s = self._wall_s() - self._began_wall_s
        # Never owe more than one scheduler tick: a suspended machine must not be paid back by racing steps.
        self._owed_s = min(0.01, max(-0.01, target_s - elapsed_s))
        return elapsed_s


class OnPaper:
    """Times steps as `Stretch` does, of a board as fast as this machine, and sleeps nothing: a measuring worker times
    the machine, and stretches what it found (agent.workers.emulated)."""

    def __init__(self, threads: int, clocks: Clocks = REAL) -> None:
        self._clock = clocks.processor_s if threads == 1 else clocks.wall_s
        self._undisturbed = Undisturbed()
        self._began_s = 0.0

    def begin(self) -> None:
        self._began_s = self._clock()

    def end(self, kind: str, rows: int, context: int = 0) -> float:
        """Seconds that the step took, or would have taken without neighbours."""
        return self._undisturbed.seconds(kind, rows, context, self._clock() - self._began_s)


class Undisturbed:
    """What steps would have taken without neighbours."""

    def __init__(self) -> None:
        self._lately: dict[tuple[str, int, int], _Lately] = {}

    def seconds(self, kind: str, rows: int, context: int, busy_s: float) -> float:
        """Of a step that took `busy_s`."""
        key = (kind, rows, context // CONTEXT_STEP)
        lately = self._lately.get(key)
        if lately is None:
            if len(self._lately) >= MAX_KINDS:
                self._lately.clear()
            lately = self._lately[key] = _Lately()
        free_s = lately.with_(busy_s)
        return min(busy_s, max(free_s, busy_s / MOST_DISTURBED))


class _Lately:
    """Processor times of the latest steps of one kind."""

    __slots__ = ("_in_turn", "_sorted")

    def __init__(self) -> None:
        self._in_turn: deque[float] = deque()
        self._sorted: list[float] = []

    def with_(self, busy_s: float) -> float:
        """Remember one more; give the time of those that were free."""
        if len(self._in_turn) == REMEMBERED:
            self._sorted.remove(self._in_turn.popleft())
        self._in_turn.append(busy_s)
        insort(self._sorted, busy_s)
        return self._sorted[int((len(self._sorted) - 1) * FREE_SHARE)]
