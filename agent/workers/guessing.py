"""What a stage does otherwise for a request whose tokens are guessed (docs/decisions/0011).

The first stage guesses (agent.workers.drafting); a step over the last token and the guesses goes round the ring; the
head draws after each row for as long as the guess was right, so whatever the sampling, its tokens are those that single
steps give in the same class of shapes. The next step begins where the right guesses ended: the rows behind are
overwritten. Only such a request may step back, and never behind a row that is settled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from agent.workers.drafting import Drafting
from agent.workers.requests import Live, Unit
from models.engine.base import StageEngine
from wire.drafts import drafts_in
from wire.errors import MalformedFrame
from wire.frames import FLAG_DRAFTS, Parcel
from wire.messages import Sampling, StageOrder

Draw = Callable[[Any, Sampling, int], int]
Ends = Callable[[Live, int, int], bool]
"""Whether this token at this position ends an answer."""


def drafts_of(live: Live, order: StageOrder, parcel: Parcel, shape: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """The guesses in a parcel for a stage behind the first, and what is wrong with them."""
    if not parcel.flags & FLAG_DRAFTS:
        alone = live.padded and parcel.position >= live.prompt_tokens
        return (), "rows without guesses of a request whose steps all have some" if alone else ""
    try:
        drafts = drafts_in(parcel.meta, shape)
    except MalformedFrame as error:
        return (), error.message
    if len(drafts) > live.speculate or parcel.position < live.prompt_tokens:
        return (), f"{len(drafts)} guesses at row {parcel.position}, where {live.speculate} at most may come"
    if max(drafts) >= order.vocabulary:
        return (), f"guess {max(drafts)} in a vocabulary of {order.vocabulary}"
    return drafts, ""


def step_back(live: Live, position: int) -> int:
    """Forget rows from `position` on if they are guesses of a step that was run; give how many of them were right."""
    if not live.settled <= position <= live.filed or live.run != live.filed:
        return 0
    live.run = live.filed = position
    return position - live.settled


def drawn_problem(live: Live, tokens: Sequence[int], position: int) -> str:
    """Why these can't be the tokens that the head drew from the step under way, or ''."""
    drafting = live.drafting
    if drafting is None or position != live.settled or live.run != live.filed:
        return f"tokens from {position} came, those from {live.settled} were due, {live.run} of {live.filed} rows run"
    if tuple(tokens[:-1]) != drafting.drafts[: len(tokens) - 1] or len(tokens) > len(drafting.drafts) + 1:
        return f"{len(tokens)} tokens that were not all guessed came"
    return ""


def next_unit(live: Live, drafting: Drafting, last: int, order: StageOrder, company: bool) -> Unit | None:
    """The step over the last token drawn, whose row is the next, and the guesses; None if it has no room."""
    row = live.filed
    room = min(live.prompt_tokens + live.max_new_tokens - row - 2, order.context_tokens - row - 1)
    if live.padded:
        room = max(room, 1)
    drafts = drafting.draft(last, room, company)
    if row + 1 + len(drafts) > order.context_tokens:
        return None
    live.filed = row + 1 + len(drafts)
    live.settled = row + 1
    return Unit(live, np.array([last, *drafts], np.int64), 1 + len(drafts), True, drafts=drafts)


def run_and_draw(engine: StageEngine, draw: Draw, head: bool, unit: Unit, ends: Ends) -> tuple[Any, tuple[int, ...]]:
    """Make a step of one request, and draw from it if it is the head's to draw. Raises ContextFull, EngineFailed.

    For a request that is padded the head, too, multiplies two rows or more.
    """
    live = unit.live
    if not head or not unit.final:
        return engine.step(live.slot, unit.rows, live.run), ()
    if unit.drafts:
        result = engine.step(live.slot, unit.rows, live.run, unit.count)
        return result, drawn_of(draw, result, live, unit.drafts, ends)
    if live.padded:
        result = engine.step(live.slot, unit.rows, live.run, 2)[-1]
    else:
        result = engine.step(live.slot, unit.rows, live.run)
    return result, (draw(result, live.sampling, live.run + unit.count),)


def drawn_of(draw: Draw, logits: Any, live: Live, drafts: Sequence[int], ends: Ends) -> tuple[int, ...]:
    """Draw after each row of a step for as long as the guess before it was right and nothing ends the answer."""
    tokens: list[int] = []
    for row, guessed in enumerate((*drafts, -1)):
        position = live.run + 1 + row
        tokens.append(draw(logits[row], live.sampling, position))
        if tokens[-1] != guessed or ends(live, tokens[-1], position):
            break
    return tuple(tokens)
