"""How sure a prediction is, from the spread of what it was made of. Pure.

Every median of samples has a 95 % interval (hwprofiles.stats), and so have what a block and a step take (hwprofiles.
measure). What is wrong with one measurement is wrong with all that is priced by it: n equal blocks on a board are n
times as uncertain as one. Measurements are independent of each other, so that they add by their squares.

What a profile does not say is not in it: other work on a board, heat, what links do at other times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import hypot

from coordinator.planning.cost import DeviceCost
from coordinator.planning.partition import TIE, Placement, Solution, hops
from coordinator.planning.request import Priced
from models.graph import Module


def stage_error_s(cost: DeviceCost, modules: Iterable[Module]) -> float:
    """Half the interval of what a stage of these modules takes for one token."""
    counts = Counter(module.profile_key for module in modules)
    parts = (count * cost.decode_error_s.get(key, 0.0) for key, count in counts.items())
    return hypot(cost.overhead_error_s, *parts)


def token_error_s(priced: Priced, placement: Placement) -> float:
    """Half the interval of a token's time once round the ring."""
    parts = [stage_error_s(priced.costs[run.device], priced.modules(run)) for run in placement]
    if hops(priced.problem, placement):  # each link is crossed twice
        links = (priced.costs[run.device].link for run in placement)
        parts += [2 * link.error_s for link in links if link is not None]
    return hypot(*parts)


def slowest_error_s(priced: Priced, solution: Solution) -> float:
    """Half the interval of the slowest part: of the stage that it is; 0 where it is a link, whose rate has none."""
    bound = solution.slowest_s * (1 - TIE)
    filled = priced.problem.filled(len(solution.placement))
    taken_s = [filled.run_s(run) for run in solution.placement]
    # A step of several rows is as uncertain as one of a single row, by the share of what it takes.
    errors = [
        stage_error_s(priced.costs[run.device], priced.modules(run)) * stage_s / max(priced.problem.run_s(run), 1e-12)
        for run, stage_s in zip(solution.placement, taken_s, strict=True)
        if stage_s >= bound
    ]
    busy = any(priced.problem.transfer_s[hop] >= bound for hop in hops(priced.problem, solution.placement))
    return 0.0 if busy else max(errors, default=0.0)


def figure_error_s(priced: Priced, solution: Solution) -> float:
    """Of what the plan is made for, where that is seconds per token."""
    error_s = token_error_s(priced, solution.placement)
    if priced.request.objective == "throughput" and priced.request.tokens_per_s is None:
        if solution.pace_s <= solution.slowest_s * (1 + TIE):
            return slowest_error_s(priced, solution)
        return error_s / priced.problem.groups(len(solution.placement))
    return error_s
