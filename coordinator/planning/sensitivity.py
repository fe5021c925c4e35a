"""How much would have to change for another plan to be better: speeds of boards, links, one more board. Pure.

A board's speed is moved until the plan as it is loses WORTH_MOVING to the best one; where that happens is found by
bisection, with the very search that made the plan. What is asked is bounded: with many boards a search takes long, so
fewer boards are asked about.
"""

from __future__ import annotations

import dataclasses
from typing import Final

import msgspec
import numpy as np

from coordinator.planning import partition
from coordinator.planning.ordered import solve_any
from coordinator.planning.partition import Problem, Run, Solution
from coordinator.planning.planner import WORTH_MOVING
from coordinator.planning.questions import WORTH_SAYING, Answer, Question, instead
from coordinator.planning.reasons import block_s
from wire.units import seconds_text

MOST_TIMES: Final = 8.0
"""A board that is eight times as fast is another board."""

STEPS: Final = 5
"""Of each bisection, in ratios: of 8 it leaves 7 %."""

FEW: Final = 5
"""Boards for all of which speeds are asked; a search over more takes longer, and MAX_ASKED of them are asked about."""
MAX_ASKED: Final = 2

MAX_NAMED: Final = 2
"""Boards whose shares a line names."""

MAX_LIKE: Final = 3
"""Boards of which one more is tried."""

LINK_TIMES: Final = 2.0
MORE: Final = "+"
"""Behind the name of a board of which there is one more."""


def sensitivity(question: Question, now: Answer) -> list[str]:
    """Lines on speeds, links, and one more board; the first two where the plan is for speed alone."""
    request = now.priced.request
    lines = []
    if request.objective in ("latency", "throughput") and request.tokens_per_s is None:
        lines += _speeds(now)
        lines += _links(now)
    return lines + _one_more(question, now)


def _figure_s(problem: Problem, placement: partition.Placement, objective: str) -> float:
    figure = partition.latency_s if objective == "latency" else partition.pace_s
    return figure(problem, placement)


def _solved(now: Answer, problem: Problem) -> tuple[Solution | None, float]:
    """The best plan of a changed problem, and by how much of its time the plan of today is slower there."""
    request = now.priced.request
    best = solve_any(problem, request.objective, request.boards_at_least, request.boards_at_most)
    if best is None:
        return None, 0.0
    least_s = _figure_s(problem, best.placement, request.objective)
    kept_s = _figure_s(problem, now.solution.placement, request.objective)
    return best, kept_s / least_s - 1 if least_s > 0 else 0.0


def _with_speed(problem: Problem, device: int, times: float) -> Problem:
    """A board whose steps take so many times as long."""
    factors = np.ones(len(problem.devices))
    factors[device] = times
    return problem.slower(np.zeros_like(problem.seconds), factors)


def _speeds(now: Answer) -> list[str]:
    """For each board that is asked about, from where on it would have another share, slower and faster."""
    problem = now.priced.problem
    used = [run.device for run in sorted(now.solution.placement, key=lambda run: run.first - run.end)]
    rest = sorted(set(range(len(problem.devices))) - set(used), key=lambda d: block_s(now.priced, now.priced.costs[d]))
    asked = [*used, *rest][: FEW if len(problem.devices) <= FEW else MAX_ASKED]
    lines = [f"what a board's speed would have to be for another plan to save {WORTH_MOVING:.0%} of the time"]
    steady: list[str] = []
    for device in asked:
        name = problem.devices[device]
        found = [
            line
            for faster in ((False, True) if device in used else (True,))
            if (line := _turn(now, device, name, faster))
        ]
        lines += found
        if not found:
            steady.append(name)
    if steady:
        lines.append(f"  {', '.join(steady)} up to {MOST_TIMES:g} times slower or faster: none saves as much")
    return lines


def _turn(now: Answer, device: int, name: str, faster: bool) -> str:
    """'  pi4 1.6 times slower: pi4 2 blocks (now 5), nuc 13 blocks (now 10)'; '' if none would."""
    problem = now.priced.problem

    def at(times: float) -> tuple[Solution | None, float]:
        return _solved(now, _with_speed(problem, device, 1 / times if faster else times))

    best, lost = at(MOST_TIMES)
    if best is None or lost < WORTH_MOVING:
        return ""
    low, high, there = 1.0, MOST_TIMES, best
    for _ in range(STEPS):
        middle = (low * high) ** 0.5
        best, lost = at(middle)
        if best is not None and lost >= WORTH_MOVING:
            high, there = middle, best
        else:
            low = middle
    return f"  {name} {high:.1f} times {'faster' if faster else 'slower'}: {_shares(now, there)}"


def _shares(now: Answer, other: Solution) -> str:
    """'pi4 2 blocks (now 5 blocks), nuc ...', of the boards whose shares change most."""
    before = {run.device: run for run in now.solution.placement}
    after = {run.device: run for run in other.placement}

    def size(run: Run | None) -> int:
        return run.end - run.first if run else 0

    shares = {d: (_share(now, after.get(d)), _share(now, before.get(d))) for d in {**after, **before}}
    changed = [d for d, (then, today) in shares.items() if then != today]
    changed.sort(key=lambda d: (-abs(size(after.get(d)) - size(before.get(d))), d))
    words = [f"{now.priced.costs[d].device} {shares[d][0]} (now {shares[d][1]})" for d in changed[:MAX_NAMED]]
    return ", ".join(words) or "the same shares in another order"


def _share(now: Answer, run: Run | None) -> str:
    """'all', 'nothing', 'embedding + 6 blocks'."""
    if run is None:
        return "nothing"
    kinds = [module.kind for module in now.priced.modules(run)]
    if len(kinds) == len(now.priced.graph.modules):
        return "all"
    blocks = kinds.count("block")
    parts = ["embedding"] if "embedding" in kinds else []
    parts += [f"{blocks} block{'s' * (blocks != 1)}"] if blocks else []
    return " + ".join([*parts, *(["head"] if "head" in kinds else [])])


def _links(now: Answer) -> list[str]:
    """What links of half the delay and twice the rate would bring."""
    problem = now.priced.problem
    better = dataclasses.replace(problem, hop_s=problem.hop_s / LINK_TIMES, transfer_s=problem.transfer_s / LINK_TIMES)
    request = now.priced.request
    best, _ = _solved(now, better)
    if best is None or len(problem.devices) < 2:
        return []
    figure_s = _figure_s(better, best.placement, request.objective)
    what = f"with all links {LINK_TIMES:g} times as good"
    if figure_s >= now.value * (1 - WORTH_SAYING):
        return [f"{what}: nothing gained"]
    return [f"{what}: {seconds_text(figure_s)} instead of {seconds_text(now.value)} per token"]


def _one_more(question: Question, now: Answer) -> list[str]:
    """What one more board would bring, at the best one more of a kind that is there."""
    most = now.priced.request.boards_at_most
    if most is not None and len(now.solution.placement) >= most:
        return []
    by_speed = sorted(now.priced.costs, key=lambda cost: (block_s(now.priced, cost), cost.device))
    answers: list[tuple[str, Answer]] = []
    for cost in by_speed[:MAX_LIKE]:
        [like] = [candidate for candidate in question.candidates if candidate.device == cost.device]
        more = msgspec.structs.replace(like, device=like.device + MORE)
        answer = Question(question.graph, question.request, [*question.candidates, more]).solved()
        if answer is not None:
            answers.append((cost.device, answer))
    if not answers:
        return []
    name, best = min(answers, key=lambda found: found[1].value)
    if best.value >= now.value * (1 - WORTH_SAYING):
        return ["one more board, like any of these, would not make a token faster"]
    return [f"with one more {name}: {instead(best, now)}"]
