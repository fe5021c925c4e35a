"""What is asked for, and what it meets: a request, candidates, and both priced for a graph. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import msgspec
from msgspec import Struct

from coordinator.planning.aims import check_objective
from coordinator.planning.cost import EXPECTED_TOKENS, RESERVE_FRACTION, DeviceCost, Power, Workload
from coordinator.planning.engines import best_engine_cost
from coordinator.planning.pairs import Pair, PairCost
from coordinator.planning.partition import Problem, Run
from coordinator.planning.plan import LeftOut, Objective
from coordinator.planning.powered import power_of
from coordinator.planning.problem import hop_bytes, make_prefill_problem, make_problem
from coordinator.planning.slowed import Slowed, slowed, slowed_link
from hwprofiles.profile import Profile
from models.engine.names import ENGINES, PROCESSOR
from models.graph import Graph, Module
from wire.errors import Refused, UsageError
from wire.limits import LEAST_CONTEXT_TOKENS, MAX_LIVE_REQUESTS, MAX_PROMPT_TOKENS
from wire.messages import EngineName

PROMPT_TOKENS: Final = 512
"""The prompt that chunks are sized for, or half of the context if that is less: where the first token is waited for."""

MOST_RESERVE_PERCENT: Final = 90.0

MAX_REPLICAS: Final = 8
"""Copies of each stage: with two any one board may be lost, and nobody loses seven at a time."""


class Candidate(Struct, frozen=True, kw_only=True):
    """A device that may get a stage, what it measured (None: nothing yet), and the memory that stages may use now.

    `unavailable` not '' leaves it out for that reason ("draining"). `slowed`: it is slower than it measured.
    `borne_out`: in words, how far its work bears out what it measured; '' if it has hardly worked. It sets no price.
    """

    device: str
    profile: Profile | None
    usable_memory_bytes: int
    unavailable: str = ""
    slowed: Slowed | None = None
    power: Power | None = None
    """Told by somebody else than its profile."""
    link_slowed: Slowed | None = None
    """Its link is slower than it measured; `direct` counts that already."""
    direct: Mapping[str, PairCost] = {}
    """Ways to other boards that were measured, straight to their own brokers."""
    borne_out: str = ""
    without: Mapping[str, str] = {}
    """Engines that failed there, and why: it is planned on others, unless one of them is asked for."""


class PlanRequest(Struct, frozen=True, kw_only=True):
    """What is asked for. `context_tokens` x `slots` are reserved in KV cache; a decode step is priced with
    `expected_tokens` rows in it (default: half of the context, at most EXPECTED_TOKENS)."""

    deployment: str
    epoch: int = 0
    objective: Objective = "latency"
    context_tokens: int
    slots: int = 1
    prefill_chunk_tokens: int = 64
    smaller_chunks: tuple[int, ...] = ()
    """Other sizes of prefill chunk that may be chosen where they let the first token come sooner. Memory is reckoned
    with `prefill_chunk_tokens`, so none may be larger."""
    boards_at_least: int = 1
    boards_at_most: int | None = None
    pins: Mapping[str, str] = {}
    """Module name -> the device that must hold it."""
    excluded: tuple[str, ...] = ()
    replicas: int = 1
    """Copies of each stage, on different devices; all but one of them are idle."""
    expected_tokens: int | None = None
    engine: str = "auto"
    engines: Mapping[str, EngineName] = {}
    """Device -> what it runs on and is to be priced with, whatever `engine` says: of a plan that is made again."""
    accept_unsteady: bool = False
    tokens_per_s: float | None = None
    """The load that a plan for throughput has to carry."""
    weights: Mapping[str, float] = {}
    """Objective -> weight, for objective weighted."""
    reserve_percent: float = 100 * RESERVE_FRACTION
    """Of each board's usable memory, that stays free."""
    held: Mapping[str, Sequence[str]] = {}
    """Device -> names of modules that are loaded there now: moving them costs time (coordinator.planning.moving)."""

    @property
    def aims(self) -> frozenset[str]:
        """What counts: the objective, or all that is weighed."""
        return frozenset(self.weights) or frozenset([self.objective])


@dataclass(frozen=True, eq=False)
class Priced:
    """A graph and its candidates, priced for a request: what planning and explaining look at."""

    graph: Graph
    request: PlanRequest
    workload: Workload
    costs: tuple[DeviceCost, ...]
    left_out: tuple[LeftOut, ...]
    hop_bytes: tuple[int, ...]
    direct: Mapping[Pair, PairCost]

    @cached_property
    def problem(self) -> Problem:
        """In arrays. Made when it is asked for: some who want prices need nothing else."""
        return make_problem(self.graph, self.workload, self.costs, self.request.pins, self.direct)

    @cached_property
    def prefill_problem(self) -> Problem:
        """The same for a chunk of a prompt."""
        chunk_tokens = self.request.prefill_chunk_tokens
        return make_prefill_problem(self.graph, self.costs, chunk_tokens, self.problem, self.direct)

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt that chunks are sized for."""
        return min(PROMPT_TOKENS, max(1, self.request.context_tokens // 2))

    def only(self, chosen: Sequence[int], boards_at_least: int) -> Priced:
        """With these devices alone, and so many stages."""
        request = msgspec.structs.replace(self.request, boards_at_least=boards_at_least)
        fewer = replace(self, request=request, costs=tuple(self.costs[d] for d in chosen))
        vars(fewer).update(problem=self.problem.only(list(chosen)))
        return fewer

    def unbound(self) -> Priced:
        """Without pins, and with as many boards as may be."""
        request = msgspec.structs.replace(self.request, pins={}, boards_at_least=1, boards_at_most=None)
        free = replace(self, request=request)
        if not self.request.pins:
            vars(free).update(problem=self.problem, prefill_problem=self.prefill_problem)  # they are the same
        return free

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


def check_reserve(percent: float) -> None:
    """Raise UsageError for a share of memory that can't stay free."""
    if not 0 <= percent <= MOST_RESERVE_PERCENT:
        raise UsageError(
            f"{percent:g} % of each board's memory can't stay free",
            try_=f"--reserve from 0 to {MOST_RESERVE_PERCENT:g}",
        )


def check_engine(engine: str) -> None:
    if engine not in ("auto", *ENGINES):
        raise UsageError(f"engine {engine!r} is unknown", try_=f"auto, {', '.join(ENGINES)}")


def check_replicas(replicas: int, pins: Collection[object]) -> None:
    """Raise UsageError for copies that can't be, or that the request contradicts."""
    if not 1 <= replicas <= MAX_REPLICAS:
        raise UsageError(
            f"{replicas} copies of each stage are not possible",
            try_=f"--replicas from 1 (none spare) to {MAX_REPLICAS}",
        )
    if replicas > 1 and pins:
        raise UsageError(
            f"{replicas} copies of each stage, and a pin: what is pinned to one board can't go on on another",
            try_="drop the pin, or --replicas 1",
        )


def check(graph: Graph, request: PlanRequest) -> None:
    """Raise UsageError if the request contradicts itself or the model."""
    check_numbers(request.context_tokens, request.slots, request.boards_at_least, request.boards_at_most)
    check_replicas(request.replicas, request.pins)
    check_objective(request.objective, request.weights, request.tokens_per_s)
    check_reserve(request.reserve_percent)
    check_engine(request.engine)
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


def check_power(priced: Priced) -> None:
    """Raise Refused if energy counts, and the power of a board was not measured: it is not guessed."""
    unknown = [cost.device for cost in priced.costs if cost.power is None]
    if unknown and "energy" in priced.request.aims:
        leave_out = "another objective"
        if len(unknown) < len(priced.costs):
            leave_out += ", or leave these boards out: " + " ".join(f"--exclude {name}" for name in unknown)
        raise Refused(
            f"energy can't be planned for: the power of {', '.join(unknown)} was not measured",
            try_=leave_out,
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
        accept_unsteady=request.accept_unsteady,
        reserve_fraction=request.reserve_percent / 100,
    )


def _engine_wanted(candidate: Candidate, request: PlanRequest) -> str:
    """What it runs on, if it does. Boards measure their power on their processor: where joules count, so does nothing
    else, unless it is asked for."""
    runs_on = request.engines.get(candidate.device)
    if runs_on is not None and runs_on not in candidate.without:
        return runs_on
    own_power = candidate.power is None and candidate.profile is not None and power_of(candidate.profile) is not None
    return PROCESSOR if request.engine == "auto" and "energy" in request.aims and own_power else request.engine


def price(graph: Graph, candidates: Sequence[Candidate], request: PlanRequest) -> Priced:
    """Price every candidate; those that can't be priced are left out with the reason. Order: by name."""
    workload = workload_of(request)
    costs: list[DeviceCost] = []
    left_out: list[LeftOut] = []
    direct = {(one.device, other): way for one in candidates for other, way in one.direct.items()}
    for candidate in sorted(candidates, key=lambda c: c.device):
        device = candidate.device
        if device in request.excluded:
            left_out.append(LeftOut(device=device, because="excluded by the request"))
        elif candidate.unavailable:
            left_out.append(LeftOut(device=device, because=candidate.unavailable))
        elif candidate.profile is None:
            left_out.append(LeftOut(device=device, because="has not measured itself yet"))
        else:
            wanted = _engine_wanted(candidate, request)
            usable_bytes = candidate.usable_memory_bytes
            cost = best_engine_cost(graph, device, candidate.profile, usable_bytes, workload, wanted, candidate.without)
            if isinstance(cost, LeftOut):
                left_out.append(cost)
            elif "ttft" in request.aims and len(cost.prefill_s) < len(cost.decode_s):
                left_out.append(
                    LeftOut(device=device, because="has not measured prompts, and their time is to be least")
                )
            else:
                power = candidate.power or (power_of(candidate.profile) if cost.engine == PROCESSOR else None)
                cost = slowed(msgspec.structs.replace(cost, power=power), candidate.slowed)
                costs.append(slowed_link(cost, candidate.link_slowed))
    return Priced(
        graph=graph,
        request=request,
        workload=workload,
        costs=tuple(costs),
        left_out=tuple(left_out),
        hop_bytes=hop_bytes(graph),
        direct=direct,
    )
