"""The best placement for what is asked: each objective as the search that finds it. Pure."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Final

import numpy as np

from coordinator.planning.aims import BUSY_SHARE
from coordinator.planning.filled import NEARLY
from coordinator.planning.mixed import Idle, Mix, Worst, solve_mixed
from coordinator.planning.moving import moving_s
from coordinator.planning.ordered import solve_any
from coordinator.planning.partition import (
    EXACT_DEVICES,
    Floats,
    Placement,
    Problem,
    Solution,
    fullest_share,
    latency_s,
    pace_s,
    slowest_s,
)  # fmt: skip
from coordinator.planning.plan import Objective
from coordinator.planning.request import Priced
from coordinator.planning.uncertainty import figure_error_s
from wire.units import seconds_text

WORTH_SAYING: Final = 1e-3
"""A gap below which a search is called exact: a tenth of a per cent."""

SIMPLE: Final[tuple[Objective, ...]] = ("latency", "throughput", "memory")


def solve(priced: Priced) -> Solution | None:
    """The best placement for the request, or None if there is none. What is loaded stays where that is as good, by
    objectives that count seconds per token."""
    request = priced.request
    found = _solve(priced, priced.problem)
    if found is None or not request.held or request.objective not in ("latency", "throughput"):
        return found
    moving = priced.problem.slower(moving_s(priced.graph, priced.costs, request.held))
    staying = _solve(priced, moving)
    if staying is None or staying.placement == found.placement:
        return found
    value = value_of(priced, staying.placement, request.objective)
    if request.tokens_per_s is not None:
        value = latency_s(priced.problem, staying.placement)
    stays = f"what is loaded stays: without the time to move it {seconds_text(found.value)} per token would be possible"
    return replace(
        found,
        placement=staying.placement,
        latency_s=latency_s(priced.problem, staying.placement),
        slowest_s=slowest_s(priced.problem, staying.placement),
        pace_s=pace_s(priced.problem, staying.placement),
        value=value,
        because=f"{found.because}; {stays}" if found.because else stays,
    )


def _solve(priced: Priced, problem: Problem) -> Solution | None:
    request = priced.request
    least, most = request.boards_at_least, request.boards_at_most
    if request.tokens_per_s is not None:
        return carrying(problem, BUSY_SHARE / request.tokens_per_s, least, most)
    if request.objective in SIMPLE:
        return solve_any(problem, request.objective, least, most)
    if not problem.devices:
        return None
    if request.objective == "weighted":
        return _weighted(priced)
    return _solved(priced, _mix(priced, request.objective))


def carrying(problem: Problem, pace: float, least: int, most: int | None) -> Solution | None:
    """The least latency at which a full pipeline makes a step in so many seconds."""
    within = problem.within(pace)
    found = solve_any(within, "latency", least, most)
    if found is None or found.pace_s <= pace:
        return found
    # With more stages there are more groups under way, and each may be later.
    counts = range(least, min(len(problem.devices), problem.modules, most or problem.modules) + 1)
    each = [solve_any(problem.within(pace, count), "latency", count, count) for count in counts]
    each.append(solve_any(problem, "throughput", least, most))
    enough = [found for found in each if found is not None and found.pace_s <= pace]
    return min(enough, key=lambda found: found.latency_s, default=None)


def fewest_of_equals(priced: Priced, best: Solution) -> Solution:
    """The solution over the fewest boards whose interval overlaps that of the best one, if it is nearly as good: what
    profiles can't tell apart shall not change a plan. Where the search was not exact the best one found stays."""
    request = priced.request
    if request.objective not in ("latency", "throughput") or request.tokens_per_s is not None:
        return best
    error_s = figure_error_s(priced, best)
    if error_s <= 0 or len(priced.costs) > EXACT_DEVICES:
        return best
    most_s = best.value * (1 + NEARLY)
    for count in sorted(best.best_by_stages):
        if not request.boards_at_least <= count < len(best.placement) or best.best_by_stages[count] > most_s:
            continue
        fewer = solve_any(priced.problem, request.objective, request.boards_at_least, count)
        if fewer is not None and fewer.value <= best.value + error_s + figure_error_s(priced, fewer):
            equal = f"{len(best.placement)} boards would be faster by less than profiles tell apart"
            return replace(fewer, because=f"{fewer.because}; {equal}" if fewer.because else equal)
    return best


def value_of(priced: Priced, placement: Placement, objective: Objective) -> float:
    """What a placement comes to, by the measure of an objective that is not weighted; infinite where it can't be."""
    problem = priced.problem
    if objective == "latency":
        return latency_s(problem, placement)
    if objective == "throughput":
        return pace_s(problem, placement)
    if objective == "memory":
        return fullest_share(problem, placement)
    return _mix(priced, objective).cost(placement)


def token_j(priced: Priced, placement: Placement) -> float | None:
    """Joules per token of one stream, what boards of the plan take while they wait included; None where the power of
    one of them was not measured. What the network's own devices take is not in it."""
    powers = [priced.costs[run.device].power for run in placement]
    round_s = latency_s(priced.problem, placement)
    joules = 0.0
    for run, power in zip(placement, powers, strict=True):
        if power is None:
            return None
        busy_s = priced.costs[run.device].stage_s(priced.modules(run))
        joules += max(power.active_w, power.idle_w) * busy_s + power.idle_w * (round_s - busy_s)
    return joules


def _mix(priced: Priced, objective: Objective) -> Mix:
    """One objective as a mix, in its own unit."""
    problem = priced.problem
    if objective == "ttft":
        prefill = priced.prefill_problem
        chunks = max(1, ceil(priced.prompt_tokens / priced.request.prefill_chunk_tokens))
        stage = prefill.stage_s()
        return Mix(stage, prefill.hop_s, (Worst(chunks - 1.0, stage, prefill.transfer_s),) if chunks > 1 else ())
    stage = problem.stage_s()
    nowhere = np.where(np.isfinite(stage), 0.0, np.inf)
    if objective == "energy":
        watts = [(cost.power.active_w, cost.power.idle_w) if cost.power else (np.inf, np.inf) for cost in priced.costs]
        active_w, idle_w = np.array(watts, dtype=np.float64).reshape(-1, 2).T
        # A board that waits takes its idle power all the time, and the rest while it computes.
        more_w = np.maximum(0.0, active_w - idle_w)[:, None, None]
        busy_j = np.where(np.isfinite(stage), more_w * np.where(np.isfinite(stage), stage, 0.0), np.inf)
        no_hop = np.where(np.isfinite(problem.hop_s), 0.0, np.inf)
        return Mix(busy_j, no_hop, (), Idle(idle_w, stage, problem.hop_s))
    if objective == "latency":
        return Mix(stage, problem.hop_s)
    reached = np.where(np.isfinite(problem.hop_s), 0.0, np.inf)
    if objective == "throughput":
        return Mix(nowhere, reached, (Worst(1.0, stage, problem.transfer_s),))
    share = np.zeros_like(stage) if problem.share is None else problem.share
    return Mix(nowhere, reached, (Worst(1.0, share + nowhere, reached),))


def _solved(priced: Priced, mix: Mix, known: tuple[Placement, ...] = ()) -> Solution | None:
    request, problem = priced.request, priced.problem
    if len(problem.devices) > EXACT_DEVICES:
        # Not to be worse than the plans for other objectives.
        others = [solve_any(problem, one, request.boards_at_least, request.boards_at_most) for one in SIMPLE]
        known = (*known, *(found.placement for found in others if found is not None))
    found = solve_mixed(mix, request.boards_at_least, request.boards_at_most, known)
    if found is None or not np.isfinite(found.cost):
        return None
    gap = found.cost / max(found.bound, 1e-300) - 1
    because = ""
    if gap > WORTH_SAYING:
        because = f"not every placement was looked at: it is at most {gap:.1%} above a bound that no plan can undercut"
    return Solution(
        placement=found.placement,
        latency_s=latency_s(problem, found.placement),
        slowest_s=slowest_s(problem, found.placement),
        pace_s=pace_s(problem, found.placement),
        value=found.cost,
        best_by_stages={len(found.placement): found.cost},
        because=because,
    )


def _weighted(priced: Priced) -> Solution | None:
    """A sum of objectives, each as a multiple of the best there is for it alone; memory as the share that it is.

    The best is that of all these boards, whatever is pinned and however many may take part: so the cost of a placement
    is the same whoever asks, and plans can be compared by it.
    """
    unbound = priced.unbound()
    stage, hop = _zeros(priced.problem)
    worst: list[Worst] = []
    idle: Idle | None = None
    because = ""
    for name, weight in sorted(priced.request.weights.items()):
        mix = _mix(priced, name)  # type: ignore[arg-type]
        best = _alone(unbound, name)  # type: ignore[arg-type]
        if best is None:
            return None
        because = because or best.because
        factor = weight if name == "memory" else weight / max(best.value, 1e-300)
        stage, hop = stage + factor * mix.stage, hop + factor * mix.hop
        worst += [Worst(factor * part.weight, part.stage, part.hop) for part in mix.worst]
        if mix.idle is not None:
            idle = Idle(factor * mix.idle.watts, mix.idle.stage_s, mix.idle.hop_s)
    solution = _solved(priced, Mix(stage, hop, tuple(worst), idle))
    return solution and replace(solution, because=solution.because or because)


def _alone(priced: Priced, objective: Objective) -> Solution | None:
    request = priced.request
    if objective in SIMPLE:
        return solve_any(priced.problem, objective, request.boards_at_least, request.boards_at_most)
    return _solved(priced, _mix(priced, objective))


def _zeros(problem: Problem) -> tuple[Floats, Floats]:
    return np.zeros(problem.fits.shape), np.zeros(problem.hop_s.shape)
