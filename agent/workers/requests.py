"""What a stage remembers of its requests: which rows came, which were run, what is left to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from msgspec import Struct

from agent.workers.drafting import Drafting
from models.engine.base import ContextFull, EngineFailed, StageEngine
from wire.channel import Delivery
from wire.errors import EdgelamError
from wire.messages import Sampling

STEPS_BESIDE: Final = 1.5
"""An answer under way waits on each stage for at most one piece of a prompt, and so takes about 2.5 times as long for a
token while one enters."""

LEAST_BESIDE: Final = 4
"""Fewer rows cost more each than they spare the answers: a step over 4 takes about twice as long as one over a single
row, one over 8 more than three times."""


class Tally(Struct):
    """Totals since the worker started."""

    requests: int = 0
    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_busy_s: float = 0.0
    decode_steps: int = 0
    decode_rows: int = 0
    """Rows that decode steps ran: a step runs one of each request of a group. Of guesses only the right ones."""
    decode_busy_s: float = 0.0
    decode_rows_run: int = 0
    """Rows that decode steps ran, those of wrong guesses too."""
    decode_context_tokens: int = 0
    """Rows in the cache before the step of each of these, added up."""
    drafts_sent: int = 0
    """Tokens that this stage, the first one, guessed for steps."""
    drafts_accepted: int = 0
    decode_sent_bytes: int = 0
    """What crossed to the next stage in decode: one row of hidden states, or one token, per row, and frames."""
    stale: int = 0
    """Parcels of another epoch."""
    refused: int = 0
    """Parcels that don't fit this stage or any request of it."""
    unsent: int = 0
    """Parcels that could not be sent for want of a connection or of credit."""
    idle: int = 0
    """Requests that were freed because nothing came."""

    def since(self, before: Tally) -> Tally:
        """What was added since then."""
        return Tally(**{name: getattr(self, name) - getattr(before, name) for name in self.__struct_fields__})


@dataclass(slots=True, eq=False)
class Live:
    """A request that holds a slot. `run` rows went through the engine, `filed` rows arrived, and of these `settled` are
    of tokens that were drawn; the others of tokens that were guessed (agent.workers.guessing)."""

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
    settled: int = 0
    replay_tokens: int = 0
    alone: bool = False
    speculate: int = 0
    padded: bool = False
    drafting: Drafting | None = None
    """At the first stage."""


class Made(Struct, frozen=True, eq=False, gc=False, kw_only=True):
    """A step that was made, and what became of it."""

    live: Live
    position: int
    busy_s: float = 0.0
    result: Any = None
    """What the engine gave, valid until its next step."""
    tokens: tuple[int, ...] = ()
    """What the head drew of it."""
    sent_bytes: int = 0
    """The frame that has gone to the next stage already; 0 if it is still to be sent."""
    error: EdgelamError | None = None
    ended_s: float = 0.0
    """When, by the clock of agent.workers.marks."""


@dataclass(slots=True, eq=False)
class Unit:
    """One step to make: rows for one request. `delivery` is given back when they were used; `lone`: one row that is run
    by itself, and waits with the chunks of prompts."""

    live: Live
    rows: Any
    count: int
    final: bool
    delivery: Delivery | None = None
    meta: bytes = b""
    lone: bool = False
    drafts: tuple[int, ...] = ()
    """Tokens that were guessed: what the rows but the first are of."""


def run_rows(engine: StageEngine, units: Sequence[Unit]) -> tuple[Any, dict[int, EdgelamError]]:
    """Make one step over a row of each of several requests: the results, and why rows failed, by their number.

    If the step as a whole can't be made, each row is run alone, so that only those fail that must.
    """
    rows = np.concatenate([unit.rows for unit in units])
    try:
        return engine.step_many([unit.live.slot for unit in units], rows, [unit.live.run for unit in units])
    except EngineFailed:
        results: list[Any] = []
        failed: dict[int, EdgelamError] = {}
        for index, unit in enumerate(units):
            try:
                results.append(engine.step(unit.live.slot, unit.rows, unit.live.run).reshape(-1).copy())
            except (ContextFull, EngineFailed) as error:
                failed[index] = error
                results.append(None)
        made = next((result for result in results if result is not None), None)
        if made is None:
            return None, failed
        return np.stack([made if result is None else result for result in results]), failed


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


def split(unit: Unit, rows: int) -> tuple[Unit, Unit]:
    """A piece of so many rows of a chunk of a prompt, and the rest; each has at least 2, as `chunks_of` has it."""
    piece = Unit(unit.live, unit.rows[:rows], rows, False, None, unit.meta)
    return piece, Unit(unit.live, unit.rows[rows:], unit.count - rows, unit.final, unit.delivery)


def rows_beside(tally: Tally, most: int) -> int:
    """How many rows of a prompt may go in one step while answers are under way: as many as take STEPS_BESIDE times as
    long as their steps, by this stage's own times; `most` before these are known."""
    if not tally.decode_steps or not tally.prefill_tokens or tally.prefill_busy_s <= 0:
        return most
    row_s = tally.prefill_busy_s / tally.prefill_tokens
    rows = int(STEPS_BESIDE * tally.decode_busy_s / tally.decode_steps / row_s)
    return min(most, max(LEAST_BESIDE, rows))
