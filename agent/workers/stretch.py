"""Pretends to be a slower processor: each step takes 1/speed of its time, the rest is slept.

What is stretched is processor time where one thread computes: a step that waited for a core which other programs held
was not slower for our sake, and virtual boards that share a machine must not slow each other twice. With several
threads wall time is stretched, since their processor times overlap.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from agent.workers.clock import REAL, Clocks

SHORTEST_SLEEP_S: Final = 150e-6
"""The kernel wakes a sleeper some 60 us late: shorter rests are waited out awake."""


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

    def throttle(self, share: float) -> None:
        """Have this share of the speed from the next step on."""
        self._stretched = self._speed * share < 1.0
        self._factor = 1.0 / (self._speed * share)

    def begin(self) -> None:
        if self._stretched and self._by_processor:
            self._began_processor_s = self._processor_s()
        self._began_wall_s = self._wall_s()

    def end(self) -> float:
        """Sleep what a slower processor would still compute, and give the seconds that the step took in all."""
        wall_s = self._wall_s() - self._began_wall_s
        if not self._stretched:
            return wall_s
        busy_s = self._processor_s() - self._began_processor_s if self._by_processor else wall_s
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
