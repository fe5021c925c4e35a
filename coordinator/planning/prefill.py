"""How long a prompt takes until its first token, and in chunks of which size it should enter. Pure.

A prompt enters in chunks, so that all stages work at once: a stage computes one chunk while the next stage computes the
chunk before. With n chunks the first one passes all stages and hops, and the others follow at the pace of the slowest:

    first token = sum(stages) + sum(hops) + (n - 1) * max(slowest stage, busiest link)

Small chunks fill the pipeline sooner; each costs every stage what a step costs however few its rows are. Both are in
the boards' own measurements, so the size is chosen by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Final, NamedTuple

import msgspec

from coordinator.planning.cost import DeviceCost, Workload, central_s
from coordinator.planning.partition import Solution
from coordinator.planning.request import PROMPT_TOKENS as PROMPT_TOKENS
from coordinator.planning.request import Candidate, Priced, price
from coordinator.planning.topology import shorter

WORTH_CHUNKING: Final = 0.95
"""Smaller chunks are taken when the first token comes in at most so much of the time: measurements scatter, and a plan
should not change with them."""


class Prefill(NamedTuple):
    """Stages in their order, priced with prompts in chunks of one size, and when the first token comes: None where a
    board has not measured prefill."""

    workload: Workload
    costs: tuple[DeviceCost, ...]
    first_token_s: float | None


def pipelined_s(stages_s: Sequence[float], hops_s: Sequence[float], busy_s: Sequence[float], chunks: int) -> float:
    """The formula above: seconds per chunk of each stage, of each hop, and for which it keeps a link busy."""
    pace_s = max([*stages_s, *busy_s])
    return sum(stages_s) + sum(hops_s) + (chunks - 1) * pace_s


def first_token_s(priced: Priced, solution: Solution, costs: Sequence[DeviceCost], chunk: int) -> float | None:
    """Predict the first token of a prompt on a placement. `costs`: of its stages, priced for that size of chunk."""
    stages_s: list[float] = []
    hops_s: list[float] = []
    busy_s: list[float] = []
    row_bytes = max(priced.hop_bytes[1:-1], default=0)
    chunk_bytes = chunk * row_bytes
    for number, (run, cost) in enumerate(zip(solution.placement, costs, strict=True)):
        stage_s = cost.stage_prefill_s(priced.modules(run))
        if stage_s is None:
            return None
        stages_s.append(stage_s)
        if number + 1 < len(costs):
            after = costs[number + 1]
            one, other = cost.link, after.link
            if one is None or other is None:
                return None
            through_s = central_s(one, other, chunk_bytes)
            busiest_s = chunk_bytes / min(one.bytes_per_s, other.bytes_per_s)
            way = priced.direct.get((cost.device, after.device))
            # The way is chosen by what rows of answers take.
            straight = way is not None and shorter(way.hop_s(row_bytes), central_s(one, other, row_bytes))
            hops_s.append(way.hop_s(chunk_bytes) if way is not None and straight else through_s)
            busy_s.append(way.transfer_s(chunk_bytes) if way is not None and straight else busiest_s)
    return pipelined_s(stages_s, hops_s, busy_s, max(1, ceil(priced.prompt_tokens / chunk)))


def choose_chunk(priced: Priced, candidates: Sequence[Candidate], solution: Solution, sizes: Sequence[int]) -> Prefill:
    """The size of chunk for a placement: the request's own, unless one of `sizes` is better by enough. Only the boards
    of the placement are priced again."""
    own = tuple(priced.costs[run.device] for run in solution.placement)
    chosen = [candidate for candidate in candidates if candidate.device in {cost.device for cost in own}]

    def at(chunk: int) -> Prefill:
        again = price(priced.graph, chosen, msgspec.structs.replace(priced.request, prefill_chunk_tokens=chunk))
        by_name = {cost.device: cost for cost in again.costs}
        costs = tuple(by_name[cost.device] for cost in own if cost.device in by_name)
        found_s = first_token_s(priced, solution, costs, chunk) if len(costs) == len(own) else None
        return Prefill(again.workload, costs, found_s)

    chunk = priced.request.prefill_chunk_tokens
    best = Prefill(priced.workload, own, first_token_s(priced, solution, own, chunk))
    if len(own) == 1:
        return best
    for size in sizes:
        found = at(size)
        if found.first_token_s is None or best.first_token_s is None:
            continue
        if found.first_token_s <= WORTH_CHUNKING * best.first_token_s:
            best = found
    return best
