"""Cut a chain over many devices: dynamic programming along a fixed order of the devices.

With the used set given up, a table over (number of stages, last device, modules placed) is enough, and 256 devices are
no trouble. What is lost: the ring visits devices in the order given. Three orders are tried (fastest first, slowest
first, roomiest first), the way back is added at the end, and the best eight devices found are then searched exactly.
The result says how far it can be from the optimum at most, by a bound that ignores memory and order.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from coordinator.planning import partition
from coordinator.planning.partition import EXACT_DEVICES, TIE, Costs, Floats, Found, Placement, Problem, Run, Solution
from coordinator.planning.plan import Objective

Indices = npt.NDArray[np.int64]


def solve_any(problem: Problem, objective: Objective, at_least: int = 1, at_most: int | None = None) -> Solution | None:
    """Give the best placement: exact up to EXACT_DEVICES devices, along fixed orders above; None if there is none."""
    if len(problem.devices) <= EXACT_DEVICES:
        return partition.solve(problem, objective, at_least, at_most)
    speed = np.argsort(problem.seconds.sum(axis=1), kind="stable")
    room = np.argsort(-problem.fits.sum(axis=(1, 2)), kind="stable")
    best: Solution | None = None
    for order in (speed, speed[::-1], room):
        chosen = [int(d) for d in order]
        best = _better(objective, best, _solve_in_order(problem, chosen, objective, at_least, at_most))
    used = [run.device for run in best.placement] if best else []
    rest = [int(d) for d in speed if int(d) not in used]
    exactly = ""
    if best and len(used) <= EXACT_DEVICES:
        exactly = f" and the best {EXACT_DEVICES} searched exactly"
        chosen = sorted([*used, *rest[: EXACT_DEVICES - len(used)]])
        refined = partition.solve(problem.only(chosen), objective, at_least, at_most)
        best = _better(objective, best, refined and _renamed(refined, chosen))
    if best is None:
        return None
    value = best.latency_s if objective == "latency" else best.slowest_s
    gap = value / max(lower_bound(problem, objective, at_least), 1e-12) - 1
    return replace(
        best,
        because=f"{len(problem.devices)} devices are too many to try every set: they were taken in three orders"
        f"{exactly}; at most {gap:.0%} above a bound that ignores memory",
    )


def lower_bound(problem: Problem, objective: Objective, at_least: int) -> float:
    """Seconds that no placement can undercut, memory and order ignored.

    Latency: each module on its fastest device, the least overhead per stage and the cheapest hop per stage.
    Throughput: a module's least time, and all devices working without pause: with w the least time of each module,
    a device d needs at least r_d w for it, so the whole takes at least sum(w) / sum(1 / r_d).
    """
    least = problem.seconds.min(axis=0)
    if objective == "latency":
        off_diagonal = ~np.eye(len(problem.devices), dtype=bool)
        hop = problem.hop_s[:, :, 1:][off_diagonal].min() if at_least > 1 else 0.0
        return float(least.sum() + at_least * (problem.overhead_s.min() + hop))
    counted = least > 0
    if not counted.any():
        return float(problem.overhead_s.min())
    ratios = (problem.seconds[:, counted] / least[counted]).min(axis=1)
    return float(max(least.max() + problem.overhead_s.min(), least.sum() / (1 / ratios).sum()))


def _better(objective: Objective, one: Solution | None, other: Solution | None) -> Solution | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda solution: _rank(objective, solution))


def _rank(objective: Objective, solution: Solution) -> tuple[float, int, float]:
    value = solution.latency_s if objective == "latency" else solution.slowest_s
    return value, len(solution.placement), solution.latency_s


def _renamed(solution: Solution, chosen: list[int]) -> Solution:
    """The solution of a smaller problem in the device numbers of the whole one."""
    placement = tuple(run._replace(device=chosen[run.device]) for run in solution.placement)
    return replace(solution, placement=placement)


def _solve_in_order(
    problem: Problem, order: list[int], objective: Objective, at_least: int, at_most: int | None
) -> Solution | None:
    solution = partition.solve(problem.only(order), objective, at_least, at_most, search=along)
    return solution and _renamed(solution, order)


def along(costs: Costs) -> Found:
    """Search the placements that visit the devices in their order."""
    devices, length = costs.stage.shape[0], costs.stage.shape[1] - 1
    stages = min(costs.at_most, devices, length)
    # value[k, d, j]: modules 0..j-1 in k + 1 stages, the last on d; came from device, from module.
    value = np.full((stages, devices, length + 1), np.inf)
    device = np.zeros((stages, devices, length + 1), dtype=np.int64)
    module = np.zeros((stages, devices, length + 1), dtype=np.int64)
    for d in range(devices):
        value[0, d] = costs.stage[d, 0]
        for k in range(1, min(stages, d + 1)):
            arrived = costs.join(value[k - 1, :d], costs.hop[:d, d])
            source = arrived.argmin(axis=0)
            total = costs.join(arrived.min(axis=0)[:, None], costs.stage[d])
            start = total.argmin(axis=0)
            value[k, d] = total.min(axis=0)
            device[k, d] = source[start]
            module[k, d] = start
    return _OrderedFound(costs, value, device, module)


class _OrderedFound:
    """Tables of one pass along an order."""

    def __init__(self, costs: Costs, value: Floats, device: Indices, module: Indices) -> None:
        self._costs, self._value, self._device, self._module = costs, value, device, module
        self._ends: dict[int, tuple[float, Placement]] = {}
        for k in range(value.shape[0]):
            rings = [self._ring(k, int(d)) for d in np.flatnonzero(np.isfinite(value[k, :, -1]))]
            finite = [ring for ring in rings if np.isfinite(ring[0])]
            if finite:
                least = min(total for total, _ in finite)
                self._ends[k + 1] = next(ring for ring in finite if ring[0] <= least * (1 + TIE))

    @property
    def best_by_stages(self) -> dict[int, float]:
        return {stages: total for stages, (total, _) in self._ends.items()}

    def trace(self, stages: int) -> Placement:
        return self._ends[stages][1]

    def _ring(self, k: int, last: int) -> tuple[float, Placement]:
        """The best chain of k + 1 stages that ends on `last`, and its cost with the way back."""
        runs: list[Run] = []
        end, d = self._value.shape[2] - 1, last
        for level in range(k, -1, -1):
            start = int(self._module[level, d, end]) if level else 0
            runs.append(Run(d, start, end))
            if level:
                d, end = int(self._device[level, d, end]), start
        total = self._value[k, last, -1]
        if k:
            total = self._costs.join(total, self._costs.hop[last, runs[-1].device, -1])
        return float(total), tuple(reversed(runs))
