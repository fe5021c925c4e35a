"""Requests at the same time: tokens per second of all together, beside the slowest stage's bound; how even they come.

Boards are slowed to a share of a core (benchmarks.parts.prompts says why). The bound is the slowest stage: a pipeline
gives no more than that stage does when it never waits, so many rows as it ran per second that it spent in decode steps.
It is compared with the rate while all requests run; the share of the whole time for which the busiest stage works is
lower, since the prompts' entry and the end, where some requests are over, are in it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from benchmarks.parts import load
from benchmarks.parts.prompts import LONG, prompt
from benchmarks.report import Figure, at_least, at_most
from coordinator.inference.requests import GenerateRequest

COUNTS = (1, 2, 4, 8)
Make = Callable[..., GenerateRequest]

LIGHT_BYTES, LOADED_BYTES = 120e6, 150e6
"""Most resident memory of a worker with one request, and with eight."""


def busiest(before: dict[int, dict[str, float]], after: dict[int, dict[str, float]], seconds: float) -> float:
    """Share of the time for which the busiest stage computed."""
    return max(
        sum(after[stage][kind] - before[stage][kind] for kind in ("decode_busy_s", "prefill_busy_s")) / seconds
        for stage in after
    )


def stage_rate(before: dict[int, dict[str, float]], after: dict[int, dict[str, float]]) -> float:
    """Tokens per second of the slowest stage if it never waited: rows by seconds in decode steps."""

    def grown(stage: int, name: str) -> float:
        return after[stage][name] - before[stage][name]

    return min(grown(stage, "decode_rows") / grown(stage, "decode_busy_s") for stage in after)


def at_share(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies; the largest one for few."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def entering(link: str, url: str, make: Make, boards: int) -> list[Figure]:
    """How a long prompt that enters delays the answers under way: their gaps between its request and its first token,
    against the median of all their gaps."""
    where = {"boards_at_least": boards, "boards_at_most": boards, "raw": True}
    running = [make(prompt=prompt(40 + number), max_tokens=160, **where) for number in range(3)]
    entrant: list[load.Stream] = []

    def enter() -> None:
        time.sleep(1.5)
        entrant.append(load.stream(url, make(prompt=prompt(LONG), max_tokens=2, **where)))

    late = threading.Thread(target=enter)
    late.start()
    streams = load.together(url, running)
    late.join()
    [one] = entrant
    middle_s = at_share([gap for each in streams for gap in each.gaps_s], 0.5)
    meanwhile = [
        later - earlier
        for each in streams
        for earlier, later in zip(each.tokens_s, each.tokens_s[1:], strict=False)
        if later > one.asked_s and earlier < one.tokens_s[0]
    ]
    ratio = at_share(meanwhile, 0.99) / middle_s
    return [
        Figure(f"{link}: first token of {LONG} while 3 others run", one.first_s, "s"),
        at_most(f"{link}: p99 gap while a prompt of {LONG} enters / median", ratio, "ratio", 3.0),
    ]


def figures(link: str, url: str, make: Make, boards: int, tokens: int) -> list[Figure]:
    """Rows for 1, 2, 4 and 8 requests; each number is asked once to warm up and once to be measured."""
    rows: list[Figure] = []
    rates: dict[int, float] = {}
    for count in COUNTS:
        many = [
            make(prompt=prompt(64 + number), raw=True, max_tokens=tokens, boards_at_least=boards, boards_at_most=boards)
            for number in range(count)
        ]
        load.together(url, many)
        before = load.settled_counters(url)
        streams = load.together(url, many)
        took_s = max(one.tokens_s[-1] for one in streams) - min(one.asked_s for one in streams)
        after = load.settled_counters(url)
        rates[count], bound = load.steady_rate(streams), stage_rate(before, after)
        gaps_s = sorted(gap for one in streams for gap in one.gaps_s)
        name = f"{link}, {count} request{'s' * (count > 1)}"
        limit = LOADED_BYTES if count == max(COUNTS) else LIGHT_BYTES
        resident = max(stage["resident_bytes"] for stage in after.values())
        rows += [
            Figure(f"{name}: together", rates[count], "tokens/s"),
            Figure(f"{name}: between tokens, p50", at_share(gaps_s, 0.5) * 1e3, "ms"),
            Figure(f"{name}: between tokens, p99", at_share(gaps_s, 0.99) * 1e3, "ms"),
            Figure(f"{name}: slowest stage's bound", bound, "tokens/s"),
            Figure(f"{name}: together / slowest stage's bound", rates[count] / bound, "ratio")
            if count < max(COUNTS)
            else at_least(f"{name}: together / slowest stage's bound", rates[count] / bound, "ratio", 0.8),
            Figure(f"{name}: busiest stage at work", busiest(before, after, took_s), "share"),
            at_most(f"{name}: largest worker", resident / 1e6, "MB", limit / 1e6),
        ]
    most = max(COUNTS)
    rows.append(at_least(f"{link}: {most} requests / 1", rates[most] / rates[1], "ratio", 4.0))
    return rows
