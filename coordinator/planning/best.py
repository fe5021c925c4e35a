"""The best plan on the figures that there are, for as many requests at once as were asked for or go well. Pure."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from coordinator.planning.plan import Draft, Plan
from coordinator.planning.planner import Candidate, Infeasible, PlanRequest, draft_plan
from coordinator.planning.slots import plan_with_slots
from models.graph import Graph
from wire.messages import InboxAddress


def planned(
    graph: Graph,
    candidates: list[Candidate],
    request: PlanRequest,
    slots: int | None,
    address: Callable[[int], InboxAddress],
) -> Plan:
    """The best plan for so many requests at once, or as many as go well. Raises Infeasible."""

    def make(count: int) -> Draft:
        return _best_draft(graph, candidates, msgspec.structs.replace(request, slots=count), address)

    return plan_with_slots(make, slots)


def best_plan(
    graph: Graph, candidates: list[Candidate], request: PlanRequest, address: Callable[[int], InboxAddress]
) -> Plan:
    """The plan on steady figures; where there is none, on unsteady ones too, and the plan says so.

    A noisy minute on a board must not make the planner refuse what the boards can do. Raises Infeasible.
    """
    return _best_draft(graph, candidates, request, address).finished()


def _best_draft(
    graph: Graph, candidates: list[Candidate], request: PlanRequest, address: Callable[[int], InboxAddress]
) -> Draft:
    try:
        return draft_plan(graph, candidates, request, address)
    except Infeasible as refused:
        try:
            draft = draft_plan(graph, candidates, msgspec.structs.replace(request, accept_unsteady=True), address)
        except Infeasible:
            raise refused from None

    def finished() -> Plan:
        plan = draft.finished()
        caution = "Some of the figures are unsteady (edgelam bench shows which), so the prediction is rough"
        return msgspec.structs.replace(plan, because=f"{plan.because}. {caution}")

    return Draft(draft.plan, finished)
