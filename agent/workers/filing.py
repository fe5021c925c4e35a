"""Files rows that came to a stage, so that their steps can be made, or ends the request that they don't fit.

A prompt is cut into chunks; rows of answers come one by one, one of each of several requests, or with guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from agent.workers.arrivals import checked_rows
from agent.workers.drafting import Drafting
from agent.workers.due import Due
from agent.workers.guessing import drafts_of, drawn_problem, next_unit, step_back
from agent.workers.held import Held
from agent.workers.requests import Live, Tally, Unit, chunks_of
from wire.channel import Delivery
from wire.errors import MalformedFrame
from wire.frames import FLAG_DRAFTS, Parcel, Tensor
from wire.limits import MAX_DRAFTS
from wire.rows import rows_in


class Filing:
    """`rows` and `rows_of_many` give True if the delivery is kept until its rows were run."""

    def __init__(self, held: Held, due: Due, tally: Tally) -> None:
        self._held = held
        self._due = due
        self._tally = tally

    def rows(self, delivery: Delivery, parcel: Parcel, tensor: Tensor, now_s: float) -> bool:
        """File rows of one request; what has meta begins one."""
        held, order = self._held, self._held.order
        opens = bool(parcel.meta) and not parcel.flags & FLAG_DRAFTS
        live = held.open(parcel, now_s) if opens else held.lives.get(parcel.request)
        if live is None:
            if not opens and not held.closed_lately(parcel.request):
                held.refuse(f"rows from {parcel.position} of a request that is not known")
            return False
        of_answers = bool(parcel.flags & FLAG_DRAFTS)
        rows, problem = checked_rows(order, tensor, opens or live.drafting is not None, of_answers)
        if order.embedding and live.drafting is not None:
            unit = self._take_drawn(live, rows, parcel.position, problem, now_s)
            if unit is not None:
                self._due.file_decode((unit,))
            return False
        drafts, unfit = drafts_of(live, order, parcel, tensor.shape)
        if not self._take_rows(live, parcel.position, tensor.shape[0], problem or unfit, now_s):
            return False
        if order.embedding and opens:
            self._file_prompt(live, rows, parcel.meta, live.replay_tokens)
            return False
        if drafts:
            live.settled = parcel.position + 1
        final = parcel.final or live.filed > live.prompt_tokens
        kept = None if order.embedding else delivery
        self._due.file(Unit(live, rows, tensor.shape[0], final, kept, parcel.meta if opens else b"", drafts=drafts))
        return kept is not None

    def rows_of_many(self, delivery: Delivery, parcel: Parcel, tensor: Tensor, now_s: float) -> bool:
        """File one row of each of several requests."""
        held, order = self._held, self._held.order
        try:
            owners = rows_in(parcel.meta, tensor.shape)
        except MalformedFrame as error:
            held.refuse(error.message)
            return False
        rows, problem = checked_rows(order, tensor, bool(parcel.meta), of_answers=True)
        units = []
        for index, owner in enumerate(owners):
            live = held.lives.get(owner.request)
            if live is None:
                if not held.closed_lately(owner.request):
                    held.refuse(f"row {owner.position} of a request that is not known")
                continue
            early = "" if live.filed >= live.prompt_tokens else "a row of a prompt came among rows of answers"
            if live.drafting is not None:
                unit = self._take_drawn(live, rows[index : index + 1], owner.position, problem or early, now_s)
                units += [] if unit is None else [unit]
                continue
            if live.padded:
                early = "a row alone of a request whose steps all have two"
            if self._take_rows(live, owner.position, 1, problem or early, now_s):
                units.append(Unit(live, rows[index : index + 1], 1, True))
        if units:
            units[0].delivery = None if order.embedding else delivery
            self._due.file_decode(units)
        return bool(units) and not order.embedding

    def drawn_here(self, going: Sequence[tuple[Live, Parcel]]) -> None:
        """File the tokens that the head drew, where it is the first stage too."""
        units = []
        for live, parcel in going:
            ids = parcel.tensor.array() if parcel.tensor is not None else np.zeros(0, np.int32)
            if live.drafting is not None:
                unit = self._guess(live, live.drafting, ids.tolist(), live.seen_s)
                units += [] if unit is None else [unit]
                continue
            live.filed += 1
            live.settled = live.filed
            units.append(Unit(live, ids.astype(np.int64), 1, True))
        self._due.file_decode(units)

    def _take_rows(self, live: Live, position: int, count: int, problem: str, now_s: float) -> bool:
        """Count rows that came for a request, or end it if they can't be its next ones."""
        order = self._held.order
        if live.speculate and not problem:
            self._tally.decode_rows += step_back(live, position)
        if position != live.filed:
            problem = f"rows from {position} came, rows from {live.filed} were due"
        elif order.embedding and position and live.run != live.filed:
            problem = f"a token came before row {live.filed - 1} was run"
        if problem:
            self._held.fail_protocol(live, problem)
            return False
        live.seen_s = now_s
        if live.filed + count > order.context_tokens:
            self._held.fail_too_long(live, live.filed + count)
            return False
        live.filed += count
        live.settled = live.filed
        return True

    def _take_drawn(self, live: Live, ids: Any, position: int, problem: str, now_s: float) -> Unit | None:
        """Take tokens for a request that is guessed for; give its next step, or end it if they can't be its next."""
        tokens = [] if problem else ids[: MAX_DRAFTS + 2].tolist()
        problem = problem or drawn_problem(live, tokens, position)
        drafting = live.drafting
        if problem or drafting is None:
            self._held.fail_protocol(live, problem)
            return None
        live.seen_s = now_s
        live.run = live.filed = live.settled = position + len(tokens) - 1
        return self._guess(live, drafting, tokens, now_s)

    def _guess(self, live: Live, drafting: Drafting, tokens: Sequence[int], now_s: float) -> Unit | None:
        """The next step after these tokens; the last one's row is not filed yet."""
        held, tally = self._held, self._tally
        tally.decode_rows += len(tokens) - 1 if not held.order.head else 0
        tally.drafts_accepted += drafting.came(tokens, now_s)
        unit = next_unit(live, drafting, tokens[-1], held.order, len(held.lives) > 1)
        if unit is None:
            held.fail_too_long(live, live.filed + 1)
        tally.drafts_sent += drafting.counted
        return unit

    def _file_prompt(self, live: Live, ids: Any, meta: bytes, replay: int) -> None:
        """Cut the prompt into chunks and file them; its last `replay` rows one by one."""
        if live.speculate:
            live.drafting = Drafting(ids.tolist(), live.speculate, live.padded)
        chunked = len(ids) - replay
        for start, end in chunks_of(chunked, self._held.order.prefill_chunk_tokens):
            chunk_meta = meta if start == 0 else b""
            self._due.file(Unit(live, ids[start:end], end - start, end == len(ids), None, chunk_meta))
        for row in range(chunked, len(ids)):
            self._due.file(Unit(live, ids[row : row + 1], 1, row + 1 == len(ids)))
