"""What waits for its step on a stage, and whose turn it is.

After each chunk of a prompt decode steps have the right of way for as long as the chunk took: a long prompt slows the
answers under way at most to half, and they don't starve it. While there are any, the first stage cuts chunks into
smaller pieces, for whose steps they need not wait long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from agent.workers.apart import Apart
from agent.workers.groups import Groups, InOrder, Waiting
from agent.workers.requests import Live, Tally, Unit, rows_beside, split
from agent.workers.sending import Sender
from wire.messages import StageOrder

MAX_NEXT_BACKLOG_BYTES: Final = 256 * 1024
"""No further prefill chunk while so much waits for the next stage's credit: decode steps would queue behind it."""


class Due:
    """Rows of answers (decode) and chunks of prompts (prefill), in the order of their turns."""

    def __init__(self, order: StageOrder, sender: Sender, tally: Tally) -> None:
        self._order = order
        self._sender = sender
        self._tally = tally
        self._decode = _waiting(order)
        self._prefill: deque[Unit] = deque()
        self._made: Live | None = None
        """Whose next row was run already (agent.workers.ahead)."""
        self._first: deque[Unit] = deque()
        """What goes before all others: rows that were run."""
        self._decode_first_s = 0.0
        """Seconds that decode steps may still take before the next prefill chunk."""

    @property
    def runnable(self) -> bool:
        """Whether `take` would give something, as far as one can tell."""
        return bool(self._first) or self._decode.ready or (bool(self._prefill) and self._room_ahead())

    @property
    def idle(self) -> bool:
        """Nothing waits, but for rows of a group that is not complete."""
        return not self._first and not self._decode.ready and not self._prefill

    def expect(self, live: Live) -> None:
        """The next row of this request was run, and what follows from it was sent, before it is filed: it is due before
        all others, or the token that follows would be here before its row counts as run."""
        self._made = live

    def _is_made(self, unit: Unit) -> bool:
        if unit.live is not self._made or unit.count != 1:
            return False
        self._made = None
        self._first.append(unit)
        return True

    def file(self, unit: Unit) -> None:
        """The row of a token that was drawn is a decode step, unless chunks of the same request still wait."""
        if self._is_made(unit):
            return
        behind = any(waiting.live is unit.live for waiting in self._prefill) if self._prefill else False
        if (unit.count == 1 or unit.drafts) and unit.final and not unit.meta and not behind:
            self._decode.file((unit,))
        else:
            unit.lone = unit.count == 1
            self._prefill.append(unit)

    def file_decode(self, units: Sequence[Unit]) -> None:
        """Rows of answers that came together."""
        left = [unit for unit in units if not self._is_made(unit)] if self._made is not None else units
        if left:
            self._decode.file(left)

    def take(self, now_s: float, lives: Iterable[Live]) -> Sequence[Unit]:
        """Give what makes the next step; nothing if there is none to make. `lives` are all requests of the stage."""
        if self._first:
            return (self._first.popleft(),)
        prefill = bool(self._prefill) and self._room_ahead()
        units: Sequence[Unit] = ()
        if self._decode.ready and (self._decode_first_s > 0 or not prefill):
            units = self._decode.take(now_s)
        if not units and prefill:
            units = (self._next_chunk(lives),)
        return units

    def ran(self, busy_s: float, chunk: bool) -> None:
        """A step took so long, over a chunk of a prompt, or what waits like one, or over rows of answers."""
        self._decode_first_s = busy_s if chunk else self._decode_first_s - busy_s

    def leave(self, request: int) -> None:
        """This request is over. What waits of it may still be taken."""
        self._decode.leave(request)

    def tick(self, now_s: float) -> None:
        """Call every second or so."""
        self._decode.tick(now_s)

    def waiting(self) -> Sequence[Unit]:
        return (*self._first, *self._decode.waiting(), *self._prefill)

    def clear(self) -> None:
        self._made = None
        self._first.clear()
        self._decode.clear()
        self._prefill.clear()

    def adopt(self, order: StageOrder) -> None:
        """Take a new epoch, in which nothing waits yet."""
        self._order = order
        self._decode = _waiting(order)

    def _next_chunk(self, lives: Iterable[Live]) -> Unit:
        """The chunk that is due; of a prompt that enters beside answers under way only a piece, and the rest waits. The
        stages behind run what comes, so only the first one cuts."""
        unit = self._prefill.popleft()
        if unit.delivery is not None or unit.count < 4 or not self._order.embedding:
            return unit
        if not any(live is not unit.live and live.run > live.prompt_tokens for live in lives):
            return unit
        rows = rows_beside(self._tally, unit.count)
        if rows >= unit.count:
            return unit
        piece, rest = split(unit, min(rows, unit.count - 2))
        self._prefill.appendleft(rest)
        return piece

    def _room_ahead(self) -> bool:
        return self._sender.next_backlog_bytes <= MAX_NEXT_BACKLOG_BYTES


def _waiting(order: StageOrder) -> Waiting:
    """Where decode rows wait: the first stage groups them, the others run them as they come."""
    return Apart(Groups(order.stages)) if order.embedding else InOrder()
