"""What all workers that train do with the coordinator: hear what a round asks, keep the answer, say what went wrong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from agent.orders import is_inbox
from agent.workers.ledger import Ledger
from agent.workers.own import OwnFactors
from agent.workers.requests import Tally
from agent.workers.sending import UNSENT, Sender
from agent.workers.stretch import Stretch
from models.lora.adapter import Floats
from models.training.samples import Split
from models.training.trunk import Learner
from wire.channel import Delivery
from wire.errors import PeerError
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.messages import RoundMeta, StageError, StageOrder, StepMark, TrainingTask, UpdateMeta, decode
from wire.tensors import Dtype


class Model(Protocol):
    """agent.workers.training.Trainee."""

    @property
    def stage(self) -> Learner: ...

    @property
    def shaped(self) -> Mapping[str, tuple[int, int]]: ...

    @property
    def rows(self) -> Split: ...

    @property
    def bad_rows(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def ledger(self) -> Ledger: ...

    @property
    def own(self) -> OwnFactors | None: ...


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


class Answering(ABC):
    """The last round's answer is kept, and given again to whoever asks with the same number of request.

    `done(delivery)` returns credit to a sender; `fits()` raises EngineFailed when memory is over its limit.
    """

    def __init__(
        self,
        order: StageOrder,
        model: Model,
        sender: PacedSender,
        done: Callable[[Delivery], None],
        stretch: Stretch,
        site: str,
        device: str,
        fits: Callable[[], None] = lambda: None,
    ) -> None:
        self.order = order
        self.tally = Tally()
        self.last_refusal = ""
        self.ended = 0
        self._model = model
        self._sender = sender
        self._done = done
        self._stretch = stretch
        self._site = site
        self._device = device
        self._fits = fits
        self._busy_s = 0.0
        """Of the round under way."""
        self._answer: Answer | None = None
        """Of the last round."""
        self._unsent = False
        self._sent_to = ""
        """Where that answer went, or is on its way to."""

    @property
    def marks(self) -> tuple[StepMark, ...]:
        return ()

    def accept(self, delivery: Delivery, _now_s: float) -> None:
        """Take what arrived. Never raises for what came from the network."""
        parcel = delivery.parcel
        try:
            if parcel.epoch != self.order.epoch & 0xFFFFFFFF:
                self.tally.stale += 1
            elif parcel.kind is Kind.ROUND:
                meta = self._asked(parcel)
                if meta is not None:
                    self._round(parcel, meta)
            elif parcel.kind is Kind.CLOSE:
                self._close(parcel.request)
                if self._answer is not None and self._answer.parcel.request == parcel.request:
                    self._forget_answer()
            elif not self._take(parcel):
                self._refuse(f"{parcel.kind.name} is not for a worker that trains")
        finally:
            self._done(delivery)

    def adopt(self, order: StageOrder) -> None:
        """Take a new order; rounds of another epoch count no more."""
        if order.epoch != self.order.epoch:
            self._drop_round()
            self._forget_answer()
        self.order = order

    @property
    def _task(self) -> TrainingTask:
        assert self.order.training is not None
        return self.order.training

    @abstractmethod
    def _round(self, parcel: Parcel, meta: RoundMeta) -> None:
        """A round is asked for, anew or again."""

    @abstractmethod
    def _close(self, request: int) -> None:
        """Nobody waits for the round of this request any more."""

    @abstractmethod
    def _drop_round(self) -> None:
        """What is under way counts no more."""

    def _take(self, _parcel: Parcel) -> bool:
        """Something else; False if it is not for such a worker."""
        return False

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

    def _tell(self, topic: str, request: int, code: Any, text: str, device: str = "", shard: int | None = None) -> bool:
        """Say what went wrong, and with whom if not here; False if it could not be sent."""
        error = StageError(
            stage=self.order.stage, device=device or self._device, code=code, text=text[:4096], shard=shard
        )
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


def factors_of(tensor: Tensor | None) -> Floats:
    """What a round begins with; raises ValueError."""
    if tensor is None or tensor.dtype is not Dtype.F32 or len(tensor.shape) != 1:
        raise ValueError("factors travel as one row of f32")
    start = np.array(tensor.array(), np.float32)
    if not np.isfinite(start).all():
        raise ValueError("a factor that came is no number")
    return start
