"""What is asked for, and what it meets: a request, candidates, and both priced for a graph. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec import Struct

from coordinator.planning.cost import EXPECTED_TOKENS, DeviceCost, Workload, device_cost
from coordinator.planning.ordered import solve_any
from coordinator.planning.partition import Problem, Run, Solution
from coordinator.planning.plan import LeftOut, Objective
from coordinator.planning.problem import hop_bytes, make_problem
from hwprofiles.profile import Profile
from models.graph import Graph, Module
from wire.errors import UsageError
from wire.limits import LEAST_CONTEXT_TOKENS, MAX_LIVE_REQUESTS, MAX_PROMPT_TOKENS


class Candidate(Struct, frozen=True, kw_only=True):
    """A device that may get a stage, what it measured (None: nothing yet), and the memory that stages may use now.

    `unavailable` not '' leaves it out for that reason ("draining").
    """

    device: str
    profile: Profile | None
    usable_memory_bytes: int
    unavailable: str = ""


class PlanRequest(Struct, frozen=True, kw_only=True):
    """What is asked for. `context_tokens` x `slots` are reserved in KV cache; a decode step is priced with
    `expected_tokens` rows in it (default: half of the context, at most EXPECTED_TOKENS)."""

    deployment: str
    epoch: int = 0
    objective: Objective = "latency"
    context_tokens: int
    slots: int = 1
    prefill_chunk_tokens: int = 64
    boards_at_least: int = 1
    boards_at_most: int | None = None
    pins: Mapping[str, str] = {}
    """Module name -> the device that must hold it."""
    excluded: tuple[str, ...] = ()
    expected_tokens: int | None = None
    engine: str = "onnxruntime"
    accept_unsteady: bool = False


@dataclass(frozen=True, eq=False)
class Priced:
    """A graph and its candidates, priced for a request: what planning and explaining look at."""

    graph: Graph
    request: PlanRequest
    workload: Workload
    costs: tuple[DeviceCost, ...]
    left_out: tuple[LeftOut, ...]
    problem: Problem
    hop_bytes: tuple[int, ...]

    def modules(self, run: Run) -> tuple[Module, ...]:
        return self.graph.modules[run.first : run.end]


def check_numbers(context_tokens: int, slots: int, boards_at_least: int, boards_at_most: int | None) -> None:
    """Raise UsageError for what no model and no boards could do, and no order could say (wire.messages.StageOrder)."""
    if not LEAST_CONTEXT_TOKENS <= context_tokens <= MAX_PROMPT_TOKENS:
        raise UsageError(
            f"a context of {context_tokens} tokens is not possible",
            try_=f"--context from {LEAST_CONTEXT_TOKENS} to {MAX_PROMPT_TOKENS}",
        )
    if not 1 <= slots <= MAX_LIVE_REQUESTS:
        raise UsageError(f"{slots} slots are not possible", try_=f"--slots from 1 to {MAX_LIVE_REQUESTS}")
    if boards_at_least < 1:
        raise UsageError(f"at least {boards_at_least} boards: a plan has at least 1", try_="--boards-at-least 1")
    if boards_at_most is not None and boards_at_most < boards_at_least:
        raise UsageError(
            f"at least {boards_at_least} and at most {boards_at_most} boards: no plan can be both",
            try_=f"--boards-at-most {boards_at_least}, or a smaller --boards-at-least",
        )


def check(graph: Graph, request: PlanRequest) -> None:
    """Raise UsageError if the request contradicts itself or the model."""
    check_numbers(request.context_tokens, request.slots, request.boards_at_least, request.boards_at_most)
    if request.context_tokens > graph.max_context_tokens:
        raise UsageError(
            f"context of {request.context_tokens} tokens: {graph.model} was made for {graph.max_context_tokens}",
            try_=f"a context of at most {graph.max_context_tokens} tokens",
        )
    names = {module.name for module in graph.modules}
    for module, device in request.pins.items():
        if module not in names:
            raise UsageError(
                f"pin {module} -> {device}: {graph.model} has no such module",
                try_=f"embedding, block.0 to block.{graph.blocks - 1}, or head",
            )
        if device in request.excluded:
            raise UsageError(
                f"pin {module} -> {device}: the same request excludes {device}",
                try_=f"leave out the pin, or don't exclude {device}",
            )


def workload_of(request: PlanRequest) -> Workload:
    expected_tokens = request.expected_tokens
    if expected_tokens is None:
        expected_tokens = min(EXPECTED_TOKENS, request.context_tokens // 2)
    return Workload(
        context_tokens=request.context_tokens,
        slots=request.slots,
        prefill_chunk_tokens=request.prefill_chunk_tokens,
        expected_tokens=expected_tokens,
        engine=request.engine,
        accept_unsteady=request.accept_unsteady,
    )


def price(graph: Graph, candidates: Sequence[Candidate], request: PlanRequest) -> Priced:
    """Price every candidate; those that can't be priced are left out with the reason. Order: by name."""
    workload = workload_of(request)
    costs: list[DeviceCost] = []
    left_out: list[LeftOut] = []
    for candidate in sorted(candidates, key=lambda c: c.device):
        device = candidate.device
        if device in request.excluded:
            left_out.append(LeftOut(device=device, because="excluded by the request"))
        elif candidate.unavailable:
            left_out.append(LeftOut(device=device, because=candidate.unavailable))
        elif candidate.profile is None:
            left_out.append(LeftOut(device=device, because="has not measured itself yet"))
        else:
            cost = device_cost(graph, device, candidate.profile, candidate.usable_memory_bytes, workload)
            if isinstance(cost, LeftOut):
                left_out.append(cost)
            else:
                costs.append(cost)
    return Priced(
        graph=graph,
        request=request,
        workload=workload,
        costs=tuple(costs),
        left_out=tuple(left_out),
        problem=make_problem(graph, workload, costs, request.pins),
        hop_bytes=hop_bytes(graph),
    )


def solve(priced: Priced) -> Solution | None:
    request = priced.request
    return solve_any(priced.problem, request.objective, request.boards_at_least, request.boards_at_most)
