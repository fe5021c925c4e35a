"""What all workers that train do with the coordinator: hear what a round asks, keep the answer, say what went wrong."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import msgspec

from agent.orders import is_inbox
from agent.workers.requests import Tally
from agent.workers.sending import UNSENT, Sender
from wire.errors import PeerError
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.messages import RoundMeta, StageError, StageOrder, StepMark, UpdateMeta, decode


class PacedSender(Sender, Protocol):
    """agent.workers.outboxes.Outboxes."""

    def pace(self, topic: str, bytes_per_s: float | None) -> None: ...

    def waits(self, topic: str) -> bool:
        """Whether something is on its way there still."""

    def drop(self, topic: str) -> None:
        """Send nothing more of what is."""


class Answer(NamedTuple):
    """To whom, what, and how fast."""

    topic: str
    parcel: Parcel
    bytes_per_s: float | None


class Answering:
    """The last round's answer is kept, and given again to whoever asks with the same number of request."""

    def __init__(self, order: StageOrder, sender: PacedSender, site: str, device: str) -> None:
        self.order = order
        self.tally = Tally()
        self.last_refusal = ""
        self.ended = 0
        self._sender = sender
        self._site = site
        self._device = device
        self._answer: Answer | None = None
        """Of the last round."""
        self._unsent = False
        self._sent_to = ""
        """Where that answer went, or is on its way to."""

    @property
    def marks(self) -> tuple[StepMark, ...]:
        return ()

    def _asked(self, parcel: Parcel) -> RoundMeta | None:
        """What a ROUND asks for; None for what is none, which is counted."""
        try:
            meta = decode(parcel.meta, RoundMeta, "round")
        except PeerError as error:
            self._refuse(error.message)
            return None
        if not is_inbox(meta.reply.topic, self._site) or meta.reply.broker:
            self._refuse(f"{meta.reply.topic!r} is not an inbox of this site")
            return None
        return meta

    def _answered_before(self, request: int, meta: RoundMeta) -> bool:
        """Whether a question was answered; it is answered again then."""
        if self._answer is None or self._answer.parcel.request != request:
            return False
        self._answer = Answer(meta.reply.topic, self._answer.parcel, meta.bytes_per_s)
        self._send()
        return True

    def _give(self, request: int, meta: RoundMeta, update: UpdateMeta, tensor: Tensor | None) -> None:
        """Answer a question."""
        data = msgspec.json.encode(update)
        parcel = Parcel(Kind.UPDATE, self.order.epoch, request, 0, FLAG_FINAL, tensor, data)
        self._answer = Answer(meta.reply.topic, parcel, meta.bytes_per_s)
        self.ended += 1
        self._send()

    def _again(self) -> None:
        """At a tick: what could not be sent."""
        if self._unsent:
            self._send()

    def _lost(self) -> None:
        """A connection was lost: the answer, which may not have come through, is sent again."""
        if self._sent_to:
            self._sender.drop(self._sent_to)
        self._unsent, self._sent_to = self._answer is not None, ""

    def _forget_answer(self) -> None:
        """Another round begins: nobody waits for that of the last one any more."""
        if self._answer is not None and self._sent_to:
            self._sender.drop(self._sent_to)
        self._answer, self._unsent, self._sent_to = None, False, ""

    def _send(self) -> None:
        assert self._answer is not None
        topic, parcel, bytes_per_s = self._answer
        self._sender.pace(topic, bytes_per_s)
        if self._sent_to == topic and self._sender.waits(topic):
            return  # it is on its way
        try:
            self._sender.to_requester(topic, parcel)
            self._unsent, self._sent_to = False, topic
        except UNSENT:
            self._unsent = True  # again at the next tick

    def _tell(self, topic: str, request: int, code: Any, text: str, device: str = "") -> bool:
        """Say what went wrong, and with whom if not here; False if it could not be sent."""
        error = StageError(stage=self.order.stage, device=device or self._device, code=code, text=text[:4096])
        parcel = Parcel(Kind.ERROR, self.order.epoch, request, 0, FLAG_FINAL, None, msgspec.json.encode(error))
        try:
            self._sender.to_requester(topic, parcel)
        except UNSENT:
            self.tally.unsent += 1
            return False
        return True

    def _refuse(self, text: str) -> None:
        self.tally.refused += 1
        self.last_refusal = text
