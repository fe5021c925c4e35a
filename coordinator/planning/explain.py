"""A plan in plain lines: who runs what, why, who was left out, and what would change the answer.

What would change the answer is not guessed: each sentence comes from solving the same request again with one input
changed (more memory on a board, a better link, a board gone). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from coordinator.measured import blocks_text
from coordinator.planning.cost import RESERVE_FRACTION, RESERVE_MIN_BYTES, stage_memory
from coordinator.planning.partition import Run, Solution, hops
from coordinator.planning.plan import Plan
from coordinator.planning.planner import request_of
from coordinator.planning.reasons import count_blocks
from coordinator.planning.request import Candidate, PlanRequest, Priced, price, solve
from hwprofiles.profile import LinkMeasurement, Profile
from models.graph import Graph
from wire.units import bytes_text, seconds_text

WORTH_SAYING: Final = 0.02
"""Change of the predicted time below which a changed input is not worth a line."""

PLENTY: Final = 64
"""How many times its memory a board is given to see whether memory binds at all."""

MAX_ASKED: Final = 8
"""Boards for which each question is asked; every question costs a new search."""


def explain(plan: Plan, graph: Graph, candidates: Sequence[Candidate]) -> list[str]:
    """Give the lines of `edgelam plan --explain`, without line ends. `candidates`: those the plan was made from."""
    lines = [_headline(plan), plan.because]
    if plan.alone:
        lines.append(plan.alone)
    lines += ["", *_table(plan), "", "why each share"]
    lines += [f"  {stage.because}" for stage in plan.stages]
    if plan.left_out:
        lines += ["", "left out"]
        lines += [f"  {left.device}: {left.because}" for left in plan.left_out]
    lines += ["", "what would change the answer"]
    lines += [f"  {line}" for line in _changes(plan, graph, candidates)]
    return lines


def _headline(plan: Plan) -> str:
    boards = len({stage.device for stage in plan.stages})
    count = "1 board" if boards == 1 else f"{boards} boards"
    aim = "least time per token" if plan.objective == "latency" else "most tokens per second"
    token_s = plan.predicted_token_s
    return (
        f"{plan.model} {plan.precision} on {count}, {aim}: {seconds_text(token_s)} per token of one stream "
        f"({1 / max(token_s, 1e-9):.0f} tokens/s); a full pipeline gives one every "
        f"{seconds_text(plan.predicted_slowest_s)}"
    )


def _table(plan: Plan) -> list[str]:
    rows = [("stage", "device", "holds", "memory", "of", "compute", "hop", "hop bytes", "prefill chunk")]
    for stage in plan.stages:
        chunk_s = stage.prefill_chunk_s
        rows.append(
            (
                str(stage.stage),
                stage.device,
                blocks_text(stage.embedding, stage.first_block, stage.end_block, stage.head),
                bytes_text(stage.memory_bytes),
                bytes_text(stage.memory_limit_bytes),
                seconds_text(stage.compute_s),
                seconds_text(stage.hop_s),
                str(stage.hop_bytes),
                seconds_text(chunk_s) if chunk_s is not None else "not measured",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class _Question:
    """The request of a plan, solved again with changed candidates."""

    def __init__(self, graph: Graph, request: PlanRequest, candidates: Sequence[Candidate]) -> None:
        self._graph = graph
        self._request = request
        self.candidates = list(candidates)

    def solved(self, change: Callable[[Candidate], Candidate | None] = lambda candidate: candidate) -> _Answer | None:
        """Solve with every candidate passed through `change` (None takes it away); None if nothing fits then."""
        changed = [new for new in map(change, self.candidates) if new is not None]
        priced = price(self._graph, changed, self._request)
        solution = solve(priced)
        return _Answer(priced, solution) if solution else None


class _Answer:
    """A solution and its price list."""

    def __init__(self, priced: Priced, solution: Solution) -> None:
        self.priced = priced
        self.solution = solution
        latency = priced.request.objective == "latency"
        self.figure_s = solution.latency_s if latency else solution.slowest_s

    def run_of(self, device: str) -> Run | None:
        for run in self.solution.placement:
            if self.priced.costs[run.device].device == device:
                return run
        return None

    def blocks_of(self, device: str) -> int:
        run = self.run_of(device)
        return count_blocks(self.priced, run.first, run.end) if run else 0


def _changes(plan: Plan, graph: Graph, candidates: Sequence[Candidate]) -> list[str]:
    question = _Question(graph, request_of(plan), candidates)
    now = question.solved()
    if now is None:
        return ["on today's figures there is no plan at all: plan again to see what is missing"]
    lines = [_binding(now)]
    planned_s = plan.predicted_token_s if plan.objective == "latency" else plan.predicted_slowest_s
    if now.figure_s < planned_s * (1 - WORTH_SAYING):
        lines.append(f"today's figures allow a better plan: {seconds_text(now.figure_s)} per token")
    devices = [cost.device for cost in now.priced.costs]
    used = [device for device in devices if now.run_of(device)]
    asked = [*used, *(device for device in devices if device not in used)][:MAX_ASKED]
    lines += filter(None, (_with_memory(question, now, device) for device in asked))
    lines += filter(None, (_with_link(question, now, device) for device in asked))
    if len(devices) > now.priced.request.boards_at_least:
        lines += [_without(question, now, device) for device in used[:MAX_ASKED]]
    return lines


def _binding(now: _Answer) -> str:
    """Which resource the time goes to."""
    problem, placement = now.priced.problem, now.solution.placement
    if now.priced.request.objective == "throughput":
        stage_s = {now.priced.costs[r.device].device: _stage_s(now, r) for r in placement}
        slowest = max(stage_s, key=lambda device: stage_s[device])
        if stage_s[slowest] >= now.solution.slowest_s * (1 - WORTH_SAYING):
            return f"compute on {slowest} binds: {seconds_text(stage_s[slowest])} per token"
        return f"a link binds: {seconds_text(now.solution.slowest_s)} per token"
    hop_s = sum(float(problem.hop_s[a, b, cut]) for a, b, cut in hops(problem, placement))
    share = hop_s / now.solution.latency_s if now.solution.latency_s else 0.0
    if share > 0.5:
        return f"the links bind: {share:.0%} of a token's time is spent in hops"
    return f"compute binds: {1 - share:.0%} of a token's time, {share:.0%} is spent in hops"


def _stage_s(now: _Answer, run: Run) -> float:
    return now.priced.costs[run.device].stage_s(now.priced.modules(run))


def _with_memory(question: _Question, now: _Answer, device: str) -> str:
    """'with 40 MB more memory pi5 would take 4 more blocks: 12.1 instead of 14.2 ms'; '' if memory doesn't bind it."""
    plenty = question.solved(_giving(device, lambda usable: usable * PLENTY))
    if plenty is None or not _better(plenty, now):
        return ""
    run = plenty.run_of(device)
    if run is None:
        return ""
    cost = plenty.priced.costs[run.device]
    _, needed_bytes = stage_memory(plenty.priced.graph, plenty.priced.workload, cost, plenty.priced.modules(run))
    usable_bytes = max(int(needed_bytes / (1 - RESERVE_FRACTION)) + 1, needed_bytes + RESERVE_MIN_BYTES)
    enough = question.solved(_giving(device, lambda _usable: usable_bytes))
    before = next(candidate.usable_memory_bytes for candidate in question.candidates if candidate.device == device)
    if enough is None or not _better(enough, now) or usable_bytes <= before:
        return ""
    more = enough.blocks_of(device) - now.blocks_of(device)
    share = f"take {more} more blocks" if more > 1 else "take one more block" if more == 1 else "share otherwise"
    return f"with {bytes_text(usable_bytes - before)} more memory {device} would {share}: {_instead(enough, now)}"


def _giving(device: str, usable: Callable[[int], int]) -> Callable[[Candidate], Candidate]:
    def change(candidate: Candidate) -> Candidate:
        if candidate.device != device:
            return candidate
        return msgspec.structs.replace(candidate, usable_memory_bytes=usable(candidate.usable_memory_bytes))

    return change


def _with_link(question: _Question, now: _Answer, device: str) -> str:
    """What the best link of all boards would do on this one; '' if little, or if it has the best."""
    links = {cost.device: cost.link for cost in now.priced.costs if cost.link}
    if not links:
        return ""
    payload = max(now.priced.hop_bytes)
    best = min(links, key=lambda name: (links[name].crossing_s(payload), name))
    if best == device:
        return ""
    given = next(c.profile for c in question.candidates if c.device == best)
    link = given.link if given is not None else None
    if not isinstance(link, LinkMeasurement):
        return ""

    def change(candidate: Candidate) -> Candidate:
        if candidate.device != device or candidate.profile is None:
            return candidate
        profile: Profile = msgspec.structs.replace(candidate.profile, link=link)
        return msgspec.structs.replace(candidate, profile=profile)

    faster = question.solved(change)
    if faster is None or not _better(faster, now):
        return ""
    return f"with a link as good as {best}'s, {device} would save time: {_instead(faster, now)}"


def _without(question: _Question, now: _Answer, device: str) -> str:
    rest = question.solved(lambda candidate: None if candidate.device == device else candidate)
    if rest is None:
        return f"without {device} there is no plan"
    return f"without {device}: {_instead(rest, now)}"


def _better(one: _Answer, now: _Answer) -> bool:
    return one.figure_s < now.figure_s * (1 - WORTH_SAYING)


def _instead(other: _Answer, now: _Answer) -> str:
    then, today = seconds_text(other.figure_s), seconds_text(now.figure_s)
    return f"{then} per token, as now" if then == today else f"{then} instead of {today} per token"
