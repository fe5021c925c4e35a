"""What a stage says: parcels of hidden states, tokens, errors and closes, and the account of what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from agent.workers.requests import Live, Tally
from models.engine.base import EngineFailed
from wire.channel import Backlogged
from wire.coding import Coder, coder
from wire.drafts import drafts_meta
from wire.errors import EdgelamError
from wire.frames import FLAG_DRAFTS, FLAG_FINAL, Kind, Parcel, Tensor
from wire.messages import StageError, StageOrder
from wire.rows import RowOf, rows_meta
from wire.transport import NotConnected

UNSENT: Final = (NotConnected, Backlogged)
"""What a parcel may fail with that others sent before it did not."""


class Sender(Protocol):
    """Where parcels go. Both methods raise NotConnected or Backlogged."""

    @property
    def next_backlog_bytes(self) -> int: ...

    @property
    def next_bytes(self) -> int:
        """Bytes of frames that went to the next stage so far."""

    def to_next(self, parcel: Parcel) -> None: ...

    def to_requester(self, topic: str, parcel: Parcel) -> None: ...


class Sending:
    """Makes parcels and sends them. `hidden`, `rows`, `tokens` and `to_requester` raise NotConnected or Backlogged."""

    def __init__(self, order: StageOrder, sender: Sender, tally: Tally, device: str) -> None:
        self.order = order
        self._sender = sender
        self._tally = tally
        self._device = device

    def tensor(self, result: Any, of_answers: bool = False) -> Tensor:
        """Hidden states as they travel. Several rows are a chunk of a prompt, unless they are `of_answers`."""
        return self._coder(result, of_answers).encode(result)

    def unfit(self, result: Any, of_answers: bool = False) -> dict[int, EdgelamError]:
        """Why rows of a result can't travel, by their number."""
        if result is None or self.order.head:
            return {}
        return {row: beyond() for row in self._coder(result, of_answers).unfit(result)}

    def _coder(self, result: Any, of_answers: bool) -> Coder:
        order = self.order
        codec = order.row_codec_out if of_answers or len(result) == 1 else order.codec_out
        return coder(codec, order.wire_dtype, order.hidden)

    def parcel_of_row(self, live: Live, tensor: Tensor) -> Parcel:
        """What goes to the next stage after the step over row `live.run`: hidden states, or the head's token."""
        kind, position = (Kind.TOKENS, live.run + 1) if self.order.head else (Kind.HIDDEN, live.run)
        return Parcel(kind, self.order.epoch, live.request, position, 0, tensor)

    def hidden(self, live: Live, result: Any, count: int, final: bool, meta: bytes) -> None:
        """Pass the last `count` rows of a request on. `final` says that they are the last of its prompt."""
        flags = FLAG_FINAL if final else 0
        tensor, position = self.tensor(result), live.run - count
        parcel = Parcel(Kind.HIDDEN, self.order.epoch, live.request, position, flags, tensor, meta)
        self._to_next(parcel, decode=count == 1)

    def guessed(self, live: Live, result: Any, drafts: Sequence[int]) -> None:
        """Pass the rows of a token and of the guesses after it on."""
        tensor, position = self.tensor(result, of_answers=True), live.run - 1 - len(drafts)
        meta = drafts_meta(drafts)
        parcel = Parcel(Kind.HIDDEN, self.order.epoch, live.request, position, FLAG_DRAFTS, tensor, meta)
        self._to_next(parcel, decode=True)

    def rows(self, lives: Sequence[Live], result: Any) -> None:
        """Pass the last row of each of several requests on."""
        if len(lives) == 1:
            self.hidden(lives[0], result, 1, False, b"")
            return
        meta = rows_meta([RowOf(live.request, live.run - 1) for live in lives])
        tensor = self.tensor(result, of_answers=True)
        self._to_next(Parcel(Kind.ROWS, self.order.epoch, 0, 0, 0, tensor, meta), decode=True)

    def token_parcel(self, live: Live, tokens: Sequence[int], last: bool) -> Parcel:
        """Tokens of one step, the last of which is the one after the row that was run last."""
        position, flags = live.run + 1 - len(tokens), FLAG_FINAL if last else 0
        ids = Tensor.of(np.array(tokens, np.int32))
        return Parcel(Kind.TOKENS, self.order.epoch, live.request, position, flags, ids)

    def tokens(self, parcels: Sequence[Parcel]) -> None:
        """Send tokens to the first stage, several as one parcel."""
        if len(parcels) == 1:
            self._to_next(parcels[0], decode=True)
            return
        ids = np.concatenate([parcel.tensor.array() for parcel in parcels if parcel.tensor is not None])
        meta = rows_meta([RowOf(parcel.request, parcel.position) for parcel in parcels])
        self._to_next(Parcel(Kind.ROWS, self.order.epoch, 0, 0, 0, Tensor.of(ids), meta), decode=True)

    def to_requester(self, topic: str, parcel: Parcel) -> None:
        self._sender.to_requester(topic, parcel)

    def error(self, reply: str, request: int, code: Any, text: str) -> None:
        """Tell a requester why its request ends here, if it can be told."""
        error = StageError(stage=self.order.stage, device=self._device, code=code, text=text[:4096])
        parcel = Parcel(Kind.ERROR, self.order.epoch, request, 0, FLAG_FINAL, None, msgspec.json.encode(error))
        try:
            self._sender.to_requester(reply, parcel)
        except UNSENT:
            self._tally.unsent += 1

    def close(self, request: int, left: int) -> None:
        """Tell the next `left` stages, if they can be told, that a request is over."""
        if left <= 0:
            return
        try:
            self._sender.to_next(Parcel(Kind.CLOSE, self.order.epoch, request, left))
        except UNSENT:
            self._tally.unsent += 1

    def _to_next(self, parcel: Parcel, *, decode: bool) -> None:
        before_bytes = self._sender.next_bytes
        self._sender.to_next(parcel)
        if decode:
            self._tally.decode_sent_bytes += self._sender.next_bytes - before_bytes


def beyond() -> EngineFailed:
    """A row is larger than the codec of its cut can say: of all codecs, only f16 can't say any number."""
    return EngineFailed(
        "the output of the stage left the range of f16, in which it crosses the cut behind it",
        try_="deploy with --error-budget 0",
    )
