"""A plan in plain lines: who runs what, why, who was left out, and what would change the answer.

What would change the answer is not guessed: each sentence comes from solving the same request again with one input
changed (more memory on a board, a better link, a board gone). Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from coordinator.measured import blocks_text
from coordinator.planning.aims import AIMS, figure, figure_text, pace_error_s, pace_s, value_text
from coordinator.planning.cost import RESERVE_FRACTION, RESERVE_MIN_BYTES, stage_memory
from coordinator.planning.guessing import guessing_of
from coordinator.planning.hopped import hop_lines
from coordinator.planning.partition import hops
from coordinator.planning.plan import Plan
from coordinator.planning.planner import request_of
from coordinator.planning.questions import WORTH_SAYING, Answer, Question, better, instead
from coordinator.planning.replicas import copies_text, covered
from coordinator.planning.request import Candidate
from coordinator.planning.sensitivity import sensitivity
from coordinator.planning.slots import slots_text
from hwprofiles.profile import LinkMeasurement, Profile
from models.graph import Graph
from wire.codecs import AS_IS
from wire.units import bytes_text, seconds_text

PLENTY: Final = 64
"""How many times its memory a board is given to see whether memory binds at all."""

MAX_ASKED: Final = 8
"""Boards for which each question is asked; every question costs a new search."""


def explain(plan: Plan, graph: Graph, candidates: Sequence[Candidate], now_unix: float | None = None) -> list[str]:
    """Give the lines of `edgelam plan --explain`, without line ends. `candidates`: those the plan was made from.
    Without `now_unix` nothing is said of how old figures are."""
    lines = [_headline(plan), *_interval(plan), plan.because, slots_text(plan.slots, plan.slots_because)]
    if plan.runs == "tokens":
        lines.append(guessing_of(plan).because)
    if plan.alone:
        lines.append(plan.alone)
    lines += ["", *_table(plan), "", "why each share"]
    lines += [f"  {stage.because}" for stage in plan.stages]
    if now_unix is not None and len(plan.stages) > 1:
        lines += ["", "which figure each hop has"]
        lines += [f"  {line}" for line in hop_lines(plan, candidates, now_unix)]
    worked = [candidate for candidate in candidates if candidate.borne_out]
    if worked:
        lines += ["", "how far work bears out these figures"]
        lines += [f"  {candidate.device}: {candidate.borne_out}" for candidate in worked]
    lines += _errors(plan)
    if plan.left_out:
        lines += ["", "left out"]
        lines += [f"  {left.device}: {left.because}" for left in plan.left_out]
    if plan.replicas > 1:
        lines += ["", *_copies(plan)]
    lines += ["", "what would change the answer"]
    lines += [f"  {line}" for line in _changes(plan, graph, candidates)]
    return lines


def _headline(plan: Plan) -> str:
    boards = len({stage.device for stage in plan.stages})
    count = "1 board" if boards == 1 else f"{boards} boards"
    aim = AIMS[plan.objective].words
    if plan.limits.tokens_per_s is not None:
        aim = f"for {plan.limits.tokens_per_s:g} tokens/s"
    token_s = plan.predicted_token_s
    if plan.runs == "items":
        aim = aim.replace("token", "item")
        return (
            f"{plan.model} on {count}, {aim}: {seconds_text(token_s)} per item; a full pipeline gives "
            f"{1 / max(plan.predicted_slowest_s, 1e-9):.1f} items/s"
        )
    return (
        f"{plan.model} {plan.precision} on {count}, {aim}: {seconds_text(token_s)} per token of one stream "
        f"({1 / max(token_s, 1e-9):.0f} tokens/s); a full pipeline gives one every "
        f"{seconds_text(pace_s(plan))}" + _first_token(plan) + _energy(plan)
    )


def _interval(plan: Plan) -> list[str]:
    """Between what the figures lie, as far as the spread of what was measured says it."""
    what = plan.runs.removesuffix("s")
    if plan.token_error_s <= 0 and plan.slowest_error_s <= 0:
        return []
    text = f"by the spread of what was measured: {_between(plan.predicted_token_s, plan.token_error_s)} per {what}"
    if pace_error_s(plan) > 0 and len(plan.stages) > 1:
        text += f", one every {_between(pace_s(plan), pace_error_s(plan))} from a full pipeline"
    return [f"{text} (95 %)"]


def _between(middle_s: float, error_s: float) -> str:
    return f"{seconds_text(max(0.0, middle_s - error_s))} to {seconds_text(middle_s + error_s)}"


def _first_token(plan: Plan) -> str:
    if plan.predicted_first_token_s is None:
        return ""
    return (
        f"; the first token of a prompt of {plan.prompt_tokens} comes after "
        f"{seconds_text(plan.predicted_first_token_s)}, in chunks of {plan.prefill_chunk_tokens}"
    )


def _energy(plan: Plan) -> str:
    return "" if plan.predicted_token_j is None else f"; {value_text('energy', plan.predicted_token_j)} per token"


def _copies(plan: Plan) -> list[str]:
    """Where copies wait, and what the loss of a board would come to."""
    times = {stage.stage: stage.compute_s for stage in plan.stages}
    needed = sum(standby.memory_bytes for standby in plan.standbys)
    lines = ["copies that wait", f"  {copies_text(plan.replicas, needed, plan.replicas_because)}"]
    lines += [
        f"  stage {standby.stage} on {standby.device}: {bytes_text(standby.memory_bytes)}, "
        f"{seconds_text(standby.compute_s)} per token there instead of {seconds_text(times[standby.stage])}"
        for standby in plan.standbys
    ]
    if covered(plan):
        lines.append("  after the loss of any one board each stage is still loaded somewhere")
    return lines


def _table(plan: Plan) -> list[str]:
    rows = [("stage", "device", "engine", "holds", "memory", "of", "compute", "hop", "hop bytes", "prefill chunk")]
    for stage in plan.stages:
        chunk_s = stage.prefill_chunk_s
        rows.append(
            (
                str(stage.stage),
                stage.device,
                stage.engine,
                blocks_text(stage.embedding, stage.first_block, stage.end_block, stage.head),
                bytes_text(stage.memory_bytes),
                bytes_text(stage.memory_limit_bytes),
                seconds_text(stage.compute_s),
                seconds_text(stage.hop_s),
                f"{stage.hop_bytes}" + (f" {stage.row_codec}" if stage.row_codec != AS_IS else ""),
                seconds_text(chunk_s) if chunk_s is not None else "not measured",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _errors(plan: Plan) -> list[str]:
    """What each coded cut costs."""
    coded = [stage for stage in plan.stages if stage.codec != AS_IS]
    if not coded:
        return []
    lines = [
        f"  {stage.device}: {stage.codec}{'' if stage.row_codec == stage.codec else ' for prompts'}, perplexity up by "
        f"{stage.error_percent:.2g} % at most, logits {stage.logit_error:.2g} apart"
        for stage in coded
    ]
    return ["", f"what codecs cost (all: {plan.perplexity_increase_percent:.2g} % at most)", *lines]


def _changes(plan: Plan, graph: Graph, candidates: Sequence[Candidate]) -> list[str]:
    question = Question(graph, request_of(plan), candidates)
    now = question.solved()
    if now is None:
        return ["on today's figures there is no plan at all: plan again to see what is missing"]
    lines = [_binding(now)]
    if now.value < figure(plan) * (1 - WORTH_SAYING):
        lines.append(f"today's figures allow a better plan: {figure_text(plan.objective, now.value)}")
    devices = [cost.device for cost in now.priced.costs]
    used = [device for device in devices if now.run_of(device)]
    asked = [*used, *(device for device in devices if device not in used)][:MAX_ASKED]
    lines += filter(None, (_with_memory(question, now, device) for device in asked))
    lines += filter(None, (_with_link(question, now, device) for device in asked))
    if len(devices) > now.priced.request.boards_at_least:
        lines += [_without(question, now, device) for device in used[:MAX_ASKED]]
    return lines + sensitivity(question, now)


def _binding(now: Answer) -> str:
    """Which resource the time goes to."""
    problem, placement = now.priced.problem, now.solution.placement
    if now.priced.request.objective == "throughput":
        filled = problem.filled(len(placement))
        stage_s = {now.priced.costs[r.device].device: filled.run_s(r) for r in placement}
        slowest = max(stage_s, key=lambda device: stage_s[device])
        if now.solution.pace_s > now.solution.slowest_s * (1 + WORTH_SAYING):
            ring, pace = seconds_text(now.solution.latency_s), seconds_text(now.solution.pace_s)
            slots = now.priced.request.slots
            count = f"{slots} requests at once" if slots != 1 else "one request at a time"
            return f"the time once round the boards binds: {ring} for {count}, {pace} per token"
        if stage_s[slowest] >= now.solution.slowest_s * (1 - WORTH_SAYING):
            return f"compute on {slowest} binds: {seconds_text(stage_s[slowest])} per token"
        return f"a link binds: {seconds_text(now.solution.slowest_s)} per token"
    hop_s = sum(float(problem.hop_s[a, b, cut]) for a, b, cut in hops(problem, placement))
    share = hop_s / now.solution.latency_s if now.solution.latency_s else 0.0
    if share > 0.5:
        return f"the links bind: {share:.0%} of a token's time is spent in hops"
    return f"compute binds: {1 - share:.0%} of a token's time, {share:.0%} is spent in hops"


def _with_memory(question: Question, now: Answer, device: str) -> str:
    """'with 40 MB more memory pi5 would take 4 more blocks: 12.1 instead of 14.2 ms'; '' if memory doesn't bind it."""
    plenty = question.solved(_giving(device, lambda usable: usable * PLENTY))
    if plenty is None or not better(plenty, now):
        return ""
    run = plenty.run_of(device)
    if run is None:
        return ""
    cost = plenty.priced.costs[run.device]
    _, needed_bytes = stage_memory(plenty.priced.graph, plenty.priced.workload, cost, plenty.priced.modules(run))
    usable_bytes = max(int(needed_bytes / (1 - RESERVE_FRACTION)) + 1, needed_bytes + RESERVE_MIN_BYTES)
    enough = question.solved(_giving(device, lambda _usable: usable_bytes))
    before = next(candidate.usable_memory_bytes for candidate in question.candidates if candidate.device == device)
    if enough is None or not better(enough, now) or usable_bytes <= before:
        return ""
    more = enough.blocks_of(device) - now.blocks_of(device)
    share = f"take {more} more blocks" if more > 1 else "take one more block" if more == 1 else "share otherwise"
    return f"with {bytes_text(usable_bytes - before)} more memory {device} would {share}: {instead(enough, now)}"


def _giving(device: str, usable: Callable[[int], int]) -> Callable[[Candidate], Candidate]:
    def change(candidate: Candidate) -> Candidate:
        if candidate.device != device:
            return candidate
        return msgspec.structs.replace(candidate, usable_memory_bytes=usable(candidate.usable_memory_bytes))

    return change


def _with_link(question: Question, now: Answer, device: str) -> str:
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
    if faster is None or not better(faster, now):
        return ""
    return f"with a link as good as {best}'s, {device} would save time: {instead(faster, now)}"


def _without(question: Question, now: Answer, device: str) -> str:
    rest = question.solved(lambda candidate: None if candidate.device == device else candidate)
    if rest is None:
        return f"without {device} there is no plan"
    return f"without {device}: {instead(rest, now)}"
