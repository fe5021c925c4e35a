"""Work goes first: a board that runs stages is measured in the pauses between its requests, as far as there are any.

Whoever waits for a plan is not kept waiting for ever: after a while the board is measured whatever it does, and what
others took of the processor meanwhile makes the report INVALID (hwprofiles.spoiled).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from hwprofiles.probe.busy import Others
from hwprofiles.spoiled import OTHERS_SHARE

WATCH_S: Final = 0.25
"""How long the processor is watched before it is called free: a token of a slow ring takes so long."""
PATIENCE_S: Final = 20.0
"""In all, of one job."""


class Polite:
    """Call it before each point; it returns when nothing else computes, or when patience is over."""

    def __init__(
        self,
        active: bool,
        others: Others | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._left_s = PATIENCE_S if active else 0.0
        self._others = others or Others()
        self._clock, self._sleep = clock, sleep

    def __call__(self) -> None:
        while self._left_s > 0:
            began_s = self._clock()
            self._others.restart()
            self._sleep(WATCH_S)
            share = self._others.share()
            if share is None or share <= OTHERS_SHARE:
                return
            self._left_s -= self._clock() - began_s
