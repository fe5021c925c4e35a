"""Why there is no plan: names what is missing and what to try. Pure.

Asked in this order: is there any usable board, are there enough of them, can the pins be kept, does every module fit
somewhere, is there enough memory in all, is there enough of it in one piece, are the links known.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final

import numpy as np

from coordinator.planning.aims import BUSY_SHARE
from coordinator.planning.cost import stage_memory
from coordinator.planning.ordered import solve_any
from coordinator.planning.partition import TIE, Infeasible, Overloaded
from coordinator.planning.problem import make_problem
from coordinator.planning.reasons import count_blocks
from coordinator.planning.request import Priced
from wire.units import bytes_text

KV_SHARE: Final = 0.20
"""Share of the needed memory from which on a smaller KV cache is worth suggesting."""


def infeasible(priced: Priced) -> Infeasible:
    """Give the error that says why `priced` has no placement."""
    questions: tuple[Callable[[Priced], Infeasible | None], ...] = (
        _no_board, _too_few_boards, _too_high_load, _pins, _module_too_big, _too_little_memory, _too_few_allowed,
        _links,
    )  # fmt: skip
    for question in questions:
        error = question(priced)
        if error is not None:
            return error
    return Infeasible(
        f"{priced.graph.model}: the boards offer enough memory, but no cut of the model fits their single sizes "
        f"({_room_text(priced)})",
        try_=_smaller(priced),
    )


def _no_board(priced: Priced) -> Infeasible | None:
    if priced.costs:
        return None
    if not priced.left_out:
        return Infeasible(f"{priced.graph.model}: there is no board to plan for", try_="edgelam devices")
    return Infeasible(
        f"{priced.graph.model}: no board can be planned for ({_left_out_text(priced)})",
        try_="edgelam devices; a board without figures is measured again by: edgelam bench --again",
    )


def _left_out_text(priced: Priced) -> str:
    return "; ".join(f"{left.device}: {left.because}" for left in priced.left_out)


def _too_few_boards(priced: Priced) -> Infeasible | None:
    wanted = priced.request.boards_at_least
    if wanted > len(priced.graph.modules):
        return Infeasible(
            f"{priced.graph.model} has {len(priced.graph.modules)} modules: {wanted} boards can't share it"
        )
    able = [cost.device for d, cost in enumerate(priced.costs) if priced.problem.fits[d].any()]
    if wanted <= max(1, len(able)):  # where no board can take a share, that is for the questions about memory to say
        return None
    small = [cost.device for cost in priced.costs if cost.device not in able]
    why = [f"{_left_out_text(priced)}"] if priced.left_out else []
    why += [f"no module fits on {', '.join(small)}"] if small else []
    reason = f" ({'; '.join(why)})" if why else ""
    return Infeasible(
        f"at least {wanted} boards were asked for, {len(able)} can take a share of {priced.graph.model}{reason}",
        try_=f"fewer boards, or start {wanted - len(able)} more",
    )


def _too_high_load(priced: Priced) -> Infeasible | None:
    """A load that these boards can't carry, though they can run the model."""
    request = priced.request
    if request.tokens_per_s is None:
        return None
    best = solve_any(priced.problem, "throughput", request.boards_at_least, request.boards_at_most)
    if best is None:
        return None
    most = BUSY_SHARE / best.pace_s
    filled = priced.problem.filled(len(best.placement))
    slowest = max(best.placement, key=filled.run_s)
    cost = priced.costs[slowest.device]
    binding = f"compute on {cost.device} binds"
    counted = f"{request.slots} request{'s' * (request.slots != 1)}"
    if best.pace_s > best.slowest_s * (1 + TIE):
        binding = f"the time once round the boards, shared by {counted} at once, binds"
    elif filled.run_s(slowest) < best.slowest_s * (1 - TIE):
        binding = "a link binds"
    return Overloaded(
        f"{priced.graph.model}: {request.tokens_per_s:g} tokens/s are more than these boards carry: at most {most:.3g} "
        f"with the busiest part {BUSY_SHARE:.0%} busy ({binding})",
        try_=f"a load of at most {most:.3g}, or one more board",
    )


def _pins(priced: Priced) -> Infeasible | None:
    pins, usable = priced.request.pins, {cost.device for cost in priced.costs}
    for module, device in pins.items():
        if device not in usable:
            known = {left.device: left.because for left in priced.left_out}
            reason = known.get(device, "no such board is online")
            return Infeasible(
                f"pin {module} -> {device} can't be kept: {reason}", try_="drop the pin, or edgelam devices"
            )
    pinned = [module.name for module in priced.graph.modules if module.name in pins]
    left: set[str] = set()
    for before, after in pairwise(pinned):
        if pins[before] == pins[after]:
            continue
        left.add(pins[before])
        if pins[after] in left:
            return Infeasible(
                f"pins contradict: {pins[after]} shall hold {after} and an earlier module, with {before} on "
                f"{pins[before]} between; a board holds one run of modules",
                try_="drop one of these pins",
            )
    if not pins or _solvable(priced, pins=False) is False:
        return None
    listed = ", ".join(f"{module} -> {device}" for module, device in pins.items())
    return Infeasible(f"{priced.graph.model} fits, but not with the pins {listed}", try_="drop a pin")


def _solvable(priced: Priced, *, pins: bool = True, at_most: bool = True) -> bool:
    """Whether there is a placement once the pins, or the upper limit of boards, are dropped."""
    request = priced.request
    problem = priced.problem
    if not pins:
        problem = make_problem(priced.graph, priced.workload, priced.costs, {})
    most = request.boards_at_most if at_most else None
    return solve_any(problem, "latency", request.boards_at_least, most) is not None


def _module_too_big(priced: Priced) -> Infeasible | None:
    for place, module in enumerate(priced.graph.modules):
        if priced.problem.fits[:, place, place + 1].any():
            continue
        if module.name in priced.request.pins:
            holders = [cost for cost in priced.costs if cost.device == priced.request.pins[module.name]]
        else:
            holders = list(priced.costs)
        needs = {cost.device: stage_memory(priced.graph, priced.workload, cost, [module])[1] for cost in holders}
        roomiest = min(holders, key=lambda cost: needs[cost.device] - cost.memory_limit_bytes)
        short = needs[roomiest.device] - roomiest.memory_limit_bytes
        return Infeasible(
            f"{module.name} of {priced.graph.model} fits on no board: it needs {bytes_text(needs[roomiest.device])} "
            f"with its worker, {roomiest.device} may give {bytes_text(roomiest.memory_limit_bytes)} "
            f"({bytes_text(short)} short)",
            try_=_smaller(priced),
        )
    return None


def _too_little_memory(priced: Priced) -> Infeasible | None:
    """Compare what the model needs on all boards together with what they offer."""
    offered = sum(cost.memory_limit_bytes for cost in priced.costs)
    held = max(stage_memory(priced.graph, priced.workload, cost, priced.graph.modules)[0] for cost in priced.costs)
    workers = sum(
        memory - held
        for held, memory in (stage_memory(priced.graph, priced.workload, cost, []) for cost in priced.costs)
    )
    needed = held + workers
    if needed <= offered:
        return None
    return Infeasible(
        f"{priced.graph.model} needs {bytes_text(needed)} (with {bytes_text(workers)} for workers), "
        f"{_boards(len(priced.costs))} {bytes_text(offered)}: {bytes_text(needed - offered)} are missing "
        f"({_room_text(priced)})",
        try_=_smaller(priced),
    )


def _boards(count: int) -> str:
    return "the only board offers" if count == 1 else f"the {count} boards offer"


def _room_text(priced: Priced) -> str:
    """'orin has room for 12, pi4 for 0 of 30 blocks'."""
    rooms = []
    for d, cost in enumerate(priced.costs):
        runs = np.argwhere(priced.problem.fits[d])
        most = max((count_blocks(priced, int(first), int(end)) for first, end in runs), default=0)
        rooms.append(f"{cost.device} for {most}")
    return f"room: {', '.join(rooms)} of {priced.graph.blocks} blocks"


def _too_few_allowed(priced: Priced) -> Infeasible | None:
    most = priced.request.boards_at_most
    if most is None or not _solvable(priced, at_most=False):
        return None
    return Infeasible(
        f"{priced.graph.model} does not fit on {most} of these boards, only on more ({_room_text(priced)})",
        try_="allow more boards",
    )


def _links(priced: Priced) -> Infeasible | None:
    unlinked = [f"{cost.device}: {cost.link_because}" for cost in priced.costs if cost.link is None]
    if not unlinked:
        return None
    return Infeasible(
        f"{priced.graph.model} has to be split, and these boards can't take part: {'; '.join(unlinked)}",
        try_="edgelam bench --again, with the broker reachable from these boards",
    )


def _smaller(priced: Priced) -> str:
    """What makes the need smaller, the most useful first."""
    workload, graph = priced.workload, priced.graph
    kv = sum(module.kv_bytes_per_token for module in graph.modules) * workload.context_tokens * workload.slots
    advice = []
    if kv > KV_SHARE * (kv + graph.weight_bytes):
        what = "a shorter context or fewer slots" if workload.slots > 1 else "a shorter context"
        advice.append(f"{what} (the KV cache takes {bytes_text(kv)})")
    if graph.precision != "int4":
        advice.append("int4 weights")
    advice.append("one more board, or more memory for the agents")
    return "; ".join(advice)
