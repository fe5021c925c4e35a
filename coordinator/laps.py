"""What lies between the steps of a ring's stages, from the marks that they send with their counters. Pure.

    gap i = begin of the step at stage i + 1, by its clock, less the end of the step at stage i, by its own

which is the hop from i to i + 1 and the distance of the two clocks; the last gap leads from the head to the first
stage. Clocks drift apart by some tens of microseconds in a second at most, so within seconds a gap changes as its hop
does. Round the ring the distances cancel: the sum of a lap's gaps is what its hops take together, exactly.

Where several answers run at once, rows wait in front of the slowest stage, and gaps hold that: such laps say nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from coordinator.planning.plan import Plan
from wire.messages import StageCounters, StepMark

WINDOW_S: Final = 1.5
LEAST_LAPS: Final = 4
"""A window is at least so long and has at least so many laps: one that waited for something else is no hop."""

SHARE: Final = 0.25
"""Of a window's gaps the first quartile stands for all: what waits in queues and for processors is longer, and a link
that became slow is slow for every message."""

MAX_OPEN: Final = 512
LONGEST_HOP_S: Final = 60.0
"""A sum beyond this is none: a board was started again, or says anything."""

Gaps = tuple[float, ...]


class Laps:
    """The laps of one deployment in one epoch."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._open: OrderedDict[tuple[int, int], dict[int, StepMark]] = OrderedDict()
        self._seen: dict[int, StepMark] = {}
        """The last mark of each stage: reports repeat what stands in the one before."""
        self._laps: list[Gaps] = []
        self._began_s: float | None = None

    def saw(self, stage: int, marks: Sequence[StepMark], now_s: float, live: int = 1) -> Gaps | None:
        """Take a report of a stage that holds `live` answers; the gaps of the window that ends with it, if one does."""
        if not 0 <= stage < self._stages:
            return None
        if live > 1:
            self.drop()
            self._seen[stage] = marks[-1] if marks else StepMark(0, 0, 0.0, 0.0)
            return None
        for mark in _after(marks, self._seen.get(stage)):
            self._join(stage, mark)
        if marks:
            self._seen[stage] = marks[-1]
        if self._began_s is None or not self._laps:
            self._began_s = now_s  # a window begins when laps come
        if len(self._laps) < LEAST_LAPS or now_s - self._began_s < WINDOW_S:
            return None
        gaps = tuple(_quartile([lap[hop] for lap in self._laps]) for hop in range(self._stages))
        self._laps.clear()
        self._began_s = now_s
        return gaps

    def drop(self) -> None:
        """What was seen until now belongs to no window."""
        self._open.clear()
        self._laps.clear()

    def _join(self, stage: int, mark: StepMark) -> None:
        key = (mark.request, mark.row)
        lap = self._open.setdefault(key, {})
        lap[stage] = mark
        if len(lap) == self._stages:
            del self._open[key]
            gaps = _gaps([lap[number] for number in range(self._stages)])
            if gaps is not None:
                self._laps.append(gaps)
        elif len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)


def _gaps(marks: Sequence[StepMark]) -> Gaps | None:
    if marks[0].back_s <= 0:
        return None
    begins = [*(mark.began_s for mark in marks[1:]), marks[0].back_s]
    gaps = tuple(began_s - mark.ended_s for began_s, mark in zip(begins, marks, strict=True))
    return gaps if 0 < sum(gaps) < LONGEST_HOP_S else None


def _after(marks: Sequence[StepMark], last: StepMark | None) -> Sequence[StepMark]:
    """Those that came after one that was seen; all if it is not among them."""
    return marks[marks.index(last) + 1 :] if last is not None and last in marks else marks


def _quartile(values: list[float]) -> float:
    return sorted(values)[int(SHARE * (len(values) - 1))]


def laps_of(plan: Plan) -> Laps | None:
    """Where there are hops to watch."""
    return Laps(len(plan.stages)) if len(plan.stages) > 1 else None


def of_plan(plan: Plan, device: str, counters: StageCounters) -> bool:
    """Whether these are of a stage of a plan in force, on the device that it names."""
    if (counters.deployment, counters.epoch) != (plan.deployment, plan.epoch):
        return False
    return any((stage.stage, stage.device) == (counters.stage, device) for stage in plan.stages)
