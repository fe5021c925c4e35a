"""What a stage remembers of its requests: which rows came, which were run, what is left to do. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from wire.channel import Delivery
from wire.errors import EdgelamError
from wire.messages import Sampling


class Tally(Struct):
    """Totals since the worker started."""

    requests: int = 0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_busy_s: float = 0.0
    decode_steps: int = 0
    decode_busy_s: float = 0.0
    decode_sent_bytes: int = 0
    """What crossed to the next stage in decode: one row of hidden states, or one token, per step."""
    stale: int = 0
    """Parcels of another epoch."""
    refused: int = 0
    """Parcels that don't fit this stage or any request of it."""
    unsent: int = 0
    """Parcels that could not be sent for want of a connection or of credit."""
    idle: int = 0
    """Requests that were freed because nothing came."""


@dataclass(slots=True, eq=False)
class Live:
    """A request that holds a slot. `run` rows went through the engine, `filed` rows arrived."""

    request: int
    slot: int
    reply: str
    sampling: Sampling
    prompt_tokens: int
    max_new_tokens: int
    stop_ids: frozenset[int]
    idle_timeout_s: float
    meta: bytes
    seen_s: float
    run: int = 0
    filed: int = 0


class Made(Struct, frozen=True, eq=False, gc=False, kw_only=True):
    """A step that was made, and what became of it."""

    live: Live
    position: int
    busy_s: float = 0.0
    result: Any = None
    """What the engine gave, valid until its next step."""
    token: int = -1
    """What the head drew of it, -1 if it draws nothing."""
    sent_bytes: int = 0
    """The frame that has gone to the next stage already; 0 if it is still to be sent."""
    error: EdgelamError | None = None


@dataclass(slots=True, eq=False)
class Unit:
    """One step to make: rows for one request. `delivery` is given back when they were used."""

    live: Live
    rows: Any
    count: int
    final: bool
    delivery: Delivery | None = None
    meta: bytes = b""


def chunks_of(count: int, chunk: int) -> list[tuple[int, int]]:
    """Cut `count` rows into pieces [start, end) of at most `chunk`; none has one row unless there is only one.

    One row runs through other kernels than many: a chunk of one would change the arithmetic of a prompt. The last
    piece borrows a row from the one before, which has at least 2 (`chunk` >= 2; with 2, the last has 3).
    """
    starts = list(range(0, count, chunk))
    ends = [min(start + chunk, count) for start in starts]
    if len(starts) > 1 and ends[-1] - starts[-1] == 1:
        if chunk == 2:
            ends[-2] = ends[-1]
            del starts[-1], ends[-1]
        else:
            starts[-1] -= 1
            ends[-2] -= 1
    return list(zip(starts, ends, strict=True))
