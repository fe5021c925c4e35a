"""How much of the processor everything else on the machine takes while this process works."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

_IDLE: Final = (3, 4)
"""Columns of /proc/stat: idle, and idle while a disk is waited for."""
_COUNTED: Final = 8
"""user, nice, system, idle, iowait, irq, softirq, steal: guest time is in user time already."""


class Ticks(NamedTuple):
    """Seconds of all processors together since the machine started."""

    busy_s: float
    all_s: float


def ticks(root: Path) -> Reading[Ticks] | Absent | Failed:
    return files.parsed(root, "proc/stat", _ticks)


def _ticks(text: str) -> Ticks:
    first = text.partition("\n")[0].split()
    if not first or first[0] != "cpu" or len(first) < 5:
        raise ValueError(text[: files.MAX_QUOTED])
    counted = [int(field) for field in first[1:][:_COUNTED]]
    second = os.sysconf("SC_CLK_TCK")
    idle = sum(counted[at] for at in _IDLE)
    return Ticks((sum(counted) - idle) / second, sum(counted) / second)


class Others:
    """Begins to watch when it is made."""

    def __init__(self, root: Path = Path("/"), own_s: Callable[[], float] = time.process_time) -> None:
        self._root, self._own_s = root, own_s
        self.restart()

    def restart(self) -> None:
        """Watch from now on."""
        self._before, self._own_before_s = ticks(self._root), self._own_s()

    def share(self) -> float | None:
        """Of all processors' time since the last restart; None if the kernel does not say, or no tick has passed."""
        now, own_s = ticks(self._root), self._own_s() - self._own_before_s
        if not isinstance(now, Reading) or not isinstance(self._before, Reading):
            return None
        passed_s = now.value.all_s - self._before.value.all_s
        if passed_s <= 0:
            return None
        others_s = now.value.busy_s - self._before.value.busy_s - own_s
        return min(1.0, max(0.0, others_s / passed_s))
