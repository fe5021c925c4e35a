"""Whether this machine was its own: the host of a virtual machine may give processors to others, sometimes for a
quarter of a second, and what is measured meanwhile says nothing of ours."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Generic, TypeVar

T = TypeVar("T")

QUIET: Final = 0.02
"""Share of the processors' time that others may have had while something was measured."""

TRIALS: Final = 3


def stolen_s() -> float:
    """Seconds of processors that the host gave to others since it started (proc_stat(5), steal)."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 else 0.0


class Watch:
    """Looks from when it was made."""

    def __init__(self, stolen: Callable[[], float] = stolen_s, clock: Callable[[], float] = time.monotonic) -> None:
        self._stolen, self._clock = stolen, clock
        self._began_s, self._before_s = clock(), stolen()

    def lost_share(self) -> float:
        """Of all processors' time until now, what others had."""
        passed_s = max(self._clock() - self._began_s, 1e-9)
        return (self._stolen() - self._before_s) / (passed_s * (os.cpu_count() or 1))


@dataclass(frozen=True)
class Quiet(Generic[T]):
    """What was measured, the share that others had of the machine meanwhile, and at which trial it was little enough.
    The last trial counts, quiet or not."""

    value: T
    lost_share: float
    trial: int


@dataclass(frozen=True)
class Watched(Generic[T]):
    """What was measured, and the share that others had of the machine meanwhile."""

    value: T
    lost_share: float


def watched(measure: Callable[[], T], watch: Callable[[], Watch] = Watch) -> Watched[T]:
    watching = watch()
    value = measure()
    return Watched(value, watching.lost_share())


def quieter_half(found: Sequence[Watched[T]]) -> list[Watched[T]]:
    """Those in which others had least of the machine, in the order in which they came: half of them, rounded up."""
    by_share = sorted(range(len(found)), key=lambda place: found[place].lost_share)
    return [found[place] for place in sorted(by_share[: (len(found) + 1) // 2])]


def quietly(measure: Callable[[], T], watch: Callable[[], Watch] = Watch) -> Quiet[T]:
    """Measure, and again where others had a part of the machine."""
    for trial in range(1, TRIALS + 1):
        watching = watch()
        value = measure()
        found = Quiet(value, watching.lost_share(), trial)
        if found.lost_share <= QUIET:
            break
    return found
