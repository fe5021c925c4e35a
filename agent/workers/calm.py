"""Waits for moments in which the processor is at its own speed. For virtual boards only.

On a machine that is itself a part of a larger one, neighbours that nobody here can see share the cores: the same matrix
product took 0.44 or 0.72 ms of processor time, and changed between the two several times a second. A virtual board's
profile says what it does undisturbed, as its stages are judged by their undisturbed steps (agent.workers.stretch).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from agent.workers.clock import REAL, Clocks

DISTURBED: Final = 1.2
"""Times as long as at best takes a probe on a processor that somebody shares."""

PERIOD_S: Final = 0.004
FIRST_LOOKS: Final = 25
"""So that one of them finds the processor free."""

STEP_PATIENCE_S: Final = 0.1
PATIENCE_S: Final = 1.0
"""For one step, and for all of a task: boards of one machine take turns, and others wait for this one."""

_SIDE: Final = 64
_TIMES: Final = 4


def _product() -> Callable[[], None]:
    """Some 50 us of what stages do most."""
    matrix = np.ones((_SIDE, _SIDE), np.float32)
    result = np.empty_like(matrix)

    def run() -> None:
        for _ in range(_TIMES):
            np.dot(matrix, matrix, out=result)

    return run


class Calm:
    """Call it before a step; it returns when the processor is free, or when patience is over."""

    def __init__(
        self,
        active: bool,
        clocks: Clocks = REAL,
        sleep: Callable[[float], None] = time.sleep,
        probe: Callable[[], None] | None = None,
    ) -> None:
        self._left_s = PATIENCE_S if active else 0.0
        self._clocks, self._sleep = clocks, sleep
        self._probe = probe or _product()
        self._best_s = float("inf")

    def __call__(self) -> None:
        if self._left_s <= 0:
            return
        began_s = self._clocks.wall_s()
        if self._best_s == float("inf"):
            for _ in range(FIRST_LOOKS):
                self._best_s = min(self._best_s, self._look_s())
                self._sleep(PERIOD_S)
        asked_s = self._clocks.wall_s()
        while not self._free() and self._clocks.wall_s() - asked_s < STEP_PATIENCE_S:
            self._sleep(PERIOD_S)
        self._left_s -= self._clocks.wall_s() - began_s

    def _free(self) -> bool:
        took_s = self._look_s()
        self._best_s = min(self._best_s, took_s)
        return took_s <= DISTURBED * self._best_s

    def _look_s(self) -> float:
        """Processor time of a probe: the better of two, since the first wakes the processor."""
        found = []
        for _ in range(2):
            began_s = self._clocks.processor_s()
            self._probe()
            found.append(self._clocks.processor_s() - began_s)
        return min(found)
