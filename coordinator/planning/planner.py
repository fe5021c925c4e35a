"""From measured devices to a plan, with the reason for each choice. Pure.

A short chain of questions: is the request possible at all, what does each device cost, which placement is best, and
why. When one board alone is at least as fast, the plan is that board alone and says "don't split".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from msgspec import Struct

from coordinator.planning.aims import figure, figure_error
from coordinator.planning.cost import DeviceCost, Workload, central_s, stage_memory
from coordinator.planning.partition import Infeasible, Solution, hops
from coordinator.planning.plan import Draft, Limits, Plan, PlannedStage
from coordinator.planning.prefill import WORTH_CHUNKING, choose_chunk
from coordinator.planning.reasons import alone_text, left_out_reasons, plan_reason, stage_reason
from coordinator.planning.request import Candidate, PlanRequest, Priced, check, check_power, price
from coordinator.planning.shortage import infeasible
from coordinator.planning.solving import fewest_of_equals, solve, token_j
from coordinator.planning.uncertainty import slowest_error_s, token_error_s
from models.graph import Graph
from wire.messages import InboxAddress

__all__ = [
    "Candidate",
    "Infeasible",
    "PlanRequest",
    "Verdict",
    "figure",
    "make_plan",
    "placement_of",
    "repriced",
    "request_of",
    "same_placement",
    "worth_moving",
]

WORTH_MOVING: Final = 0.10
"""Predicted gain above which a running placement is given up: less is within what profiles scatter, and moving costs
loading weights and filling caches again."""


def make_plan(
    graph: Graph,
    candidates: Sequence[Candidate],
    request: PlanRequest,
    address: Callable[[int], InboxAddress],
) -> Plan:
    """Give the best plan for the request; `address` names the inbox of stage 0, 1, ...

    Raises UsageError for a request that contradicts itself, Infeasible (a Refused) when no placement keeps all limits.
    """
    return draft_plan(graph, candidates, request, address).finished()


def draft_plan(
    graph: Graph,
    candidates: Sequence[Candidate],
    request: PlanRequest,
    address: Callable[[int], InboxAddress],
) -> Draft:
    """As make_plan, with the reasons left for later."""
    check(graph, request)
    priced = price(graph, candidates, request)
    check_power(priced)
    solution = solve(priced)
    if solution is None:
        raise infeasible(priced)
    solution = fewest_of_equals(priced, solution)
    sizes = request.smaller_chunks
    if request.objective == "ttft":
        priced, solution = _best_chunk(candidates, priced, solution)
        sizes = ()
    prefill = choose_chunk(priced, candidates, solution, sizes)
    plan = _as_plan(priced, solution, prefill.costs, prefill.workload, address)
    plan = msgspec.structs.replace(
        plan, predicted_first_token_s=prefill.first_token_s, prompt_tokens=priced.prompt_tokens
    )

    def finished() -> Plan:
        left_out = (*priced.left_out, *left_out_reasons(priced, solution))
        because, alone = plan_reason(priced, solution), alone_text(priced, solution)
        return msgspec.structs.replace(plan, left_out=left_out, because=because, alone=alone)

    return Draft(plan, finished)


def _best_chunk(candidates: Sequence[Candidate], priced: Priced, solution: Solution) -> tuple[Priced, Solution]:
    """Priced with the size of chunk with which the first token comes soonest, and the placement for it."""
    request, best = priced.request, (priced, solution)
    for size in request.smaller_chunks:
        smaller = price(priced.graph, candidates, msgspec.structs.replace(request, prefill_chunk_tokens=size))
        found = solve(smaller)
        if found is not None and found.value <= WORTH_CHUNKING * best[1].value:
            best = smaller, found
    return best


def _as_plan(
    priced: Priced,
    solution: Solution,
    costs: Sequence[DeviceCost],
    workload: Workload,
    address: Callable[[int], InboxAddress],
) -> Plan:
    """Without reasons but those of its stages. `costs` are those of the stages, in their order, with the workload that
    they shall have."""
    graph, request = priced.graph, priced.request
    stages = tuple(
        _stage(priced, solution, number, cost, workload, address(number)) for number, cost in enumerate(costs)
    )
    return Plan(
        deployment=request.deployment,
        epoch=request.epoch,
        model=graph.model,
        precision=graph.precision,
        wire_dtype=graph.wire_dtype,
        objective=request.objective,
        topology="central",
        context_tokens=request.context_tokens,
        slots=request.slots,
        prefill_chunk_tokens=workload.prefill_chunk_tokens,
        stages=stages,
        left_out=(),
        predicted_token_s=solution.latency_s,
        predicted_slowest_s=solution.slowest_s,
        token_error_s=token_error_s(priced, solution.placement),
        slowest_error_s=slowest_error_s(priced, solution),
        predicted_token_j=token_j(priced, solution.placement),
        predicted_memory_share=max(stage.memory_bytes / max(stage.memory_limit_bytes, 1) for stage in stages),
        predicted_cost=solution.value if request.objective == "weighted" else None,
        because="",
        runs="tokens" if graph.items is None else "items",
        limits=Limits(
            boards_at_least=request.boards_at_least,
            boards_at_most=request.boards_at_most,
            pins=dict(request.pins),
            excluded=request.excluded,
            expected_tokens=priced.workload.expected_tokens,
            accept_unsteady=request.accept_unsteady,
            tokens_per_s=request.tokens_per_s,
            weights=dict(request.weights),
            reserve_percent=request.reserve_percent,
            engine=request.engine,
        ),
    )


def _stage(
    priced: Priced, solution: Solution, number: int, cost: DeviceCost, workload: Workload, inbox: InboxAddress
) -> PlannedStage:
    run = solution.placement[number]
    modules = priced.modules(run)
    held_bytes, memory_bytes = stage_memory(priced.graph, workload, cost, modules)
    first_block = sum(1 for module in priced.graph.modules[: run.first] if module.kind == "block")
    ring = hops(priced.problem, solution.placement)
    sender, receiver, cut = ring[number] if ring else (run.device, run.device, 0)
    hop_s = float(priced.problem.hop_s[sender, receiver, cut])
    central_s = central_hop_s(priced, sender, receiver, cut) if ring else 0.0
    return PlannedStage(
        stage=number,
        device=cost.device,
        embedding=any(module.kind == "embedding" for module in modules),
        head=any(module.kind == "head" for module in modules),
        first_block=first_block,
        end_block=first_block + sum(1 for module in modules if module.kind == "block"),
        held_bytes=held_bytes,
        memory_bytes=memory_bytes,
        memory_limit_bytes=cost.memory_limit_bytes,
        compute_s=cost.stage_s(modules),
        hop_s=hop_s,
        central_hop_s=central_s if hop_s < central_s else 0.0,
        hop_bytes=priced.hop_bytes[cut] if ring else 0,
        inbox=inbox,
        because=stage_reason(priced, run),
        batches_s=cost.stage_batches_s(modules),
        prefill_chunk_s=cost.stage_prefill_s(modules),
        compute_j=cost.busy_j(cost.stage_s(modules)),
        prefill_chunk_j=cost.busy_j(cost.stage_prefill_s(modules)),
        engine=cost.engine,
        transfer_s=float(priced.problem.transfer_s[sender, receiver, cut]) if ring else 0.0,
    )


def central_hop_s(priced: Priced, sender: int, receiver: int, cut: int) -> float:
    """Seconds through the site's broker, where the way straight there was measured and is taken; else 0."""
    one, other = priced.costs[sender], priced.costs[receiver]
    if priced.graph.items is not None and cut == len(priced.graph.modules):
        return 0.0  # answers go to who asked
    if (one.device, other.device) not in priced.direct or one.link is None or other.link is None:
        return 0.0
    return central_s(one.link, other.link, priced.hop_bytes[cut])


def request_of(plan: Plan) -> PlanRequest:
    """The request that a plan answers, so that it can be made again on other figures."""
    return PlanRequest(
        deployment=plan.deployment,
        epoch=plan.epoch,
        objective=plan.objective,
        context_tokens=plan.context_tokens,
        slots=plan.slots,
        prefill_chunk_tokens=plan.prefill_chunk_tokens,
        boards_at_least=plan.limits.boards_at_least,
        boards_at_most=plan.limits.boards_at_most,
        pins=plan.limits.pins,
        excluded=plan.limits.excluded,
        expected_tokens=plan.limits.expected_tokens,
        accept_unsteady=plan.limits.accept_unsteady,
        tokens_per_s=plan.limits.tokens_per_s,
        weights=plan.limits.weights,
        reserve_percent=plan.limits.reserve_percent,
        engine=plan.limits.engine,
    )


def placement_of(plan: Plan) -> dict[str, str]:
    """Module name -> device, for all modules: as pins, they give the same placement again."""
    placement: dict[str, str] = {}
    for stage in plan.stages:
        if stage.embedding:
            placement["embedding"] = stage.device
        for block in range(stage.first_block, stage.end_block):
            placement[f"block.{block}"] = stage.device
        if stage.head:
            placement["head"] = stage.device
    return placement


def repriced(plan: Plan, graph: Graph, candidates: Sequence[Candidate]) -> Plan:
    """The same placement with figures from today's profiles; raises Infeasible if it can't be kept any more."""
    inboxes = {stage.stage: stage.inbox for stage in plan.stages}
    # What is weighed is held against the best of all boards that may take part.
    excluded = plan.limits.excluded if plan.objective == "weighted" else ()
    request = msgspec.structs.replace(
        request_of(plan),
        boards_at_least=1,
        boards_at_most=None,
        pins=placement_of(plan),
        excluded=excluded,
        engines={stage.device: stage.engine for stage in plan.stages},
    )
    again = make_plan(graph, candidates, request, lambda stage: inboxes[stage])
    return msgspec.structs.replace(again, limits=plan.limits)


def same_placement(one: Plan, other: Plan) -> bool:
    """Whether both run the same modules on the same devices with the same reserves: no weights would move."""
    return _placement_key(one) == _placement_key(other)


def _placement_key(plan: Plan) -> tuple[object, ...]:
    fixed = (plan.model, plan.precision, plan.wire_dtype, plan.context_tokens, plan.slots, plan.prefill_chunk_tokens)
    return (*fixed, tuple((s.device, s.engine, s.embedding, s.first_block, s.end_block, s.head) for s in plan.stages))


class Verdict(Struct, frozen=True, kw_only=True):
    """Whether to move, and why; true when moving."""

    move: bool
    because: str

    def __bool__(self) -> bool:
        return self.move


def worth_moving(running: Plan, better: Plan) -> Verdict:
    """Is a new placement better by enough? Compares predictions: give `repriced(running, ...)` if profiles changed."""
    if same_placement(running, better):
        return Verdict(move=False, because="the best plan is the one that runs")
    if _placement_key(running)[:-1] != _placement_key(better)[:-1]:
        return Verdict(move=True, because="model, context, slots or chunk differ from what runs")
    old_s, new_s = figure(running), figure(better)
    gain = 1 - new_s / old_s if old_s > 0 else 0.0
    if new_s < old_s <= new_s + figure_error(running) + figure_error(better):
        why = f"{gain:.0%} less time per token, and what was measured is no sharper than that"
        return Verdict(move=False, because=why)
    if gain > WORTH_MOVING:
        return Verdict(move=True, because=f"{gain:.0%} less time per token")
    return Verdict(move=False, because=f"{gain:.0%} less time per token: moving pays above {WORTH_MOVING:.0%}")
