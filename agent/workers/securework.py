"""What a worker that trains does in a secure job: its update leaves it masked alone, for a sum with those of others.

    coordinator --ROUND--> device --UPDATE(meta alone)--> coordinator       trained
    coordinator --SECURE--> device --SECURE--> coordinator                  keys, shares, masked, reveal

What was trained is kept until another round is asked for. A sum that comes to nothing is begun anew with another number
of session, for which the device makes new keys; so does a worker that was started anew, once it has trained again. The
same question again is answered from memory. models.secure.session says what is refused, agent.workers.summed what is
remembered beyond the worker's life.
"""

from __future__ import annotations

import secrets
import sys
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from agent.workers.answering import Answer
from agent.workers.roundwork import RoundWork
from agent.workers.summed import Sums
from models.lora.adapter import Floats, flat, named
from models.secure.session import SEALED_BYTES, Member, Party, Roster
from models.secure.shamir import RandomBytes
from wire.errors import CorruptData, PeerError
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.limits import MAX_SUMMED
from wire.messages import RoundMeta, UpdateMeta, decode
from wire.sums import SecureMeta
from wire.tensors import Dtype

MOST_ROWS_BYTES: Final = MAX_SUMMED * SEALED_BYTES
"""Of what comes with a question."""


class _Trained(NamedTuple):
    request: int
    meta: RoundMeta
    update: UpdateMeta
    change: Floats


class _Question(NamedTuple):
    meta: SecureMeta
    rows: Any
    """uint8, or None where nothing came with it."""


class SecureWork(RoundWork):
    """On a board that has the whole model, and data."""

    def __init__(self, *arguments: Any, sums: Sums, random_bytes: RandomBytes = secrets.token_bytes) -> None:
        """The others as agent.workers.answering.Answering."""
        super().__init__(*arguments)
        self._sums = sums
        self._random = random_bytes
        self._start: Floats | None = None
        """Of the round under way."""
        self._trained: _Trained | None = None
        """What the last round came to."""
        self._question: _Question | None = None
        """Not yet looked at."""
        self._session = 0
        self._party: Party | None = None
        """Of that session."""

    @property
    def runnable(self) -> bool:
        return super().runnable or self._question is not None

    def work(self, now_s: float) -> bool:
        """Answer what was asked of a sum, or make a step of a round; False if there is nothing to do."""
        question, self._question = self._question, None
        if question is None or self._trained is None:
            return super().work(now_s)
        self._answer_step(self._trained, question)
        return True

    def _made(self, meta: RoundMeta, start: Any) -> Any:
        self._start = start
        return super()._made(meta, start)

    def _give(self, request: int, meta: RoundMeta, update: UpdateMeta, tensor: Tensor | None) -> None:
        """Say that there is an update, and keep it."""
        if tensor is not None:
            assert self._start is not None
            shaped = self._model.shaped
            change = tensor.array() - flat(named(self._start, shaped), shaped, meta.parts)
            self._start = None
            if not np.isfinite(change).all():  # of a private job, which does not say so by itself
                print(f"round {meta.round}: a factor is no number", file=sys.stderr, flush=True)
                self.ended += 1
                self._tell(meta.reply.topic, request, "engine", "it could not train; its own log says why")
                return
            self._trained = _Trained(request, meta, update, change)
        super()._give(request, meta, update, None)

    def _answered_before(self, request: int, meta: RoundMeta) -> bool:
        trained = self._trained
        if trained is None or trained.request != request:
            return super()._answered_before(request, meta)
        # Who asks this again has begun anew: nothing of a session that was under way is of use.
        self._trained, self._party, self._question = trained._replace(meta=meta), None, None
        super()._forget_answer()
        super()._give(request, meta, trained.update, None)
        return True

    def _forget_answer(self) -> None:
        super()._forget_answer()
        self._trained, self._party, self._question = None, None, None

    def _take(self, parcel: Parcel) -> bool:
        if parcel.kind is not Kind.SECURE:
            return super()._take(parcel)
        try:
            meta = decode(parcel.meta, SecureMeta, "a question of a sum")
        except PeerError as error:
            self._refuse(error.message)
            return True
        tensor = parcel.tensor
        if not self._is_of_now(parcel.request, meta):
            self.tally.stale += 1
        elif tensor is not None and (tensor.dtype is not Dtype.U8 or tensor.nbytes > MOST_ROWS_BYTES):
            self._refuse(f"{tensor.dtype.name} {list(tensor.shape)} with a question of a sum")
        else:
            self._question = _Question(meta, None if tensor is None else np.array(tensor.array(), np.uint8))
        return True

    def _is_of_now(self, request: int, meta: SecureMeta) -> bool:
        """Whether a question is about what was trained last, and begins a session, or is of the one that is."""
        if self._trained is None or self._trained.request != request:
            return False
        return meta.step == "keys" or (self._party is not None and self._session == meta.session)

    def _answer_step(self, trained: _Trained, question: _Question) -> None:
        meta, topic = question.meta, trained.meta.reply.topic
        try:
            found = self._step(trained, meta, question.rows)
        except ValueError as error:
            self._refuse(str(error))
            self._tell(topic, trained.request, "protocol", str(error))
            return
        except (CorruptData, OSError) as error:
            self._tell(topic, trained.request, "engine", str(error))
            return
        said = msgspec.json.encode(SecureMeta(session=meta.session, step=meta.step))
        parcel = Parcel(Kind.SECURE, self.order.epoch, trained.request, 0, FLAG_FINAL, Tensor.of(found), said)
        super()._forget_answer()
        self._answer = Answer(topic, parcel, trained.meta.bytes_per_s)
        self._send()

    def _step(self, trained: _Trained, meta: SecureMeta, rows: Any) -> Any:
        """What answers a question. Raises ValueError for what makes no sense or would tell too much, CorruptData and
        OSError."""
        if meta.step == "keys":
            if self._party is None or self._session != meta.session:
                self._session, self._party = meta.session, Party(self._device, self._random)
            return np.frombuffer(self._party.keys, np.uint8)
        party = self._party
        assert party is not None
        if meta.step == "shares":
            return party.shares(self._roster(trained, meta, rows))
        if meta.step == "masked":
            if rows is None:
                raise ValueError("no shares came")
            return party.masked(meta.among, rows, trained.change).view(np.int32)
        found = party.revealed(meta.among)
        self._sums.enter(self._job, trained.meta.round, tuple(sorted(meta.among)))
        return found

    def _roster(self, trained: _Trained, meta: SecureMeta, rows: Any) -> Roster:
        if rows is None or rows.shape[:1] != (len(meta.devices),):
            raise ValueError("not as many keys as devices")
        members = [
            Member(one.device, one.samples, keys.tobytes()) for one, keys in zip(meta.devices, rows, strict=True)
        ]
        mine = [one.samples for one in members if one.name == self._device]
        if mine != [trained.update.samples]:
            raise ValueError(f"this device has {trained.update.samples} samples, not {mine}")
        return Roster(self._job, trained.meta.round, meta.session, meta.farthest, members)

    @property
    def _job(self) -> str:
        return f"{self.order.deployment}/{self.order.epoch}"
