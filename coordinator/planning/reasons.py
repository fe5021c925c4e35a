"""Why a plan is as it is, in words that a person can check against the figures. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np

from coordinator.planning import partition
from coordinator.planning.aims import AIMS, BUSY_SHARE, WEIGHED, figure_text, value_text
from coordinator.planning.cost import DeviceCost, stage_memory
from coordinator.planning.ordered import solve_any
from coordinator.planning.partition import Run, Solution
from coordinator.planning.plan import LeftOut
from coordinator.planning.request import Priced
from coordinator.planning.solving import solve, value_of
from wire.units import bytes_text, seconds_text

MAX_WHAT_IF: Final = 8
"""Left-out devices for which "what if it took part" is solved; the rest get a comparison of speed."""

EQUAL: Final = 0.01
"""Speeds within 1 % are called equal: no profile is sharper than that."""


def block_s(priced: Priced, cost: DeviceCost) -> float:
    """Mean seconds of one block on a device."""
    blocks = [cost.decode_s[module.profile_key] for module in priced.graph.modules if module.kind == "block"]
    return sum(blocks) / len(blocks) if blocks else 0.0


def count_blocks(priced: Priced, first: int, end: int) -> int:
    return sum(1 for module in priced.graph.modules[first:end] if module.kind == "block")


def share_text(priced: Priced, run: Run) -> str:
    """'embedding, 10 of 30 blocks'."""
    kinds = [module.kind for module in priced.modules(run)]
    parts = ["embedding"] if "embedding" in kinds else []
    blocks = kinds.count("block")
    if blocks or len(kinds) == kinds.count("block"):
        parts.append(f"{blocks} of {priced.graph.blocks} blocks")
    parts += ["head"] if "head" in kinds else []
    return ", ".join(parts)


def stage_reason(priced: Priced, run: Run) -> str:
    """'pi4: 3 of 30 blocks: 4.1 times slower per block than orin; memory would allow 22 blocks'."""
    cost = priced.costs[run.device]
    fastest = min(priced.costs, key=lambda other: (block_s(priced, other), other.device))
    own_s, least_s = block_s(priced, cost), block_s(priced, fastest)
    if own_s <= least_s * (1 + EQUAL):
        speed = f"fastest per block ({seconds_text(own_s)})"
        if own_s > least_s:
            speed = f"as fast per block as {fastest.device} ({seconds_text(own_s)})"
    else:
        speed = f"{own_s / least_s:.1f} times slower per block than {fastest.device}"
    speed += f", {cost.slowed_because}" if cost.slowed_because else ""
    speed += f", {cost.engine_because}" if cost.engine_because else ""
    pinned = [module.name for module in priced.modules(run) if module.name in priced.request.pins]
    pins = f"; pinned here: {', '.join(pinned)}" if 0 < len(pinned) < len(priced.graph.modules) else ""
    return f"{cost.device}: {share_text(priced, run)}: {speed}; {_room_text(priced, run)}{pins}"


def _room_text(priced: Priced, run: Run) -> str:
    """How many blocks would fit if the stage grew, and what binds when it can't."""
    fits, length = priced.problem.fits[run.device], len(priced.graph.modules)
    if run.first == 0 and run.end == length:
        return "holds the whole model"
    if run.first == 0 or run.end < length:
        first, end = run.first, int(np.flatnonzero(fits[run.first]).max())
    else:
        first, end = int(np.flatnonzero(fits[:, length]).min()), length
    most = count_blocks(priced, first, end)
    if most > count_blocks(priced, run.first, run.end):
        return f"memory would allow {most} blocks"
    if count_blocks(priced, run.first, run.end) == priced.graph.blocks:
        return "holds all blocks"
    if (first, end) != (run.first, run.end):
        return f"memory would allow the {'head' if end > run.end else 'embedding'} too"
    cost = priced.costs[run.device]
    _, memory_bytes = stage_memory(priced.graph, priced.workload, cost, priced.modules(run))
    return f"memory is full ({bytes_text(memory_bytes)} of {bytes_text(cost.memory_limit_bytes)})"


def left_out_reasons(priced: Priced, solution: Solution) -> tuple[LeftOut, ...]:
    """Why each priced device without a stage has none."""
    used = {run.device for run in solution.placement}
    unused = [d for d in range(len(priced.costs)) if d not in used]
    by_speed = sorted(unused, key=lambda d: (block_s(priced, priced.costs[d]), d))
    asked = set(by_speed[:MAX_WHAT_IF]) if len(used) < partition.EXACT_DEVICES else set()
    return tuple(
        LeftOut(
            device=priced.costs[d].device,
            because=_unused_reason(priced, solution, d, what_if=d in asked) + _slowed_text(priced.costs[d]),
        )
        for d in unused
    )


def _slowed_text(cost: DeviceCost) -> str:
    return f"; it {cost.slowed_because}" if cost.slowed_because else ""


def _unused_reason(priced: Priced, solution: Solution, device: int, *, what_if: bool) -> str:
    cost, fits = priced.costs[device], priced.problem.fits[device]
    if not fits.any():
        if priced.request.pins:
            return "no module that is not pinned elsewhere fits into its memory"
        needed = min(stage_memory(priced.graph, priced.workload, cost, [module])[1] for module in priced.graph.modules)
        return f"no module fits: the smallest needs {bytes_text(needed)}, {_limit_text(cost)}"
    if cost.link is None:
        return f"{cost.link_because}; it could only hold the whole model"
    most = priced.request.boards_at_most
    if most is not None and len(solution.placement) >= most:
        return f"at most {most} boards were asked for, and the others are better"
    if what_if:
        chosen = sorted([run.device for run in solution.placement] + [device])
        both = solve(priced.only(chosen, len(chosen)))
        if both is None:
            return "no placement gives it a share besides the chosen boards"
        objective = priced.request.objective
        then, now = value_text(objective, both.value), value_text(objective, solution.value)
        if objective not in ("latency", "throughput"):
            return f"not needed: with it {then} {AIMS[objective].figure}, not {now}"
        if then == now:
            return f"not needed: with it a token would take as long, {then}"
        return f"not needed: with it a token would take {then}, not {now}"
    own_s = block_s(priced, cost)
    slowest_s = max(block_s(priced, priced.costs[run.device]) for run in solution.placement)
    return f"not needed: {seconds_text(own_s)} per block, the slowest chosen board takes {seconds_text(slowest_s)}"


def _limit_text(cost: DeviceCost) -> str:
    return f"stages may take {bytes_text(cost.memory_limit_bytes)} of {bytes_text(cost.usable_bytes)}"


def best_alone(priced: Priced, full: bool = False) -> tuple[DeviceCost, float] | None:
    """The fastest device that can hold the whole model (pins count), and its seconds per token: of one stream, or where
    all streams make their steps together."""
    problem = priced.problem.filled(1) if full else priced.problem
    whole = problem.stage_s()[:, 0, -1] if priced.costs else np.array([])
    if not np.isfinite(whole).any():
        return None
    best = int(np.argmin(whole))
    return priced.costs[best], float(whole[best])


def alone_text(priced: Priced, solution: Solution) -> str:
    """How the best single device compares; '' when none can hold the model."""
    alone = best_alone(priced)
    if alone is None:
        return ""
    cost, alone_s = alone
    text = f"{cost.device} alone: {seconds_text(alone_s)} per token"
    if len(solution.placement) == 1 and priced.costs[solution.placement[0].device] is cost:
        return f"{text}, which is this plan"
    this = f"this plan {seconds_text(solution.latency_s)}"
    if solution.latency_s < alone_s:
        return f"{text}; {this}"
    full = best_alone(priced, full=True)
    if priced.request.objective == "throughput" and full is not None and solution.pace_s < full[1]:
        return f"{text}; {this}, but one every {seconds_text(solution.pace_s)} when the pipeline is full"
    if len(solution.placement) == 1:
        return f"{text}; {this}"
    return f"{text}; {this}: don't split unless the boards shall be shared or the split itself is wanted"


def plan_reason(priced: Priced, solution: Solution) -> str:
    """Why this plan and not another."""
    request, stages = priced.request, len(solution.placement)
    alone = best_alone(priced)
    first = priced.costs[solution.placement[0].device].device
    if request.objective not in ("latency", "throughput") or request.tokens_per_s is not None:
        return _aim_reason(priced, solution)
    splits = {count: value for count, value in solution.best_by_stages.items() if count > 1}
    if stages == 1 and splits:
        count, value = min(splits.items(), key=lambda item: item[1])
        least_s = solution.value
        text = f"don't split: {first} alone takes {seconds_text(least_s)} per token, the best split ({count} boards) "
        text += seconds_text(value)
    elif stages == 1:
        only = "at most one board was asked for" if request.boards_at_most == 1 else "no split is possible"
        text = f"{first} holds the whole model: {only}"
    elif alone is None:
        text = f"no single board can hold the model; over {stages} boards {_sum_text(priced, solution)}"
    elif request.boards_at_least >= stages and stages > 1:
        text = f"at least {request.boards_at_least} boards were asked for; {_sum_text(priced, solution)}"
    elif request.objective == "throughput":
        single, single_s = best_alone(priced, full=True) or alone
        text = f"a full pipeline gives a token every {seconds_text(solution.pace_s)}; {single.device} alone every "
        text += seconds_text(single_s)
    else:
        text = f"{_sum_text(priced, solution)}; {alone[0].device} alone takes {seconds_text(alone[1])}"
    return f"{text}. {solution.because}" if solution.because else text


def _aim_reason(priced: Priced, solution: Solution) -> str:
    """Of a plan that is made for something else than time per token alone: what it comes to, and what that costs."""
    request, boards = priced.request, _boards_text(len(solution.placement))
    swiftest = solve_any(priced.problem, "latency", request.boards_at_least, request.boards_at_most)
    swift_s = solution.latency_s if swiftest is None else swiftest.latency_s
    if request.tokens_per_s is not None:
        most = 1 / max(solution.pace_s, 1e-9)
        text = f"carries {request.tokens_per_s:g} tokens/s with its busiest part at most {BUSY_SHARE:.0%} busy (a full "
        text += f"pipeline gives {most:.3g}), on {boards}"
    else:
        text = f"{AIMS[request.objective].words}: {figure_text(request.objective, solution.value)}, on {boards}"
        if request.objective == "weighted":
            text += f" ({_parts_text(priced, solution)})"
    if solution.latency_s > swift_s * (1 + EQUAL):
        text += f"; a token takes {seconds_text(solution.latency_s)}, at least {seconds_text(swift_s)} are possible"
    return f"{text}. {solution.because}" if solution.because else text


def _boards_text(count: int) -> str:
    return "1 board" if count == 1 else f"{count} boards"


def _parts_text(priced: Priced, solution: Solution) -> str:
    """'1 x latency 14.2 ms, 0.5 x memory 43 %'."""
    parts = []
    for objective in WEIGHED:
        if objective in priced.request.weights:
            value = value_of(priced, solution.placement, objective)
            parts.append(f"{priced.request.weights[objective]:g} x {objective} {value_text(objective, value)}")
    return ", ".join(parts)


def _sum_text(priced: Priced, solution: Solution) -> str:
    problem = priced.problem
    hop_s = sum(float(problem.hop_s[a, b, cut]) for a, b, cut in partition.hops(problem, solution.placement))
    compute_s = solution.latency_s - hop_s
    return (
        f"a token takes {seconds_text(solution.latency_s)}: "
        f"{seconds_text(compute_s)} of compute and {seconds_text(hop_s)} in {len(solution.placement)} hops"
    )
