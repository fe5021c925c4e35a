"""The best plan together with the copies of its stages that were asked for. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from coordinator.planning.best import best_plan, planned
from coordinator.planning.partition import Infeasible
from coordinator.planning.plan import Draft, Plan
from coordinator.planning.planner import Candidate, PlanRequest
from coordinator.planning.replicas import with_standbys
from coordinator.planning.slots import plan_with_slots
from models.graph import Graph
from wire.messages import InboxAddress

Address = Callable[[int], InboxAddress]

MAX_OTHERS: Final = 8
"""Other numbers of boards that are tried for the sake of copies: each costs a new search."""


def planned_with_copies(
    graph: Graph,
    candidates: list[Candidate],
    request: PlanRequest,
    slots: int | None,
    address: Address,
    in_haste: bool = False,
) -> Plan:
    """The best plan for so many requests at once, or as many as go well. Raises Infeasible.

    In haste, which is after a loss, an answer goes on with fewer copies of its stages than were asked for.
    """
    if request.replicas == 1:
        return planned(graph, candidates, request, slots, address)

    def make(count: int) -> Draft:
        of_count = msgspec.structs.replace(request, slots=count)
        return Draft.of(best_with_copies(graph, candidates, of_count, address, in_haste))

    plan = plan_with_slots(make, slots)
    because = f"{plan.slots_because}, copies of the stages counted" if plan.slots_because else ""
    return msgspec.structs.replace(plan, slots_because=because)


def best_with_copies(
    graph: Graph, candidates: list[Candidate], request: PlanRequest, address: Address, in_haste: bool = False
) -> Plan:
    """The plan with its copies; where they don't fit, the one over more or fewer boards where they do."""
    plan = best_plan(graph, candidates, request, address)
    if in_haste:
        return with_standbys(plan, graph, candidates, request.replicas, partly=True)
    try:
        return with_standbys(plan, graph, candidates, request.replicas)
    except Infeasible:
        for count in _other_counts(len(plan.stages), request, len(candidates)):
            exactly = msgspec.structs.replace(request, boards_at_least=count, boards_at_most=count)
            try:
                other = best_plan(graph, candidates, exactly, address)
                other = with_standbys(other, graph, candidates, request.replicas)
            except Infeasible:
                continue
            room = f"On {len(plan.stages)} boards there is no room for all copies of the stages"
            because = f"{other.because.rstrip('.')}. {room}"
            return msgspec.structs.replace(other, limits=plan.limits, because=because)
        raise


def _other_counts(stages: int, request: PlanRequest, boards: int) -> list[int]:
    """Numbers of boards that the request allows, the nearest first; more before fewer, as their shares are smaller."""
    most = min(boards, request.boards_at_most or boards)
    counts = [count for count in range(request.boards_at_least, most + 1) if count != stages]
    return sorted(counts, key=lambda count: (abs(count - stages), -count))[:MAX_OTHERS]
