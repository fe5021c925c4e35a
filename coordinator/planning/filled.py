"""The placement with which a pipeline that is filled by few requests gives most. Pure.

n requests go round in g = min(n, stages) groups. A stage makes one step of a group's n / g rows, each of which takes so
much of it (Problem.filled); over a hop they go in one message. So the n tokens of a round take as long as the slowest
part takes for n of them, or else as the ring takes for n / g rows; per token:

    pace = max(slowest part, sum of stages / g + sum of hops / n)

The search for the slowest part knows nothing of the ring. So the programme for sums is asked several times, as for
mixed costs (coordinator.planning.mixed): with so many stages, and no part slower than so much, what is the least time
round the ring? That says whether a pace can be reached; the best is found by halving. Where devices are too many for
that, a few limits are tried.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from coordinator.planning import partition
from coordinator.planning.partition import (
    TIE,
    Costs,
    Floats,
    Placement,
    Problem,
    Search,
    Solution,
    exact,
    latency_s,
    pace_s,
    slowest_s,
)
from coordinator.planning.plan import Objective

CLOSE: Final = 1e-3
"""Relative difference that is not looked for: profiles are no sharper."""

NEARLY: Final = 0.10
"""A plan over fewer stages that is worse by this share at most is wanted, too: profiles may not tell the two apart."""

MOST_SEARCHES: Final = 24
FEWEST_SEARCHES: Final = 4
LIMITS_OF_MANY: Final = 5
"""Tried where devices are too many for an exact search."""

STEPS: Final = 150_000_000
"""Of dynamic programming in all: about a quarter of a second."""


def solve(
    problem: Problem,
    objective: Objective,
    at_least: int = 1,
    at_most: int | None = None,
    search: Search | None = None,
    known: Placement = (),
) -> Solution | None:
    """As partition.solve, with the pace for throughput where the number of requests is known. `known`: a placement
    that keeps all limits; what is better than that is looked for."""
    if is_alone(problem, objective):
        return paced(partition.solve(problem, "latency", at_least, at_most, search))
    plain = partition.solve(problem, objective, at_least, at_most, search)
    if plain is None or objective != "throughput" or problem.streams is None:
        return plain
    filled = _Filled(problem, at_least, at_most, search or exact, plain)
    if known:
        filled.offer(known)
    return filled.tried() if search is not None else filled.halved()


def is_alone(problem: Problem, objective: Objective) -> bool:
    """Whether the pace is that of one request, which is never in two places: its token is soonest by latency."""
    return objective == "throughput" and problem.streams == 1


def paced(by_latency: Solution | None) -> Solution | None:
    """The same, judged by its pace."""
    return by_latency and replace(by_latency, value=by_latency.pace_s)


class _Filled:
    """For each number of stages: the best placement that was seen, and a pace that none can undercut."""

    def __init__(self, problem: Problem, at_least: int, at_most: int | None, find: Search, plain: Solution) -> None:
        self._problem, self._find, self._plain, self._at_least = problem, find, plain, at_least
        self._most = most = min(len(problem.devices), problem.modules, at_most or len(problem.devices))
        self._stages: dict[int, Floats] = {}
        self._seen: dict[int, tuple[float, Placement]] = {}
        self._least = {count: least for count, least in plain.best_by_stages.items() if at_least <= count <= most}
        self._new = set(self._least)
        """Numbers of stages of which nothing was asked yet."""
        self.offer(plain.placement)

    def halved(self) -> Solution:
        """By an exact search."""
        for _ in range(self._searches()):
            question = self._next()
            if question is None:
                break
            self._ask(*question)
        # Over fewer stages one as good, or nearly, may not have been asked for.
        for pace in (self._found * (1 + CLOSE), self._found * (1 + NEARLY)):
            for count in [
                count for count, least in self._least.items() if least <= pace and count < self._best_count()
            ]:
                if count not in self._seen or self._seen[count][0] > pace:
                    self._ask(count, pace)
        return self._best()

    def tried(self) -> Solution:
        """By a search that finds something good for each number of stages that it finds."""
        stage = self._stage_s(self._problem.streams or 1)
        for limit in np.geomspace(max(self._plain.slowest_s, 1e-12), self._found, LIMITS_OF_MANY):
            hop = np.where(self._problem.transfer_s <= limit, self._problem.hop_s, np.inf)
            found = self._find(Costs(np.where(stage <= limit, stage, np.inf), hop, np.add, self._most))
            for count, ring_s in found.best_by_stages.items():
                # A bound on its pace: hops count as much as compute where there are as many groups as requests.
                if self._at_least <= count <= self._most and ring_s / (self._problem.streams or 1) < self._found:
                    self.offer(found.trace(count))
        return self._best()

    @property
    def _found(self) -> float:
        return min(value for value, _ in self._seen.values())

    def _best_count(self) -> int:
        return min(count for count, (value, _) in self._seen.items() if value <= self._found * (1 + CLOSE))

    def _best(self) -> Solution:
        count = self._best_count()
        value, placement = self._seen[count]
        return replace(
            self._plain,
            placement=placement,
            latency_s=latency_s(self._problem, placement),
            slowest_s=slowest_s(self._problem, placement),
            pace_s=value,
            value=value,
            best_by_stages={count: value for count, (value, _) in sorted(self._seen.items())},
        )

    def _searches(self) -> int:
        devices, length = len(self._problem.devices), self._problem.modules + 1
        return int(np.clip(STEPS / (2.0**devices * devices**2 * length**2), FEWEST_SEARCHES, MOST_SEARCHES))

    def _next(self) -> tuple[int, float] | None:
        """Of which number of stages to ask next, and which pace; None where nothing better is left. What is asked first
        of each number has no limit."""
        found = self._found
        hopeful = {count: least for count, least in self._least.items() if least < found * (1 - CLOSE)}
        if not hopeful:
            return None
        count = min(hopeful, key=lambda count: (hopeful[count], count))
        if count in self._new:
            self._new.remove(count)
            return count, np.inf
        return count, (hopeful[count] + found) / 2

    def _ask(self, count: int, pace: float) -> None:
        """What `count` stages take at least for a token of each group, with no part slower than `pace`."""
        problem, stage_s = self._problem, self._stage_s(count)
        groups, streams = problem.groups(count), problem.streams or 1
        stage = np.where(stage_s <= pace, stage_s / groups, np.inf)
        hop = np.where(problem.transfer_s <= pace, problem.hop_s / streams, np.inf)
        found = self._find(Costs(stage, hop, np.add, count))
        shared = found.best_by_stages.get(count, np.inf)
        # What has a part above `pace` is slower than that.
        self._least[count] = max(self._least[count], min(shared, pace))
        if shared < np.inf:
            self.offer(found.trace(count))

    def _stage_s(self, count: int) -> Floats:
        """Seconds per token of stages where there are so many."""
        groups = self._problem.groups(count)
        if groups not in self._stages:
            self._stages[groups] = self._problem.filled(groups).stage_s()
        return self._stages[groups]

    def offer(self, placement: Placement) -> None:
        """Take a placement that was found."""
        value, count = pace_s(self._problem, placement), len(placement)
        if np.isfinite(value) and (count not in self._seen or value < self._seen[count][0] * (1 - TIE)):
            self._seen[count] = (value, placement)
