"""Is the plan that the planner chooses the best one? All others are deployed and measured, too.

Three unequal boards, real weights, for throughput: as many streams as stages. Two cuts at eight places each make 28
plans in the order of the chosen one; every one of them is put in force by pins, and answers are timed. Beside them: a
split into equal numbers of blocks, and one by free memory. A round measures all of them once, in an order of its own;
the figure of a plan is the median over rounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median
from typing import Any, Final

from benchmarks.parts import load
from benchmarks.parts.prompts import prompt
from benchmarks.parts.random_shelves import OPEN_LINK, fetched_everywhere, relink, say
from benchmarks.parts.sites import MODEL, Site, whole_site
from benchmarks.report import Figure, at_least, at_most
from coordinator.inference.requests import GenerateRequest
from coordinator.journal import DeployRequest
from testbed import links
from testbed.boards import BoardSpec

_GIB: Final = 1 << 30

# Unequal in speed, and otherwise in memory: the slowest has the most.
BOARDS: Final = (
    BoardSpec(name="fast", speed=0.6, memory_bytes=_GIB // 2, link=OPEN_LINK),
    BoardSpec(name="middle", speed=0.3, memory_bytes=_GIB, link=OPEN_LINK),
    BoardSpec(name="slow", speed=0.15, memory_bytes=2 * _GIB, link=OPEN_LINK),
)
CUTS: Final = 8
CONTEXT_TOKENS: Final = 256
PROMPT_TOKENS: Final = 104
TOKENS: Final = 64
"""Of an answer. Where the first one ends before the last has begun, as prompts take long on a slow plan, all are asked
for twice as much."""
AGAINST: Final = 1.3

Shares = tuple[tuple[str, int], ...]
"""Boards in the ring's order, with their numbers of blocks."""


def pins_of(shares: Shares) -> tuple[tuple[str, str], ...]:
    """The ends of each stage on its board; embedding and head with the first and the last, which may have no block."""
    pins = [("embedding", shares[0][0])]
    first = 0
    for board, blocks in shares:
        pins += [(f"block.{block}", board) for block in sorted({first, first + blocks - 1}) if blocks]
        first += blocks
    return (*pins, ("head", shares[-1][0]))


def cuts_around(chosen: Sequence[int], blocks: int, count: int = CUTS) -> list[int]:
    """Places of cuts: those of the chosen plan, and others evenly over the model."""
    even = [round(blocks * number / (count + 1)) for number in range(1, count + 1)]
    places = [place for place in dict.fromkeys(chosen) if 0 < place < blocks]
    for place in sorted(even, key=lambda at: -min((abs(at - known) for known in places), default=0)):
        if len(places) < count and place not in places:
            places.append(place)
    return sorted(places)


def all_shares(order: Sequence[str], cuts: Sequence[int], blocks: int) -> list[Shares]:
    """Every plan of three boards in this order, cut at two of the places."""
    return [
        ((order[0], one), (order[1], other - one), (order[2], blocks - other)) for one, other in combinations(cuts, 2)
    ]


def by_parts(order: Sequence[str], parts: Mapping[str, float], blocks: int) -> Shares:
    """Blocks in proportion to `parts`, at least one for each board."""
    whole = sum(parts[name] for name in order)
    first = min(blocks - 2, max(1, round(blocks * parts[order[0]] / whole)))
    second = min(blocks - first - 1, max(1, round(blocks * parts[order[1]] / whole)))
    return ((order[0], first), (order[1], second), (order[2], blocks - first - second))


def measure(precision: str, rounds: int, seed: int) -> tuple[list[Figure], dict[str, Any]]:
    """Figures, and the seconds per token of each plan."""
    with whole_site(precision, BOARDS) as site:
        names = [board.name for board in BOARDS]
        fetched_everywhere(site, names, precision)
        relink(site, dict.fromkeys(names, links.ETHERNET))
        wanted = DeployRequest(
            model=MODEL, precision=precision, objective="throughput", context_tokens=CONTEXT_TOKENS, slots=len(names),
            boards_at_least=len(names), topology="central",
        )  # fmt: skip
        plan = site.there.last("/v1/plan", wanted, say)["plan"]
        stages = plan["stages"]
        order = [stage["device"] for stage in stages]
        blocks = stages[-1]["end_block"]
        chosen: Shares = tuple((stage["device"], stage["end_block"] - stage["first_block"]) for stage in stages)
        free = {board.name: float(board.memory_bytes) for board in BOARDS}
        equal, by_memory = by_parts(order, dict.fromkeys(order, 1.0), blocks), by_parts(order, free, blocks)
        places = cuts_around([stage["end_block"] for stage in stages[:-1]], blocks)
        plans = list(dict.fromkeys([chosen, equal, by_memory, *all_shares(order, places, blocks)]))
        rng, seconds = random.Random(seed), {shares: list[float]() for shares in plans}
        for number in range(rounds):
            for shares in rng.sample(plans, len(plans)):
                seconds[shares].append(_token_s(site, shares, precision))
                say(f"round {number + 1}: {_text(shares)}: {seconds[shares][-1] * 1e3:.1f} ms per token")
    found = {shares: median(values) for shares, values in seconds.items()}
    return figures(chosen, equal, by_memory, found), {_text(shares): values for shares, values in seconds.items()}


def _text(shares: Shares) -> str:
    return " ".join(f"{board}:{blocks}" for board, blocks in shares)


def _token_s(site: Site, shares: Shares, precision: str) -> float:
    """Seconds per token of all streams together, on one plan."""

    def request(number: int, tokens: int) -> GenerateRequest:
        return GenerateRequest(
            model=MODEL, prompt=prompt(PROMPT_TOKENS - number), raw=True, max_tokens=tokens, ignore_stop=True,
            precision=precision, objective="throughput", context_tokens=CONTEXT_TOKENS, slots=len(shares),
            boards_at_least=len(shares), pins=pins_of(shares), speculate="off", topology="central",
        )  # fmt: skip

    load.together(site.there.url, [request(number, 4) for number in range(len(shares))])
    for tokens in (TOKENS, 2 * TOKENS):
        rate = load.steady_rate(load.together(site.there.url, [request(n, tokens) for n in range(len(shares))]))
        if not math.isnan(rate):
            return 1 / rate
    raise SystemExit(f"{_text(shares)}: its answers were never under way at the same time")


def figures(chosen: Shares, equal: Shares, by_memory: Shares, found: Mapping[Shares, float]) -> list[Figure]:
    best = min(found, key=lambda shares: found[shares])
    return [
        Figure("plans measured", len(found), ""),
        Figure(f"chosen ({_text(chosen)})", found[chosen] * 1e3, "ms/token"),
        Figure(f"best ({_text(best)})", found[best] * 1e3, "ms/token"),
        at_most("chosen / best", found[chosen] / found[best], "ratio", 1.05),
        at_least(f"equal split ({_text(equal)}) / chosen", found[equal] / found[chosen], "ratio", AGAINST),
        at_least(f"by free memory ({_text(by_memory)}) / chosen", found[by_memory] / found[chosen], "ratio", AGAINST),
    ]
