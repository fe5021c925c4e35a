"""Notes when a step was made over every eighth row of an answer, so that hops can be seen without a byte more on them.

All stages note the same rows. What passes from the end of one stage's step to the begin of the next one's is the hop
between them and the distance of two boards' clocks; coordinator.laps makes something of it.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final

from agent.workers.requests import Unit
from wire.messages import StepMark

EVERY: Final = 8
"""Rows from one mark to the next."""

KEPT: Final = 16
"""Reports come each second: enough to see a lap of each answer there is, and some hundred bytes."""

MAX_OPEN: Final = 64
REQUEST_BITS: Final = 0xFFFFFFFF

clock = time.monotonic
"""One for all steps of a worker."""


class Marks:
    """Of one stage. `first`: tokens come back to it."""

    def __init__(self, first: bool) -> None:
        self._first = first
        self._done: deque[StepMark] = deque(maxlen=KEPT)
        self._open: OrderedDict[int, StepMark] = OrderedDict()

    @property
    def recent(self) -> tuple[StepMark, ...]:
        return tuple(self._done)

    def ran(self, units: Sequence[Unit], busy_s: float, ended_s: float) -> None:
        """A step over rows of answers took so long until then; its units have not moved on yet."""
        began_s = ended_s - busy_s
        for unit in units:
            request, row = unit.live.request & REQUEST_BITS, unit.live.run
            waiting = self._open.pop(request, None) if self._open else None
            if waiting is not None and row > waiting.row:
                back_s = round(began_s, 6)
                mark = StepMark(waiting.request, waiting.row, waiting.began_s, waiting.ended_s, back_s)
                self._done.append(mark)
            if row % EVERY:
                continue
            mark = StepMark(request, row, round(max(0.0, began_s), 6), round(ended_s, 6))
            if self._first:
                self._open[request] = mark
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
            else:
                self._done.append(mark)

    def forget(self) -> None:
        """Another epoch, or a lost connection: what was begun does not come back."""
        self._open.clear()
        self._done.clear()
