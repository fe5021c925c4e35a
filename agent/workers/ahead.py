"""Makes the next decode step first, and looks at its message afterwards.

Between two steps of one answer almost all of the next message is known: who sends it, for which row of which request,
under which numbers of its stream; only the hidden states and the checksum are not. Its way through transport, inbox and
ring is the longest part of a hop: the steps before it ran through more memory than the caches hold, and cold code costs
by its length (docs/decisions/0006). So, while nothing is to be done, two packets are laid out: the one that should come
and the one that should go. When what has come is that packet to the byte, its payload is put where the engine reads,
the step is made, and the result is sent. Then the message takes the ordinary way: it is read, checked, counted,
credited and filed as any other, and where its step would be made, it was made already. What is not as foreseen takes
the ordinary way alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from agent.workers.marks import clock
from agent.workers.requests import Live, Made
from agent.workers.ring import StageWork
from agent.workers.sending import beyond
from agent.workers.stretch import Stretch
from models.engine.base import EngineFailed, RowStep, StageEngine
from wire.channel import Inbox
from wire.codecs import AS_IS
from wire.coding import Coder, coder
from wire.foreseen import Coming, Going, frame_head
from wire.frames import Laid, Parcel, Tensor
from wire.messages import Sampling, StageOrder
from wire.transport import Buffer, NotConnected, ShortWay

_NO_TOKEN: Final = np.zeros(1, np.int32)
"""Stands for the token that the head has not drawn yet."""


class Outgoing(Protocol):
    """The sender's end: see agent.workers.outboxes."""

    @property
    def next_topic(self) -> str: ...

    def lay_out_next(self, parcel: Parcel) -> Laid | None: ...

    def next_went(self, laid: Laid) -> None: ...


class _Answer(NamedTuple):
    """What is the same for all steps of one answer."""

    live: Live
    row: RowStep
    result: Tensor
    """Dtype and shape of what the steps send."""


class _Heads(NamedTuple):
    """What stands before the checksums of frames of these lengths."""

    coming_bytes: int
    going_bytes: int
    coming: bytes
    going: bytes


class _Next(NamedTuple):
    """One step that may come: its message, its engine, and the frame that follows from it."""

    coming: Coming
    going: Going
    live: Live
    position: int
    row: RowStep


class StepAhead:
    """Call `lay_out` when there is nothing to do, and the object itself when something has come, before it is read.
    `inward` brings what comes, `outward` takes what goes."""

    def __init__(
        self,
        inward: ShortWay,
        outward: ShortWay,
        sender: Outgoing,
        work: StageWork,
        engine: StageEngine,
        draw: Callable[[Any, Sampling, int], int],
        stretch: Stretch,
    ) -> None:
        self.steps = 0
        """Steps that were made so."""
        self._inward = inward
        self._outward = outward
        self._sender = sender
        self._work = work
        self._engine = engine
        self._draw = draw
        self._stretch = stretch
        self._decoder, self._encoder = _coders(work.order)
        self._next: _Next | None = None
        self._answer: _Answer | None = None
        self._heads: _Heads | None = None

    def forget(self) -> None:
        """Foresee nothing until the next `lay_out`."""
        self._next = None

    def lay_out(self, inbox: Inbox) -> None:
        """Foresee the message that may come next to `inbox`, and the frame that its step will send."""
        self._next = None
        live = self._work.foreseen()
        coming = None if live is None else inbox.foresee(live.request, live.run)
        if live is None:
            self._answer = self._heads = None
        if live is None or coming is None:
            return
        answer = self._answer_of(live)
        laid = None if answer is None else self._sender.lay_out_next(self._work.parcel_of_row(live, answer.result))
        heads = None if laid is None else self._heads_of(inbox.topic, coming.frame_bytes, laid.frame_bytes)
        if answer is None or laid is None or heads is None:
            return
        self._next = _Next(Coming(heads.coming, coming), Going(heads.going, laid), live, live.run, answer.row)

    def _answer_of(self, live: Live) -> _Answer | None:
        if self._answer is None or self._answer.live is not live:
            self._answer = self._heads = None
            row = self._engine.row(live.slot)
            if row is not None:
                result = self._work.tensor(row.result) if row.output is not None else Tensor.of(_NO_TOKEN)
                self._answer = _Answer(live, row, result)
        return self._answer

    def _heads_of(self, topic: str, coming_bytes: int, going_bytes: int) -> _Heads | None:
        """The heads of packets on this connection. With it an answer ends, and so do they."""
        heads = self._heads
        if heads is None or heads.coming_bytes != coming_bytes or heads.going_bytes != going_bytes:
            try:
                coming = frame_head(self._inward, topic, coming_bytes)
                going = frame_head(self._outward, self._sender.next_topic, going_bytes)
            except NotConnected:
                return None
            self._heads = heads = _Heads(coming_bytes, going_bytes, coming, going)
        return heads

    def __call__(self) -> None:
        """Look at what has come; if it is what was foreseen, make its step, send its result, and leave word of it."""
        step = self._next
        if step is None:
            return
        given = step.coming.look(self._inward)
        if given is None:
            return
        self._next = None
        row = step.row
        if self._decoder is not None:
            given = self._decoder.row_in(given)
        if given is None or not row.fill(given):
            return
        self._stretch.begin()
        token = -1
        output: Buffer | None = row.output
        try:
            row.run(step.position)
            if output is None:
                row.settle(step.position)
                token = self._draw(row.result, step.live.sampling, step.position + 1)
            elif self._encoder is not None:
                row.settle(step.position)
                output = self._encoded(self._encoder, row.result)
        except EngineFailed as error:
            self._work.made_ahead(Made(live=step.live, position=step.position, error=error))
            return
        busy_s, ended_s = self._stretch.end("ahead", 1, step.position), clock()
        sent_bytes = self._send(step, token, output)
        error_after = self._settled(step) if output is not None and self._encoder is None else None
        self.steps += 1
        tokens = () if output is not None else (token,)
        made = Made(
            live=step.live, position=step.position, busy_s=busy_s, result=row.result, tokens=tokens,
            sent_bytes=sent_bytes, error=error_after, ended_s=ended_s,
        )  # fmt: skip
        self._work.made_ahead(made)

    def _encoded(self, encoder: Coder, row: Any) -> bytes:
        """A row that was settled, as it travels; raise EngineFailed if it can't."""
        if encoder.unfit(row):
            raise beyond()
        return encoder.payload_of(row)

    def _send(self, step: _Next, token: int, output: Buffer | None) -> int:
        """Send what was laid out, with its payload; give its bytes, 0 if it did not go: the ordinary way sees why."""
        if output is None:
            if token in step.live.stop_ids:
                return 0
            payload: Buffer = token.to_bytes(4, "little", signed=True)
        else:
            payload = output
        try:
            step.going.send(self._outward, payload)
        except NotConnected:
            return 0
        self._sender.next_went(step.going.laid)
        return step.going.laid.frame_bytes

    def _settled(self, step: _Next) -> EngineFailed | None:
        """Check a result that has gone already: one that is no number is told to the requester before its token."""
        try:
            step.row.settle(step.position)
        except EngineFailed as error:
            return error
        return None


def _coders(order: StageOrder) -> tuple[Coder | None, Coder | None]:
    """For the row that comes and the one that goes, where a step's numbers are not those that travel."""
    ends = ((order.row_codec_in, order.embedding), (order.row_codec_out, order.head))
    decoder, encoder = (
        None if ids or codec == AS_IS else coder(codec, order.wire_dtype, order.hidden) for codec, ids in ends
    )
    return decoder, encoder
