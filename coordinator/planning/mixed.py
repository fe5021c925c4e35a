"""Objectives that are sums of unlike parts, over a chain and its devices. Pure.

    cost(placement) = sum over stages and hops of what each adds
                    + sum over k of weight_k * the worst stage or hop of part k
                    + idle watts of all devices used * seconds once round the ring

The first token of a prompt is such a cost (all stages once, and the slowest again for every further chunk), energy is
one, and so is a weighted sum of objectives. The dynamic programme of coordinator.planning.partition minimises sums
alone, so it is asked several times, in boxes: with no part worse than an upper end, and with the idle watts of the used
set between two ends. In a box no cost is below its sum plus the lower ends; a box that can't hold anything better is
dropped, others are halved where the two differ most. It ends when nothing better is left by TOLERANCE, or after so many
searches as take about a second; then the cost is known to be so far above the best at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np

from coordinator.planning.bounds import walk
from coordinator.planning.labels import labelled
from coordinator.planning.ordered import along
from coordinator.planning.partition import EXACT_DEVICES, TIE, Costs, Flags, Floats, Found, Placement, exact

TOLERANCE: Final = 1e-5
"""Relative difference that is not looked for: no profile is as sharp."""

STEPS: Final = 600_000_000
"""Of dynamic programming in all: about a second."""

FEWEST_SEARCHES: Final = 12
MOST_SEARCHES: Final = 400
RESTARTS: Final = 2
SEARCHES_OF_MANY: Final = 8
"""Where devices are too many for an exact search."""


class Worst(NamedTuple):
    """A part of which the worst counts: `stage` [N, L + 1, L + 1], `hop` [N, N, L + 1]."""

    weight: float
    stage: Floats
    hop: Floats


class Idle(NamedTuple):
    """`watts` [N] of each device used, for all the seconds once round the ring."""

    watts: Floats
    stage_s: Floats
    hop_s: Floats


@dataclass(frozen=True, eq=False)
class Mix:
    """`stage` is infinite where a device may not hold a run."""

    stage: Floats
    hop: Floats
    worst: tuple[Worst, ...] = ()
    idle: Idle | None = None

    @property
    def devices(self) -> int:
        return int(self.stage.shape[0])

    @property
    def modules(self) -> int:
        return int(self.stage.shape[1]) - 1

    def only(self, chosen: list[int]) -> Mix:
        """With these devices alone."""
        pairs = np.ix_(chosen, chosen)
        idle = self.idle
        return Mix(
            stage=self.stage[chosen],
            hop=self.hop[pairs],
            worst=tuple(Worst(part.weight, part.stage[chosen], part.hop[pairs]) for part in self.worst),
            idle=idle and Idle(idle.watts[chosen], idle.stage_s[chosen], idle.hop_s[pairs]),
        )

    def cost(self, placement: Placement) -> float:
        total = _sum(self.stage, self.hop, placement)
        for part in self.worst:
            total += part.weight * max(_values(part.stage, part.hop, placement))
        return total + self.idle_w(placement) * self.round_s(placement)

    def idle_w(self, placement: Placement) -> float:
        return 0.0 if self.idle is None else sum(float(self.idle.watts[run.device]) for run in placement)

    def round_s(self, placement: Placement) -> float:
        return 0.0 if self.idle is None else _sum(self.idle.stage_s, self.idle.hop_s, placement)


class Mixed(NamedTuple):
    placement: Placement
    cost: float
    bound: float
    """No placement costs less."""


class _Box(NamedTuple):
    bound: float
    number: int
    """Of equal bounds the earlier box goes first."""
    placement: Placement
    """Has the least sum in the box."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    idle_low: float
    idle_high: float


def solve_mixed(
    mix: Mix, at_least: int = 1, at_most: int | None = None, known: Sequence[Placement] = ()
) -> Mixed | None:
    """The cheapest placement with `at_least` to `at_most` stages; None if there is none. `known`: some that are
    possible, which it will not be worse than."""
    most = min(mix.devices, mix.modules, at_most or mix.devices)
    if mix.devices <= EXACT_DEVICES:
        return _Search(mix, at_least, most, known).best()
    found = _Search(mix, at_least, most, known).best()
    if found is None:
        return None
    used = [run.device for run in found.placement]
    if len(used) < EXACT_DEVICES:
        cheap = np.argsort(mix.stage[:, range(mix.modules), range(1, mix.modules + 1)].sum(axis=1), kind="stable")
        chosen = sorted([*used, *[int(d) for d in cheap if int(d) not in used][: EXACT_DEVICES - len(used)]])
        refined = solve_mixed(mix.only(chosen), at_least, at_most)
        if refined is not None and refined.cost < found.cost * (1 - TIE):
            placement = tuple(run._replace(device=chosen[run.device]) for run in refined.placement)
            found = found._replace(placement=placement, cost=refined.cost)
    return found._replace(bound=min(found.cost, _bound_of_many(mix)))


def _bound_of_many(mix: Mix) -> float:
    """Each part at its own least."""
    stage, hop = mix.stage, mix.hop
    if mix.idle is not None:
        least_w = float(mix.idle.watts.min())
        stage, hop = stage + least_w * mix.idle.stage_s, hop + least_w * mix.idle.hop_s
    total = walk(Costs(stage, hop, np.add, mix.devices))
    return total + sum(p.weight * walk(Costs(p.stage, p.hop, np.maximum, mix.devices)) for p in mix.worst)


class _Search:
    def __init__(self, mix: Mix, at_least: int, most: int, known: Sequence[Placement]) -> None:
        self._mix, self._counts, self._most = mix, range(at_least, most + 1), most
        self._exact = mix.devices <= EXACT_DEVICES
        steps = 2.0**mix.devices * mix.devices**2 * (mix.modules + 1) ** 2
        self._left = (
            SEARCHES_OF_MANY if not self._exact else int(np.clip(STEPS / steps, FEWEST_SEARCHES, MOST_SEARCHES))
        )
        self._watts = _watts_of_sets(mix) if self._exact and mix.idle is not None else None
        self._boxes: list[_Box] = []
        self._number = 0
        self._found: tuple[Placement, float] | None = None
        for placement in known:
            if len(placement) in self._counts:
                self._offer(placement)

    def best(self) -> Mixed | None:
        mix = self._mix
        low = tuple(walk(Costs(part.stage, part.hop, np.maximum, mix.devices)) for part in mix.worst)
        everything = (np.inf,) * len(low)
        self._open(low, everything, *self._idle_ends())
        if mix.idle is not None and not self._exact:
            for _ in range(RESTARTS):  # the sum again with the watts of what was found
                if self._found is not None:
                    watts = mix.idle_w(self._found[0])
                    self._open(low, everything, watts, watts)
        bound = np.inf
        while self._boxes:
            box = heapq.heappop(self._boxes)
            assert self._found is not None  # each box offered one
            if box.bound >= self._found[1] * (1 - TOLERANCE):
                break
            if self._left <= 0 or not self._halve(box):
                bound = box.bound
                break
        if self._found is None:
            return None
        return Mixed(*self._found, bound=min(bound, self._found[1]))

    def _idle_ends(self) -> tuple[float, float]:
        if self._watts is not None:
            return float(self._watts[1:].min()), float(self._watts.max())
        least_w = 0.0 if self._mix.idle is None else float(self._mix.idle.watts.min())
        return least_w, least_w

    def _offer(self, placement: Placement) -> None:
        cost = self._mix.cost(placement)
        if np.isfinite(cost) and (self._found is None or cost < self._found[1] * (1 - TIE)):
            self._found = (placement, cost)

    def _open(self, low: tuple[float, ...], high: tuple[float, ...], idle_low: float, idle_high: float) -> None:
        """Solve a box by its sum alone."""
        mix = self._mix
        self._left -= 1
        stage, hop, allowed = mix.stage, mix.hop, None
        if mix.idle is not None:
            stage, hop = stage + idle_low * mix.idle.stage_s, hop + idle_low * mix.idle.hop_s
        if self._watts is not None:
            allowed = (self._watts >= idle_low) & (self._watts <= idle_high)
        for part, end in zip(mix.worst, high, strict=True):
            stage = np.where(part.stage <= end, stage, np.inf)
            hop = np.where(part.hop <= end, hop, np.inf)
        found = (_exactly if self._exact else _roughly)(stage, hop, self._most, allowed)
        values = {count: value for count, value in found.best_by_stages.items() if count in self._counts}
        if not values:
            return
        least = min(values.values())
        placement = found.trace(min(count for count, value in values.items() if value <= least * (1 + TIE)))
        self._offer(placement)
        self._push(least, placement, low, high, idle_low, idle_high)

    def _push(
        self,
        total: float,
        placement: Placement,
        low: tuple[float, ...],
        high: tuple[float, ...],
        idle_low: float,
        idle_high: float,
    ) -> None:
        bound = total + sum(part.weight * end for part, end in zip(self._mix.worst, low, strict=True))
        self._number += 1
        heapq.heappush(self._boxes, _Box(bound, self._number, placement, low, high, idle_low, idle_high))

    def _halve(self, box: _Box) -> bool:
        """Put two boxes in the place of one, cut where its bound is furthest from its placement's cost."""
        mix = self._mix
        reached = [max(_values(part.stage, part.hop, box.placement)) for part in mix.worst]
        apart = [part.weight * (value - low) for part, value, low in zip(mix.worst, reached, box.low, strict=True)]
        idle_w = mix.idle_w(box.placement)
        idle_apart = (idle_w - box.idle_low) * mix.round_s(box.placement) if self._watts is not None else 0.0
        if idle_apart > 0 and idle_apart >= max(apart, default=0.0):
            return self._halve_idle(box, idle_w)
        if not apart or max(apart) <= 0:
            return False
        k = int(np.argmax(apart))
        middle = (box.low[k] + reached[k]) / 2
        # Above the middle the same placement has the least sum.
        total = box.bound - sum(part.weight * end for part, end in zip(mix.worst, box.low, strict=True))
        above = (*box.low[:k], middle, *box.low[k + 1 :])
        below = (*box.high[:k], middle, *box.high[k + 1 :])
        self._push(total, box.placement, above, box.high, box.idle_low, box.idle_high)
        self._open(box.low, below, box.idle_low, box.idle_high)
        return True

    def _halve_idle(self, box: _Box, idle_w: float) -> bool:
        assert self._watts is not None
        inside = np.unique(self._watts[1:][(self._watts[1:] >= box.idle_low) & (self._watts[1:] <= box.idle_high)])
        middle = (box.idle_low + idle_w) / 2
        below, above = inside[inside <= middle], inside[inside > middle]
        if not above.size:
            return False
        if below.size:
            self._open(box.low, box.high, float(below[0]), float(below[-1]))
        self._open(box.low, box.high, float(above[0]), float(above[-1]))
        return True


def _exactly(stage: Floats, hop: Floats, most: int, allowed: Flags | None) -> Found:
    return exact(Costs(stage, hop, np.add, most, allowed))


def _roughly(stage: Floats, hop: Floats, most: int, _allowed: Flags | None) -> Found:
    costs = Costs(stage, hop, np.add, most)
    found = labelled(costs)
    return found if found.best_by_stages else along(costs)


def _watts_of_sets(mix: Mix) -> Floats:
    """[2**N] idle watts of each set of devices."""
    assert mix.idle is not None
    sets = np.arange(1 << mix.devices)
    bits = sets[:, None] >> np.arange(mix.devices)[None, :] & 1
    return np.round(bits @ mix.idle.watts, 9)


def _values(stage: Floats, hop: Floats, placement: Placement) -> list[float]:
    values = [float(stage[run]) for run in placement]
    values += [float(hop[run.device, after.device, run.end]) for run, after in pairwise(placement)]
    return [*values, float(hop[placement[-1].device, placement[0].device, -1])]


def _sum(stage: Floats, hop: Floats, placement: Placement) -> float:
    return sum(_values(stage, hop, placement))
