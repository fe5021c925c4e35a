"""Whether a worker hangs: it has stopped to report, and it does not compute either. Pure.

Workers report each second, between two steps. A long step (a chunk of a prompt on a slow board) keeps them from it, but
not from using the processor; one that was stopped, or waits for something that never comes, does neither. While it
loads, it says little, may wait for a slow disk and build an engine for an hour: there the lack of processor time counts
alone, and only when it is long.
"""

from __future__ import annotations

from math import inf
from typing import Final

HANGING_AFTER_S: Final = 5.0
"""Without a word and without processor time. A card or a full swap may hold up a process for seconds."""

LOADING_HANGS_AFTER_S: Final = 120.0
"""Without a word and without processor time, before it was ready. Reading from a disk takes some."""

MUTE_AFTER_S: Final = 300.0
"""Without a word, however busy: no step takes so long."""

LEAST_PROCESSOR_S: Final = 0.05
"""Less than this is no step; the kernel counts in hundredths of a second."""

LOOK_PERIOD_S: Final = 1.0


class Sign:
    """The last signs of life of one worker. An emulated slow board (`speed` below 1) sleeps within its steps."""

    def __init__(self, now_s: float, speed: float = 1.0, *, loading: bool = False) -> None:
        self.loading = loading
        self._hanging_after_s = (LOADING_HANGS_AFTER_S if loading else HANGING_AFTER_S) / min(1.0, speed)
        self._mute_after_s = inf if loading else MUTE_AFTER_S
        self._processor_s = 0.0
        self._heard_s = self._alive_s = now_s

    def heard(self, now_s: float) -> None:
        """It has said something."""
        self._heard_s = self._alive_s = now_s

    def used(self, processor_s: float, now_s: float) -> None:
        """It has used so much processor time in all."""
        if processor_s - self._processor_s >= LEAST_PROCESSOR_S:
            self._processor_s = processor_s
            self._alive_s = now_s

    def problem(self, now_s: float) -> str:
        """Why it is taken for hanging; '' if it is not."""
        if now_s - self._alive_s > self._hanging_after_s:
            return f"it hung: no word and no processor time for {now_s - self._alive_s:.0f} s"
        if now_s - self._heard_s > self._mute_after_s:
            return f"it hung: no word for {now_s - self._heard_s:.0f} s"
        return ""
