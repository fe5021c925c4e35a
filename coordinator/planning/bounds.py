"""What no placement can undercut: what a heuristic's result is held against. Pure.

Three relaxations, and the largest of their values counts; each keeps a part of what is asked for.

    slots      every device offers as many places as modules fit on it; the fastest places take the heaviest modules.
               Keeps the room of each device, forgets which modules stand side by side
    walk       dynamic programme over (cut, device) that may come back to a device: keeps memory, links and order,
               forgets that a device has its memory once
    pipeline   for the slowest part only: within so many seconds each device holds so many modules at most, and all
               must be held
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from coordinator.planning.partition import TIE, Costs, Floats, Problem, costs_of
from coordinator.planning.plan import Objective

MOST_KINDS: Final = 16
"""Weights of modules that are told apart in a bound: a language model has three."""


def lower_bound(problem: Problem, objective: Objective, at_least: int = 1) -> float:
    """What of an objective no placement with `at_least` stages can undercut; infinite if there can be none."""
    least = walk(costs_of(problem, objective, len(problem.devices)))
    if objective == "latency":
        return max(least, _slots_s(problem, at_least))
    if objective != "throughput":
        return least
    return max(least, _pipeline_s(problem.filled(1)) if problem.streams is None else _filled_s(problem, at_least))


def _filled_s(problem: Problem, at_least: int) -> float:
    """For so many requests (coordinator.planning.filled): over the numbers of stages, the least of what the slowest
    part and the ring leave a token of a full pipeline."""
    fewest, streams = least_stages(problem, at_least), problem.streams or 1
    if fewest is None:
        return np.inf
    least = np.inf
    for count in range(fewest, min(len(problem.devices), problem.modules) + 1):
        groups, filled = problem.groups(count), problem.filled(count)
        shared = _slots_s(replace(filled, hop_s=filled.hop_s * groups / streams), count) / groups
        if shared < least:
            least = min(least, max(shared, _pipeline_s(filled, count)))
        elif count >= streams:
            break  # more stages mean more hops, and no more groups
    return least


def places(problem: Problem) -> np.ndarray:
    """[N] the longest run of modules that each device may hold."""
    first, end = np.indices(problem.fits.shape[1:])
    longest: np.ndarray = np.where(problem.fits, end - first, 0).max(axis=(1, 2))
    return longest


def least_stages(problem: Problem, at_least: int = 1) -> int | None:
    """The fewest devices that have places for all modules; None if all together have not."""
    offered = np.cumsum(np.sort(places(problem))[::-1])
    enough = np.flatnonzero(offered >= problem.modules)
    return max(at_least, int(enough[0]) + 1) if enough.size else None


def _slots_s(problem: Problem, at_least: int) -> float:
    """All modules, in the fastest places; the least overhead and the swiftest hop of each stage that there must be."""
    stages = least_stages(problem, at_least)
    if stages is None:
        return np.inf
    least, ratios = _ratios(problem)
    slots = np.sort(np.repeat(ratios, np.minimum(places(problem), problem.modules)))[: problem.modules]
    overhead_s = np.sort(problem.overhead_s)[:stages].sum()
    hops_s = stages * _least_between(problem.hop_s[:, :, 1:]) if stages > 1 else 0.0
    return float((np.sort(least)[::-1] * slots).sum() + overhead_s + hops_s)


def _pipeline_s(problem: Problem, at_most: int | None = None) -> float:
    """The least seconds within which so many devices hold all modules: found by halving, and the lower end is given."""
    devices = at_most or len(problem.devices)
    least, ratios = _ratios(problem)
    room = places(problem)
    if _largest(room, devices) < problem.modules:
        return np.inf
    kinds = np.unique(least)
    kinds = kinds[:: max(1, kinds.size // MOST_KINDS)]
    # Of the modules that weigh at least so much, what the lightest 0, 1, 2 .. take together.
    heavier = [np.concatenate([[0.0], np.cumsum(np.sort(least[least >= kind]))]) for kind in kinds]

    def enough(seconds: float) -> bool:
        free = np.maximum(0.0, seconds - problem.overhead_s) / ratios * (1 + TIE)
        for sums in heavier:
            held = np.minimum(np.searchsorted(sums, free, side="right") - 1, room)
            used = np.where(held > 0, free, 0.0)
            if _largest(held, devices) < sums.size - 1 or _largest(used, devices) < sums[-1]:
                return False
        return True

    low = high = float((problem.seconds + problem.overhead_s[:, None]).min(axis=0).max())
    if enough(low):
        return low
    while not enough(high) and high < np.inf:
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low


def _largest(values: np.ndarray, count: int) -> float:
    """The sum of so many of them."""
    return float(np.sort(values)[-count:].sum())


def _ratios(problem: Problem) -> tuple[Floats, Floats]:
    """[L] a module's least time, and [N] r such that device d takes at least r_d of it for every module."""
    least = problem.seconds.min(axis=0)
    counted = least > 0
    if not counted.any():
        return least, np.ones(len(problem.devices))
    return least, (problem.seconds[:, counted] / least[counted]).min(axis=1)


def walk(costs: Costs) -> float:
    """The cheapest chain of runs that may come back to a device, with the cheapest way back if it has a hop."""
    devices, length = costs.stage.shape[0], costs.stage.shape[1] - 1
    alone = float(costs.stage[:, 0, length].min())
    if devices == 1:
        return alone
    # reached[d, j]: modules 0..j-1 are placed, the last of them on d; split: at least one hop was taken.
    reached = costs.stage[:, 0, :].copy()
    split = np.full_like(reached, np.inf)
    other = np.where(np.eye(devices, dtype=bool)[:, :, None], np.inf, costs.hop)
    for i in range(1, length):
        before = np.minimum(reached[:, i], split[:, i])
        arrived = costs.join(before[:, None], other[:, :, i]).min(axis=0)
        split = np.minimum(split, costs.join(arrived[:, None], costs.stage[:, i, :]))
    back = float(other[:, :, length].min())
    return min(alone, float(costs.join(split[:, length].min(), np.float64(back))))


def _least_between(hop: Floats) -> float:
    off_diagonal = ~np.eye(hop.shape[0], dtype=bool)
    return float(hop[off_diagonal].min()) if hop.shape[0] > 1 else np.inf
