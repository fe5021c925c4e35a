"""Cut a chain over many devices: bounded searches, the best of their results, and how far from the best it can be.

Along a fixed order of the devices a table over (number of stages, last device, modules placed) is enough, and 256
devices are no trouble. What is lost: the ring visits devices in the order given. Three orders are tried (fastest first,
slowest first, roomiest first), the way back is added at the end. Beside them goes a search without an order
(coordinator.planning.labels), and the best eight devices found are then searched exactly. The result says how far it
can be from the optimum at most (coordinator.planning.bounds).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from coordinator.planning import filled, partition
from coordinator.planning.bounds import lower_bound
from coordinator.planning.labels import labelled
from coordinator.planning.partition import (
    AT_ONCE,
    EXACT_DEVICES,
    TIE,
    Costs,
    Floats,
    Found,
    Placement,
    Problem,
    Run,
    Solution,
)
from coordinator.planning.plan import Objective

Indices = npt.NDArray[np.int64]


def solve_any(problem: Problem, objective: Objective, at_least: int = 1, at_most: int | None = None) -> Solution | None:
    """Give the best placement: exact up to EXACT_DEVICES devices, along fixed orders above; None if there is none."""
    if len(problem.devices) <= EXACT_DEVICES:
        return filled.solve(problem, objective, at_least, at_most)
    if filled.is_alone(problem, objective):
        return filled.paced(solve_any(problem, "latency", at_least, at_most))
    speed = np.argsort(problem.seconds.sum(axis=1), kind="stable")
    room = np.argsort(-problem.fits.sum(axis=(1, 2)), kind="stable")
    best = filled.solve(problem, objective, at_least, at_most, search=labelled)
    for order in (speed, speed[::-1], room):
        chosen = [int(d) for d in order]
        best = _better(best, _solve_in_order(problem, chosen, objective, at_least, at_most))
    used = [run.device for run in best.placement] if best else []
    if objective == "throughput" and problem.streams is not None:
        # Few requests fill few boards: those for which a share and a hop are soon done.
        speed = np.argsort(_share_s(problem), kind="stable")
        used = used if len(used) <= EXACT_DEVICES else []
    rest = [int(d) for d in speed if int(d) not in used]
    exactly = ""
    if best and len(used) <= EXACT_DEVICES:
        exactly = f" and the best {EXACT_DEVICES} searched exactly"
        chosen = sorted([*used, *rest[: EXACT_DEVICES - len(used)]])
        known = tuple(run._replace(device=chosen.index(run.device)) for run in best.placement)
        refined = filled.solve(problem.only(chosen), objective, at_least, at_most, known=known)
        best = _better(best, refined and _renamed(refined, chosen))
    if best is None:
        return None
    gap = max(0.0, best.value / max(lower_bound(problem, objective, at_least), 1e-12) - 1)
    return replace(
        best,
        because=f"{len(problem.devices)} devices are too many to try every set: they were taken in three orders and "
        f"without one{exactly}; at most {gap:.0%} above a bound that no plan can undercut",
    )


def _share_s(problem: Problem) -> Floats:
    """[N] what each device would take for an equal share on EXACT_DEVICES, with a hop there and one back to another."""
    others = np.where(np.eye(len(problem.devices), dtype=bool)[:, :, None], np.inf, problem.hop_s[:, :, 1:])
    hop_s = np.median(others.min(axis=2), axis=1)
    taken: Floats = problem.seconds.sum(axis=1) / EXACT_DEVICES + problem.overhead_s + 2 * hop_s
    return taken


def _better(one: Solution | None, other: Solution | None) -> Solution | None:
    if one is None or other is None:
        return one or other
    return min(one, other, key=lambda found: (found.value, len(found.placement), found.latency_s))


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
    # value[k, d, j]: modules 0..j-1 in k + 1 stages, from `first` to d; came from device, from module.
    value = np.full((stages, devices, length + 1), np.inf)
    device = np.zeros((stages, devices, length + 1), dtype=np.int64)
    module = np.zeros((stages, devices, length + 1), dtype=np.int64)
    first = np.zeros((stages, devices, length + 1), dtype=np.int64)
    onto = np.ascontiguousarray(costs.stage.transpose(0, 2, 1))  # what is compared lies side by side
    at_once = max(1, AT_ONCE // (length + 1) ** 2)
    for d in range(devices):
        value[0, d], first[0, d] = costs.stage[d, 0], d
        for low in range(1, min(stages, d + 1), at_once):
            high = min(low + at_once, stages, d + 1)
            arrived = costs.join(value[low - 1 : high - 1, :d], costs.hop[None, :d, d])
            source = arrived.argmin(axis=1)
            total = costs.join(arrived.min(axis=1)[:, None, :], onto[d])
            start = total.argmin(axis=2)
            value[low:high, d] = np.take_along_axis(total, start[..., None], axis=2)[..., 0]
            device[low:high, d], module[low:high, d] = np.take_along_axis(source, start, axis=1), start
            levels = np.arange(low - 1, high - 1)[:, None]
            first[low:high, d] = first[levels, device[low:high, d], start]
    rings = value[:, :, -1].copy()
    rings[0] = costs.join(rings[0], costs.hop[np.arange(devices), np.arange(devices), length])
    rings[1:] = costs.join(rings[1:], costs.hop[np.arange(devices)[None, :], first[1:, :, -1], length])
    return _OrderedFound(rings, device, module)


class _OrderedFound:
    """Tables of one pass along an order, and the cost [k, d] of the best ring of k + 1 stages that ends on d."""

    def __init__(self, rings: Floats, device: Indices, module: Indices) -> None:
        self._rings, self._device, self._module = rings, device, module

    @property
    def best_by_stages(self) -> dict[int, float]:
        least = self._rings.min(axis=1)
        return {int(k) + 1: float(least[k]) for k in np.flatnonzero(np.isfinite(least))}

    def trace(self, stages: int) -> Placement:
        rings = self._rings[stages - 1]
        d = int(np.flatnonzero(rings <= rings.min() * (1 + TIE))[0])
        runs: list[Run] = []
        end = self._device.shape[2] - 1
        for level in range(stages - 1, -1, -1):
            start = int(self._module[level, d, end]) if level else 0
            runs.append(Run(d, start, end))
            if level:
                d, end = int(self._device[level, d, end]), start
        return tuple(reversed(runs))
