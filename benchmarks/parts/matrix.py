"""Every prompt length, number of requests, number of boards and kind of link, each figure beside its bound.

    tokens/s    one stream: its rate, beside 1 / (stages' own seconds + one crossing per hop).
                several: of all together while all of them run, beside what the busiest stage gives when it never waits
                (its rows / its seconds in decode steps). Where no moment sees all of them at once (long prompts enter
                for longer than the first answers last), from the first request to the last token, marked *, beside the
                tokens / all seconds of the busiest stage.
    first       first tokens, the middle one and the last one, beside the pipeline's bound for all chunks of all prompts
                (coordinator.planning.prefill.pipelined_s).
    p50, p99    between two tokens of a request, beside one step round the ring (its mean seconds at all stages, one
                crossing per hop), or one turn of all requests at the busiest stage where that is longer.
    bytes       per token over all hops, beside the formula of the plan.
    memory      largest worker.

Efficiency is bound / measured, or measured / bound for rates: 1 is perfect. Stages' seconds come from their own
counters over the same answers; a crossing of the link is measured by plain TCP. Boards are slowed to a share of a core
(benchmarks.parts.prompts says why), the same share in every cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from math import ceil, isnan, nan
from statistics import median
from typing import Any

import msgspec
from msgspec import Struct

from benchmarks.parts import links, load
from benchmarks.parts.prompts import hidden_bytes_of, prompt
from benchmarks.parts.requests import at_share
from benchmarks.parts.sites import LINKS, MODEL, SLOWED, site
from benchmarks.report import Figure
from coordinator.inference.requests import GenerateRequest
from coordinator.planning.prefill import pipelined_s
from testbed import links as links_of
from testbed.boards import preset

PROMPTS = (32, 128, 512)
REQUESTS = (1, 2, 4, 8)
BOARDS = (1, 2, 4)
SLOTS = 8
CONTEXT_TOKENS = 1024
REST_S = 0.03
"""Between two messages of plain TCP: about a token's time (benchmarks.parts.links says why)."""
LEAST_STEADY = 16
"""Tokens of each request within the moments that all share, for a rate to be made of them."""


class Choice(Struct, frozen=True):
    """Which cells."""

    links: tuple[str, ...] = LINKS
    boards: tuple[int, ...] = BOARDS
    prompts: tuple[int, ...] = PROMPTS
    requests: tuple[int, ...] = REQUESTS
    tokens: int = 64


class Way(Struct, frozen=True):
    """A kind of link: one crossing of a row by plain TCP, and its rate."""

    name: str
    raw_s: float
    rate: float | None


class Cell(Struct, frozen=True):
    """One row of the table. Rates in tokens/s, the rest in the units of the names; `bounds` by name of the figure."""

    link: str
    boards: int
    prompt: int
    requests: int
    whole: bool
    """Whether the rate is of the whole time, instead of the moments that all requests share."""
    figures: dict[str, float]
    bounds: dict[str, float]

    def efficiency(self, name: str) -> float:
        measured, bound = self.figures[name], self.bounds[name]
        return measured / bound if name == "rate" else bound / measured


Counters = dict[int, dict[str, float]]


def measure(choice: Choice, precision: str) -> Iterator[Cell]:
    """All cells, in order; one site for each kind of link, one deployment for each number of boards."""
    for link in choice.links:
        spec = links_of.preset(link)
        way = Way(link, links.one_way_s(link, REST_S), spec.rate_bytes_per_s if spec is not None else None)
        specs = [msgspec.structs.replace(board, speed=SLOWED) for board in preset("equal", max(choice.boards), link)]
        with site(precision, specs) as there:
            for boards in choice.boards:
                load.together(there.url, [_request(precision, boards, 48, 12, number) for number in range(2)])
                [deployment] = there.get("/v1/status")["deployments"]
                before = load.settled_counters(there.url)
                for length, count in product(choice.prompts, choice.requests):
                    asked = [_request(precision, boards, length, choice.tokens, number) for number in range(count)]
                    streams = load.together(there.url, asked)
                    after = load.settled_counters(there.url)
                    yield cell(way, deployment["plan"], length, streams, before, after)
                    before = after


def _request(precision: str, boards: int, length: int, tokens: int, number: int) -> GenerateRequest:
    return GenerateRequest(
        model=MODEL, prompt=prompt(length - number % 4), raw=True, max_tokens=tokens, ignore_stop=True, speculate="off",
        precision=precision, objective="throughput", context_tokens=CONTEXT_TOKENS, slots=SLOTS,
        boards_at_least=boards, boards_at_most=boards,
    )  # fmt: skip


def cell(
    way: Way, plan: dict[str, Any], length: int, streams: Sequence[load.Stream], before: Counters, after: Counters
) -> Cell:
    """What these answers show; the counters are those of just before and after them."""
    stages = sorted(after)
    count, boards = len(streams), len(stages)

    def grown(name: str) -> list[float]:
        return [after[stage][name] - before[stage][name] for stage in stages]

    rows, decode_s, prefill_s = grown("decode_rows"), grown("decode_busy_s"), grown("prefill_busy_s")
    steps = grown("prefill_steps")
    row_s = [seconds / made for seconds, made in zip(decode_s, rows, strict=True)]
    gaps_s = [gap for one in streams for gap in one.gaps_s]
    first_s = sorted(one.tokens_s[0] for one in streams)
    began_s = min(one.asked_s for one in streams)
    hops_s = boards * way.raw_s if boards > 1 else 0.0
    step_s = [seconds / made for seconds, made in zip(decode_s, grown("decode_steps"), strict=True)]
    ring_s = sum(step_s) + hops_s
    rate, rate_bound, whole = _rates(streams, row_s, decode_s, prefill_s, ring_s)
    gap_s = ring_s if whole else max(ring_s, count * max(row_s))
    figures = {
        "rate": rate,
        "first": median(one.first_s for one in streams),
        "last first": first_s[-1] - began_s,
        "p50": at_share(gaps_s, 0.5),
        "p99": at_share(gaps_s, 0.99),
        "bytes": sum(grown("decode_sent_bytes")) / rows[0],
        "memory": max(after[stage]["resident_bytes"] for stage in stages),
    }
    bounds = {
        "rate": rate_bound,
        "last first": _first_bound_s(way, plan, streams, steps, prefill_s),
        "p50": gap_s,
        "p99": gap_s,
        "bytes": float(sum(stage["hop_bytes"] for stage in plan["stages"])) if boards > 1 else nan,
    }
    return Cell(way.name, boards, length, count, whole, figures, bounds)


def _rates(
    streams: Sequence[load.Stream],
    row_s: Sequence[float],
    decode_s: Sequence[float],
    prefill_s: Sequence[float],
    ring_s: float,
) -> tuple[float, float, bool]:
    """(tokens per second, its bound, whether both are of the whole time)."""
    if len(streams) == 1:
        [one] = streams
        return load.rate_within(one, one.tokens_s[0], one.tokens_s[-1]), 1 / ring_s, False
    if load.shared_tokens(streams) >= LEAST_STEADY * len(streams):
        return load.steady_rate(streams), 1 / max(row_s), False
    tokens = sum(len(one.tokens_s) for one in streams)
    took_s = max(one.tokens_s[-1] for one in streams) - min(one.asked_s for one in streams)
    busiest_s = max(decode + prefill for decode, prefill in zip(decode_s, prefill_s, strict=True))
    return tokens / took_s, tokens / busiest_s, True


def _first_bound_s(
    way: Way, plan: dict[str, Any], streams: Sequence[load.Stream], steps: Sequence[float], prefill_s: Sequence[float]
) -> float:
    """For the last first token: the chunks of all prompts through the pipeline, one behind the other."""
    stages_s = [seconds / made for seconds, made in zip(prefill_s, steps, strict=True)]
    rows = ceil(sum(int(one.end["prompt_tokens"]) for one in streams) / steps[0])
    chunk_s = rows * hidden_bytes_of(plan) / way.rate if way.rate and len(stages_s) > 1 else 0.0
    hops_s = [way.raw_s + chunk_s] * (len(stages_s) - 1)
    return pipelined_s(stages_s, hops_s, [chunk_s], int(steps[0])) + way.raw_s


COLUMNS: Sequence[tuple[str, str, float]] = (
    ("rate", "tokens/s", 1.0),
    ("first", "first s", 1.0),
    ("last first", "last s", 1.0),
    ("p50", "p50 ms", 1e3),
    ("p99", "p99 ms", 1e3),
    ("bytes", "bytes", 1.0),
    ("memory", "MB", 1e-6),
)
"""Figure, heading, and what it is multiplied with."""
WITH_BOUND = ("rate", "last first", "p50", "p99", "bytes")


def heading() -> str:
    cells = [f"{'link':9}boards  prompt  requests "]
    for name, text, _ in COLUMNS:
        cells.append(f"{text:>9}" + (f"{'bound':>9}{'eff.':>6}" if name in WITH_BOUND else ""))
    return "".join(cells)


def line(one: Cell) -> str:
    cells = [f"{one.link:9}{one.boards:6}  {one.prompt:6}  {one.requests:8} "]
    for name, _, factor in COLUMNS:
        mark = "*" if name == "rate" and one.whole else ""
        cells.append(f"{_short(one.figures[name] * factor) + mark:>9}")
        if name in WITH_BOUND:
            known = not isnan(one.bounds[name])
            cells.append(f"{_short(one.bounds[name] * factor) if known else '-':>9}")
            cells.append(f"{one.efficiency(name):6.2f}" if known else f"{'-':>6}")
    return "".join(cells)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


UNITS = {"rate": "tokens/s", "bytes": "bytes", "memory": "bytes"}
"""Of figures; the others are seconds."""


def figures(cells: Iterable[Cell]) -> list[Figure]:
    """All of them, for the document that machines read."""
    rows = []
    for one in cells:
        name = f"{one.link}, {one.boards} boards, prompt of {one.prompt}, {one.requests} requests"
        for what, value in one.figures.items():
            rows.append(Figure(f"{name}: {what}", value, UNITS.get(what, "s")))
            if what in one.bounds and not isnan(one.bounds[what]):
                rows.append(Figure(f"{name}: {what}, bound", one.bounds[what], UNITS.get(what, "s")))
                rows.append(Figure(f"{name}: {what}, efficiency", one.efficiency(what), "ratio"))
    return rows
