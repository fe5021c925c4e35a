"""Time to first token: prompts of several lengths, on one board and through the pipeline.

Boards are slowed to a share of a core, so that all of them together do not need more cores than there are: a pipeline
of boards that share two cores would be measured by these.

Bound of the pipeline, with the stages' own seconds per chunk from the same answers and the crossing of a link measured
by plain TCP: coordinator.planning.prefill.pipelined_s.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from statistics import median
from typing import Any

from benchmarks.parts import load
from benchmarks.report import Figure, at_most
from coordinator.inference.requests import GenerateRequest
from coordinator.planning.prefill import pipelined_s

LENGTHS = (32, 128, 512)
LONG = 512
WORDS = ("the sea and the people who live by it " * 100).split()
Make = Callable[..., GenerateRequest]


def prompt(tokens: int) -> str:
    """About so many tokens: each of these words is one."""
    return " ".join(WORDS[:tokens])


def measure(url: str, make: Make, boards: int, rounds: int) -> dict[int, list[load.Stream]]:
    """Length -> answers of a few tokens."""
    found: dict[int, list[load.Stream]] = {}
    for length in LENGTHS:
        request = make(prompt=prompt(length), raw=True, max_tokens=3, boards_at_least=boards, boards_at_most=boards)
        load.stream(url, request)
        found[length] = [load.stream(url, request) for _ in range(rounds)]
    return found


def bound_s(url: str, make: Make, boards: int, rate: float | None, raw_s: float, hidden_bytes: int) -> float:
    """The pipeline's bound for the long prompt, from the counters of one answer."""
    request = make(prompt=prompt(LONG), raw=True, max_tokens=1, boards_at_least=boards, boards_at_most=boards)
    before = load.settled_counters(url)
    answer = load.stream(url, request)
    after = load.settled_counters(url)
    steps = [after[stage]["prefill_steps"] - before[stage]["prefill_steps"] for stage in sorted(after)]
    busy = [after[stage]["prefill_busy_s"] - before[stage]["prefill_busy_s"] for stage in sorted(after)]
    stages_s = [seconds / count for seconds, count in zip(busy, steps, strict=True)]
    rows = ceil(answer.end["prompt_tokens"] / steps[0])
    chunk_s = rows * hidden_bytes / rate if rate else 0.0
    hops_s = [raw_s + chunk_s] * (len(stages_s) - 1)
    return pipelined_s(stages_s, hops_s, [chunk_s], int(steps[0])) + raw_s


def figures(
    link: str, one: dict[int, list[load.Stream]], many: dict[int, list[load.Stream]], boards: int, bound: float
) -> list[Figure]:
    rows: list[Figure] = []
    seconds: dict[tuple[int, int], float] = {}
    for count, found in ((1, one), (boards, many)):
        for length, answers in found.items():
            seconds[count, length] = median(answer.first_s for answer in answers)
            what = "1 board" if count == 1 else f"{count} boards"
            rows.append(Figure(f"{link}: first token of {length}, {what}", seconds[count, length], "s"))
    long_s = seconds[boards, LONG]
    rows.append(Figure(f"{link}: bound of the pipeline for {LONG}", bound, "s"))
    rows.append(at_most(f"{link}: first token of {LONG} / bound", long_s / bound, "ratio", 1.3))
    rows.append(
        at_most(f"{link}: first token of {LONG}, {boards} boards / 1", long_s / seconds[1, LONG], "ratio", 0.45)
    )
    return rows


def hidden_bytes_of(plan: dict[str, Any]) -> int:
    """Payload of one row over a hop, header left out: rows of a chunk share one."""
    return max(int(stage["hop_bytes"]) for stage in plan["stages"]) - 64
