"""What-if questions to the planner: the request of a plan, solved again with one input changed. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from coordinator.planning.aims import AIMS, value_text
from coordinator.planning.partition import Run, Solution
from coordinator.planning.reasons import count_blocks
from coordinator.planning.request import Candidate, PlanRequest, Priced, price
from coordinator.planning.solving import solve
from models.graph import Graph

WORTH_SAYING: Final = 0.02
"""Change of the predicted time below which a changed input is not worth a line."""


class Question:
    """The request of a plan, solved again with changed candidates."""

    def __init__(self, graph: Graph, request: PlanRequest, candidates: Sequence[Candidate]) -> None:
        self.graph = graph
        self.request = request
        self.candidates = list(candidates)

    def solved(self, change: Callable[[Candidate], Candidate | None] = lambda candidate: candidate) -> Answer | None:
        """Solve with every candidate passed through `change` (None takes it away); None if nothing fits then."""
        changed = [new for new in map(change, self.candidates) if new is not None]
        priced = price(self.graph, changed, self.request)
        solution = solve(priced)
        return Answer(priced, solution) if solution else None


class Answer:
    """A solution and its price list."""

    def __init__(self, priced: Priced, solution: Solution) -> None:
        self.priced = priced
        self.solution = solution
        self.value = solution.value

    def run_of(self, device: str) -> Run | None:
        for run in self.solution.placement:
            if self.priced.costs[run.device].device == device:
                return run
        return None

    def blocks_of(self, device: str) -> int:
        run = self.run_of(device)
        return count_blocks(self.priced, run.first, run.end) if run else 0


def better(one: Answer, now: Answer) -> bool:
    return one.value < now.value * (1 - WORTH_SAYING)


def instead(other: Answer, now: Answer) -> str:
    objective = now.priced.request.objective
    then, today, of = value_text(objective, other.value), value_text(objective, now.value), AIMS[objective].figure
    return f"{then} {of}, as now" if then == today else f"{then} instead of {today} {of}"
