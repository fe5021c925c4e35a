"""How long the steps of a stage took, beside what its board's profile promises. Pure.

Compared is like with like. Counters are totals, so two reports of a stage bound a window of its decode steps. A step
over a long context takes longer than one over a short one: the promise is priced at the mean context of the window,
and as the price is linear in it, the mean is exact. A step of several rows takes longer than one of a single row, and
how much is not in a profile; but not longer than its rows one by one. So a window gives two ratios: by rows, below
which the board can't be, and by steps, above which it can't be. Steps of single rows give the same twice.

Prompts are left out: the cost of a chunk is not linear in its rows, and pieces of all sizes share one counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from coordinator.planning.cost import Workload, device_cost, stage_modules
from coordinator.planning.plan import LeftOut, Plan, PlannedStage
from hwprofiles.profile import Profile
from models.graph import Graph
from wire.messages import StageCounters, Telemetry

WINDOW_S: Final = 1.5
WINDOW_STEPS: Final = 16
"""A window is at least so long and has at least so many steps: one step that waited for something else is no pace.
Stages report each second, so windows are of two seconds, mostly."""

SHORTEST_STEP_S: Final = 1e-3
"""What is around a shorter step takes a good part of it: a stage that has next to nothing to do is not judged."""

LONGEST_WINDOW_S: Final = 60.0
"""A board that changed in the middle of a longer one would be seen as something in between."""


class Work(NamedTuple):
    """What a stage did in a window."""

    steps: int
    rows: int
    busy_s: float
    context_tokens: float
    """Mean rows in the cache before a row."""


class Ratio(NamedTuple):
    """Steps took at least and at most so many times as long as promised."""

    least: float
    most: float


class Stint:
    """The counters of one stage, cut into windows."""

    def __init__(self) -> None:
        self._first: StageCounters | None = None
        self._first_s = 0.0

    def saw(self, counters: StageCounters, now_s: float) -> Work | None:
        """Take a report; the window that ends with it, if one does."""
        first = self._first
        if first is None or _restarted(first, counters) or now_s - self._first_s > LONGEST_WINDOW_S:
            self._begin(counters, now_s)
            return None
        steps = counters.decode_steps - first.decode_steps
        if not steps:
            self._begin(counters, now_s)  # a window begins when work does
            return None
        if steps < WINDOW_STEPS or now_s - self._first_s < WINDOW_S:
            return None
        self._begin(counters, now_s)
        rows = counters.decode_rows_run - first.decode_rows_run
        context = counters.decode_context_tokens - first.decode_context_tokens
        return Work(steps, rows, counters.decode_busy_s - first.decode_busy_s, context / max(1, rows))

    def _begin(self, counters: StageCounters, now_s: float) -> None:
        self._first, self._first_s = counters, now_s


def _restarted(before: StageCounters, now: StageCounters) -> bool:
    """Whether these are another worker's counters, or another epoch's."""
    return (
        now.epoch != before.epoch
        or now.decode_steps < before.decode_steps
        or now.decode_rows_run < before.decode_rows_run
        or now.decode_busy_s < before.decode_busy_s
        or now.decode_context_tokens < before.decode_context_tokens
    )


class Stints:
    """All stages of all devices. A device on which two stages work at the same time slows itself, and is not judged."""

    def __init__(self) -> None:
        self._stints: dict[tuple[str, str, int], Stint] = {}
        self._worked: dict[str, dict[tuple[str, int], tuple[int, int]]] = {}

    def saw(
        self, device: str, telemetry: Telemetry, disturbed: bool, now_s: float
    ) -> Iterator[tuple[StageCounters, Work]]:
        """Windows that end with this report of a device. `disturbed`: it did something else too, measured itself."""
        totals = {
            (stage.deployment, stage.stage): (stage.decode_steps, stage.prefill_steps) for stage in telemetry.stages
        }
        before, self._worked[device] = self._worked.get(device, {}), totals
        working = [key for key, total in totals.items() if total != before.get(key, total)]
        here = [key for key in self._stints if key[0] == device]
        for key in here:
            if disturbed or len(working) > 1 or key[1:] not in totals:
                del self._stints[key]
        if disturbed or len(working) > 1:
            return
        for stage in telemetry.stages:
            stint = self._stints.setdefault((device, stage.deployment, stage.stage), Stint())
            work = stint.saw(stage, now_s)
            if work is not None:
                yield stage, work

    def forget(self, devices: Iterable[str]) -> None:
        """These devices are gone."""
        gone = set(devices)
        self._stints = {key: stint for key, stint in self._stints.items() if key[0] not in gone}
        self._worked = {device: totals for device, totals in self._worked.items() if device not in gone}


def promised_s(graph: Graph, plan: Plan, stage: PlannedStage, profile: Profile, context_tokens: float) -> float | None:
    """Seconds of one decode step of a stage over so many rows in its cache, by its board's profile; None if that does
    not say it."""
    workload = Workload(
        context_tokens=plan.context_tokens,
        slots=plan.slots,
        prefill_chunk_tokens=plan.prefill_chunk_tokens,
        expected_tokens=round(context_tokens),
        accept_unsteady=plan.limits.accept_unsteady,
        engine=stage.engine,
    )
    cost = device_cost(graph, stage.device, profile, 0, workload)
    return None if isinstance(cost, LeftOut) else cost.stage_s(stage_modules(graph, stage))


def ratio_of(work: Work, step_s: float | None) -> Ratio | None:
    """What a window says of a board whose profile promises `step_s`; None if it says nothing."""
    if step_s is None or step_s < SHORTEST_STEP_S or work.busy_s <= 0 or not 0 < work.steps <= work.rows:
        return None
    return Ratio(work.busy_s / (work.rows * step_s), work.busy_s / (work.steps * step_s))


def stage_of(plan: Plan, device: str, counters: StageCounters) -> PlannedStage | None:
    """The stage of a plan that a device's counters are of."""
    if (counters.deployment, counters.epoch) != (plan.deployment, plan.epoch):
        return None
    return next((s for s in plan.stages if (s.stage, s.device) == (counters.stage, device)), None)


def profiles_differ(one: Profile | None, other: Profile | None) -> bool:
    """Whether modules were measured anew."""
    return (one.modules if one is not None else ()) != (other.modules if other is not None else ())
