"""Cut a chain of modules over devices, optimally.

A placement gives each device at most one contiguous run of modules; devices may be left out. Three objectives (others
are made of them: coordinator.planning.mixed):

    latency      sum of all stages and hops once round the ring, the hop from the head back to the first stage included
    throughput   the slowest stage, or the busiest link: a full pipeline moves one token per so many seconds; where it
                 is filled by few requests, their share of the ring's time, if that is longer
                 (coordinator.planning.filled)
    memory       the fullest device, by the share of what it may give

Dynamic programme over suffixes of the chain: `best[used][d][f][i]` is the cheapest way to place modules i.. on exactly
the devices `used`, the first of them on d, when the ring began on f (the way back depends on it). Ties are broken by
fewer devices, then lower latency, then the lexicographic order of the assignment, so that plans are stable: the
throughput (or the fullest device) is found first, and among all placements that reach it the latency is minimised.

Above EXACT_DEVICES devices the used set is given up for fixed orders of the devices (`coordinator.planning.ordered`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from coordinator.planning.plan import Objective
from wire.errors import Refused

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

EXACT_DEVICES: Final = 8
"""2**8 used sets of 8 devices and 80 blocks take about half a second; each further device more than doubles it."""

AT_ONCE: Final = 1 << 16
"""Numbers that are compared at once: half a megabyte."""

TIE: Final = 1e-9
"""Relative difference below which two costs are equal: rounding of sums taken in different order."""


class Infeasible(Refused):
    """No placement keeps all limits; the text names what is missing."""


class Overloaded(Infeasible):
    """What keeps a plan from being is the load that is asked for."""


class BatchSteps(NamedTuple):
    """Seconds of modules [N, L], and of a step [N], where a step has one row of each of so many requests."""

    rows: int
    seconds: Floats
    overhead_s: Floats


def between(rows: float, batches: Sequence[int]) -> tuple[int, int, float]:
    """Among 1 and these numbers of rows, the two to take, by their places, and how far from one to the other `rows` is:
    beyond the last one further on the same line."""
    known = (1, *batches)
    high = next((place for place, count in enumerate(known) if place and count >= rows), len(known) - 1)
    return high - 1, high, (rows - known[high - 1]) / (known[high] - known[high - 1])


@dataclass(frozen=True, eq=False)
class Problem:
    """N devices, L modules. Cut i lies before module i; cut L is the way from the head back to the first stage.

    `seconds` [N, L] per module, `overhead_s` [N] per stage, `fits` [N, L + 1, L + 1] whether device d may hold modules
    i to j - 1, `hop_s` and `transfer_s` [N, N, L + 1] latency and occupancy from device to device at a cut; at the last
    one from a device to itself, too: 0 for tokens.
    """

    devices: tuple[str, ...]
    seconds: Floats
    overhead_s: Floats
    fits: Flags
    hop_s: Floats
    transfer_s: Floats
    share: Floats | None = None
    """[N, L + 1, L + 1] what modules i to j - 1 take of what device d may give; None where nobody asks for it."""
    streams: int | None = None
    """How many requests go round at once, in as many groups as there are stages at most; None: as many as it takes."""
    batches: tuple[BatchSteps, ...] = ()
    """Steps of several requests, by rising number of rows. None of them: each row takes what one alone does."""

    @property
    def modules(self) -> int:
        return int(self.seconds.shape[1])

    def stage_s(self) -> Floats:
        """[N, L + 1, L + 1] seconds of modules i to j - 1 on d; infinite where it may not hold them."""
        sums = np.concatenate([np.zeros((len(self.devices), 1)), np.cumsum(self.seconds, axis=1)], axis=1)
        stage = sums[:, None, :] - sums[:, :, None] + self.overhead_s[:, None, None]
        i, j = np.indices(stage.shape[1:])
        return np.where(self.fits & (j > i)[None], stage, np.inf)

    def run_s(self, run: Run) -> float:
        """Seconds of these modules on this device."""
        return float(self.overhead_s[run.device] + self.seconds[run.device, run.first : run.end].sum())

    def only(self, chosen: list[int]) -> Problem:
        """The same problem with these devices alone."""
        return Problem(
            devices=tuple(self.devices[d] for d in chosen),
            seconds=self.seconds[chosen],
            overhead_s=self.overhead_s[chosen],
            fits=self.fits[chosen],
            hop_s=self.hop_s[np.ix_(chosen, chosen)],
            transfer_s=self.transfer_s[np.ix_(chosen, chosen)],
            share=None if self.share is None else self.share[chosen],
            streams=self.streams,
            batches=tuple(
                BatchSteps(batch.rows, batch.seconds[chosen], batch.overhead_s[chosen]) for batch in self.batches
            ),
        )

    def groups(self, stages: int) -> int:
        """How many steps are under way at once in a full pipeline."""
        return stages if self.streams is None else max(1, min(stages, self.streams))

    def filled(self, stages: int) -> Problem:
        """The same problem with seconds per token of steps as a full pipeline over so many stages makes them: of all
        rows of a group. With fewer stages there are more rows in a group, and no token takes longer."""
        if not self.batches:
            return self
        rows = 1.0 if self.streams is None else self.streams / self.groups(stages)
        low, high, share = between(rows, tuple(batch.rows for batch in self.batches))
        steps = (BatchSteps(1, self.seconds, self.overhead_s), *self.batches)
        seconds = steps[low].seconds + share * (steps[high].seconds - steps[low].seconds)
        overhead_s = steps[low].overhead_s + share * (steps[high].overhead_s - steps[low].overhead_s)
        return replace(self, seconds=seconds / rows, overhead_s=overhead_s / rows, batches=())

    def slower(self, seconds: Floats, times: Floats | None = None) -> Problem:
        """The same problem where modules [N, L] take so many seconds more for each token, whatever the step, and before
        that boards [N] take so many times as long for everything."""
        by = np.ones(len(self.devices)) if times is None else times
        return replace(
            self,
            seconds=self.seconds * by[:, None] + seconds,
            overhead_s=self.overhead_s * by,
            batches=tuple(
                BatchSteps(batch.rows, batch.seconds * by[:, None] + batch.rows * seconds, batch.overhead_s * by)
                for batch in self.batches
            ),
        )

    def within(self, seconds: float, stages: int = 1) -> Problem:
        """The same problem without stages and hops that take longer for one token of a full pipeline over so many
        stages (or more: then some may be left that do)."""
        hop_s = np.where(self.transfer_s <= seconds, self.hop_s, np.inf)
        return replace(self, fits=self.fits & (self.filled(stages).stage_s() <= seconds), hop_s=hop_s)


class Run(NamedTuple):
    """Modules `first` to `end - 1` on the device with this index."""

    device: int
    first: int
    end: int


Placement = tuple[Run, ...]


@dataclass(frozen=True)
class Solution:
    placement: Placement
    latency_s: float
    slowest_s: float
    pace_s: float
    """From one token to the next of a full pipeline."""
    value: float
    """Of the objective."""
    best_by_stages: dict[int, float]
    """The least value of the objective with exactly so many stages, where it is possible at all."""
    because: str
    """How it was found, when that is not by exact search; else ''."""


@dataclass(frozen=True, eq=False)
class Costs:
    """What a search minimises: `stage` [N, L+1, L+1] and `hop` [N, N, L+1], joined by addition or by maximum."""

    stage: Floats
    hop: Floats
    join: Callable[..., Floats]
    at_most: int
    allowed: Flags | None = None
    """[2**N] which sets of devices may be used, by their bits; None: all. Kept by the exact search alone."""


class Found(Protocol):
    """The outcome of one search."""

    @property
    def best_by_stages(self) -> dict[int, float]:
        """Least cost for each possible number of stages."""

    def trace(self, stages: int) -> Placement:
        """A placement of that many stages with least cost; the first in lexicographic order."""


Search = Callable[[Costs], Found]


def latency_s(problem: Problem, placement: Placement) -> float:
    """Seconds once round the ring."""
    return sum(ring_s(problem, placement))


def ring_s(problem: Problem, placement: Placement) -> tuple[float, float]:
    """Seconds of all stages, and of all hops."""
    stages = sum(problem.run_s(run) for run in placement)
    return stages, sum(float(problem.hop_s[a, b, cut]) for a, b, cut in hops(problem, placement))


def slowest_s(problem: Problem, placement: Placement) -> float:
    """Seconds of the slowest stage or busiest link for a token of a full pipeline."""
    filled = problem.filled(len(placement))
    stages = max(filled.run_s(run) for run in placement)
    return max([stages, *(float(problem.transfer_s[a, b, cut]) for a, b, cut in hops(problem, placement))])


def pace_s(problem: Problem, placement: Placement) -> float:
    """Seconds from one token to the next of a full pipeline (coordinator.planning.filled)."""
    slowest = slowest_s(problem, placement)
    if problem.streams is None:
        return slowest
    stages_s, hops_s = ring_s(problem.filled(len(placement)), placement)
    return max(slowest, stages_s / problem.groups(len(placement)) + hops_s / problem.streams)


def fullest_share(problem: Problem, placement: Placement) -> float:
    """What the fullest device is given, as a share of what it may give."""
    return 0.0 if problem.share is None else max(float(problem.share[run]) for run in placement)


def value_of(problem: Problem, placement: Placement, objective: Objective) -> float:
    if objective == "latency":
        return latency_s(problem, placement)
    return pace_s(problem, placement) if objective == "throughput" else fullest_share(problem, placement)


def costs_of(problem: Problem, objective: Objective, at_most: int) -> Costs:
    """What is minimised for one of the three objectives."""
    # Of one token for what is a sum; where the slowest part counts, of the largest groups: more stages take no less.
    stage = (problem.filled(1) if objective == "throughput" else problem).stage_s()
    if objective == "latency":
        return Costs(stage, problem.hop_s, np.add, at_most)
    if objective == "throughput":
        return Costs(stage, problem.transfer_s, np.maximum, at_most)
    if objective != "memory" or problem.share is None:
        raise ValueError(f"{objective} is no objective of a partition")
    share = np.where(np.isfinite(stage), problem.share, np.inf)
    return Costs(share, np.where(np.isfinite(problem.hop_s), 0.0, np.inf), np.maximum, at_most)


def hops(problem: Problem, placement: Placement) -> list[tuple[int, int, int]]:
    """(sender, receiver, cut) round the ring. A single stage has none: its token never leaves the device; but an item
    comes to it, and its answer goes back."""
    if len(placement) == 1:
        alone = (placement[0].device, placement[0].device, problem.modules)
        return [alone] if problem.hop_s[alone] > 0 else []
    onward = [(run.device, after.device, run.end) for run, after in pairwise(placement)]
    return [*onward, (placement[-1].device, placement[0].device, problem.modules)]


def solve(
    problem: Problem, objective: Objective, at_least: int = 1, at_most: int | None = None, search: Search | None = None
) -> Solution | None:
    """Give the best placement with `at_least` to `at_most` stages, or None if there is none. For throughput the slowest
    part counts, whoever fills the pipeline."""
    if not problem.devices:
        return None
    stages = min(len(problem.devices), problem.modules, at_most or len(problem.devices))
    find = search or exact
    allowed = range(at_least, stages + 1)
    costs = costs_of(problem, objective, stages)
    found = find(costs)
    best_by_stages = found.best_by_stages
    within = {count: best_by_stages[count] for count in allowed if count in best_by_stages}
    if not within:
        return None
    bound = min(within.values()) * (1 + TIE)
    if objective != "latency":
        stage = np.where(costs.stage <= bound, problem.stage_s(), np.inf)
        swiftest = find(Costs(stage, np.where(costs.hop <= bound, problem.hop_s, np.inf), np.add, stages))
        # A search that closes its ring at the end may find a way back that is too busy, and so nothing at all.
        if any(count in swiftest.best_by_stages for count in allowed):
            found = swiftest
            within = {count: bound for count in allowed if count in found.best_by_stages}
    placement = found.trace(min(count for count, value in within.items() if value <= bound))
    return Solution(
        placement=placement,
        latency_s=latency_s(problem, placement),
        slowest_s=slowest_s(problem, placement),
        pace_s=pace_s(problem, placement),
        value=value_of(problem, placement, objective),
        best_by_stages=best_by_stages,
        because="",
    )


def exact(costs: Costs) -> Found:
    """Search all placements by dynamic programming over used sets: all sets of one size at once, in as many pieces as
    keep what is computed in the cache."""
    devices, length = costs.stage.shape[0], costs.stage.shape[1] - 1
    best: dict[int, Floats] = {}
    for d in range(devices):
        best[1 << d] = table = np.full((devices, devices, length + 1), np.inf)
        table[d] = costs.join(costs.stage[d][None, :, length], costs.hop[d, :, length][:, None])
        table[d, d, 0] = costs.join(costs.stage[d, 0, length], costs.hop[d, d, length])
    for count in range(2, min(costs.at_most, devices) + 1):
        sets = [used for used in range(1 << devices) if used.bit_count() == count]
        tables = np.full((len(sets), devices, devices, length + 1), np.inf)
        at_once = max(1, AT_ONCE // (max(1, devices - count) * (length + 1) ** 2))
        for d in range(devices):
            with_d = [number for number, used in enumerate(sets) if used >> d & 1]
            for start in range(0, len(with_d), at_once):
                part = with_d[start : start + at_once]
                _extend(costs, d, [sets[number] for number in part], best, np.array(part), tables)
        best.update(zip(sets, tables, strict=True))
    return _ExactFound(costs, best)


def _extend(costs: Costs, d: int, sets: list[int], best: dict[int, Floats], part: Indices, tables: Floats) -> None:
    """Put `d` in front of what is best over the rest of each of these sets, into their parts of `tables`."""
    devices = costs.stage.shape[0]
    rests = np.stack([best[used & ~(1 << d)] for used in sets])
    onward = costs.join(costs.hop[d][None, :, None, :], rests).min(axis=1)
    # The ring began on d itself, and is whole; or on a device that is still to come.
    tables[part, d, d, 0] = costs.join(costs.stage[d, 0][None, :], onward[:, d]).min(axis=1)
    others = np.array([[f for f in range(devices) if not used >> f & 1] for used in sets], dtype=np.int64)
    if not others.size:
        return
    from_others = np.ascontiguousarray(onward[np.arange(len(sets))[:, None], others].transpose(2, 0, 1))
    reached = costs.join(costs.stage[d].T[:, None, None, :], from_others[..., None]).min(axis=0)
    tables[part[:, None], d, others] = reached


class _ExactFound:
    """`best[used][d, f, i]`, read where f is not in `used`, or where f = d and i = 0 (the whole ring)."""

    def __init__(self, costs: Costs, best: dict[int, Floats]) -> None:
        self._costs = costs
        self._best = best
        self._whole = {
            (used, d): whole
            for used, table in best.items()
            if costs.allowed is None or costs.allowed[used]
            for d, whole in enumerate(np.einsum("ddi->di", table)[:, 0].tolist())
            if whole < np.inf
        }

    @property
    def best_by_stages(self) -> dict[int, float]:
        values: dict[int, float] = {}
        for (used, _), value in self._whole.items():
            count = used.bit_count()
            values[count] = min(value, values.get(count, np.inf))
        return values

    def trace(self, stages: int) -> Placement:
        bound = self.best_by_stages[stages] * (1 + TIE)
        tied = [key for key, value in self._whole.items() if key[0].bit_count() == stages and value <= bound]
        placements = [self._follow(used, first, bound) for used, first in tied]
        return min(placements, key=_assignment)

    def _follow(self, used: int, first: int, bound: float) -> Placement:
        """Walk down from the whole ring, at each step to the lexicographically first choice within `bound`."""
        costs, length = self._costs, self._costs.stage.shape[1] - 1
        runs: list[Run] = []
        device, start, spent = first, 0, 0.0
        while used & (used - 1):
            used &= ~(1 << device)
            step = costs.join(spent, costs.stage[device, start][None, :])
            total = costs.join(costs.join(step, costs.hop[device]), self._best[used][:, first, :])
            choices = [(int(e), int(j)) for e, j in np.argwhere(total <= bound)]
            # A lower device should take over early, a higher one late.
            lower = [(j, e) for e, j in choices if e < device]
            end, after = min(lower) if lower else min(((j, e) for e, j in choices), key=lambda c: (-c[0], c[1]))
            spent = float(costs.join(costs.join(spent, costs.stage[device, start, end]), costs.hop[device, after, end]))
            runs.append(Run(device, start, end))
            device, start = after, end
        return (*runs, Run(device, start, length))


def _assignment(placement: Placement) -> list[int]:
    return [run.device for run in placement for _ in range(run.first, run.end)]
