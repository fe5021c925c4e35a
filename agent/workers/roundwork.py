"""What a worker that trains does with parcels.

    coordinator --ROUND(meta, factors)--> device --UPDATE(meta, factors)--> coordinator

One round at a time, step by step, so that connections are served in between. The same ROUND may come again, from the
same coordinator or from one that was started anew: what is under way goes on, and what is done is answered again from
memory. One of another number takes the place of what is under way. A lost connection loses nothing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from agent.workers.answering import Answering, factors_of
from agent.workers.ledger import Spent, release_of
from models.engine.base import EngineFailed
from models.lora.adapter import HEAD, Floats, drawn, flat, named
from models.lora.held import held_in
from models.privacy.plan import Measure, measure_of
from models.training.private import Guard
from models.training.rounds import Diverged, Round, finite, trained_in
from wire.errors import CorruptData
from wire.frames import Parcel, Tensor
from wire.messages import RoundMeta, StageOrder, TrainingTask, UpdateMeta
from wire.privacy import Privacy


class Told(NamedTuple):
    """Of a private job: the noise that is on a round, and what the job has spent with it."""

    noise: float
    epsilon: float


class _UnderWay(NamedTuple):
    request: int
    meta: RoundMeta
    round: Round
    told: Told | None


class RoundWork(Answering):
    """On a board that has the whole model, and data."""

    _under_way: _UnderWay | None = None

    @property
    def live(self) -> int:
        return int(self._under_way is not None)

    @property
    def runnable(self) -> bool:
        return self._under_way is not None

    def work(self, _now_s: float) -> bool:
        """Make one step; False if there is none."""
        under_way = self._under_way
        if under_way is None:
            return False
        self._stretch.begin()
        try:
            more = under_way.round.step()
            self._fits()
        except (Diverged, EngineFailed, RuntimeError) as error:  # RuntimeError: torch, out of memory mostly
            self._stretch.end()
            self._fail(under_way, error)
            return True
        busy_s = self._stretch.end()
        if under_way.told is None:  # it would tell how many samples took part, and how long they are
            self._busy_s += busy_s
            self.tally.prefill_steps += 1
            self.tally.prefill_busy_s += busy_s
        if not more:
            self._finish(under_way)
        return True

    def tick(self, _now_s: float) -> None:
        self._again()

    def drop_all(self) -> None:
        """A connection was lost: a round goes on, and its answer, which may not have come through, is sent again."""
        self._lost()

    def _close(self, request: int) -> None:
        if self._under_way is not None and self._under_way.request == request:
            self._under_way = None

    def _drop_round(self) -> None:
        self._under_way = None

    def _round(self, parcel: Parcel, meta: RoundMeta) -> None:
        under_way = self._under_way
        if under_way is not None and under_way.request == parcel.request:
            self._under_way = under_way._replace(meta=meta)
            return
        if self._answered_before(parcel.request, meta):
            return
        try:
            made, told = self._made(meta, self._begun(meta, parcel.tensor))
        except ValueError as error:
            self._refuse(str(error))
            self._tell(meta.reply.topic, parcel.request, "protocol", str(error))
            return
        except (Spent, CorruptData, OSError) as error:
            self._tell(meta.reply.topic, parcel.request, "engine", str(error))
            return
        self._forget_answer()
        self.tally.requests += 1
        self._busy_s = 0.0
        self._under_way = _UnderWay(parcel.request, meta, made, told)

    def _begun(self, meta: RoundMeta, tensor: Tensor | None) -> Floats:
        """All factors that a round begins with, by those that came. Raises ValueError for another length, CorruptData
        where this device's own are lost, OSError."""
        model, begins = self._model, self._task.begins
        if begins == "fresh":
            # Before anything was learnt there is nothing to send.
            held = held_in(factors_of(tensor) if tensor is not None else np.zeros(0, np.float32), model.shaped)
            head = {name: held.pop(name) for name in (HEAD,) if name in held}
            model.stage.hold(held)
            return flat({**drawn(model.shaped, self._task.seed, meta.round), **head}, model.shaped)
        came = factors_of(tensor)
        if begins == "own-b":
            assert model.own is not None
            factors = {**named(came, model.shaped, meta.parts), **model.own.after(meta.own)}
            model.own.show(factors)
            return flat(factors, model.shaped)
        return came

    def _made(self, meta: RoundMeta, start: Any) -> tuple[Round, Told | None]:
        task, model = self._task, self._model
        seed = device_seed(task.seed, self._device)
        guard, told = None, None
        if task.privacy is not None and meta.train:
            guard, told = self._paid(task, task.privacy, meta, start, seed)
        return Round(model.stage, model.shaped, model.rows, task, seed, meta, start, guard), told

    def _paid(self, task: TrainingTask, privacy: Privacy, meta: RoundMeta, start: Any, seed: int) -> tuple[Guard, Told]:
        """Noise for a round, entered in the ledger before there is anything to tell."""
        model, job = self._model, job_of(self.order)
        # What never leaves is noised as if it did where later steps that are told begin with it.
        parts = trained_in(task, meta.parts) if privacy.unit == "sample" else meta.parts
        measure = measure_of(task, len(model.rows.trained), len(parts), seed, meta.round)
        release = name_of(self.order, self._device, model.fingerprint, measure, meta.round, parts, start.tobytes())
        stream, spent = model.ledger.spend(job, release, measure.cost, measure.releases, privacy.epsilon, privacy.delta)
        return Guard(privacy, measure, stream), Told(measure.noise, spent)

    def _finish(self, under_way: _UnderWay) -> None:
        meta, made, told = under_way.meta, under_way.round, under_way.told
        try:
            vector = made.vector() if meta.train else None
            if meta.train and self._model.own is not None:
                finite(flat(made.factors, self._model.shaped, ("b",)))
                self._model.own.keep(meta.round, meta.own, made.factors)
        except (Diverged, OSError) as error:
            self._fail(under_way, error)
            return
        update = self._told_of(meta, made, told)
        tensor = None if vector is None else Tensor.of(vector)
        self._under_way = None
        self._give(under_way.request, meta, update, tensor)

    def _told_of(self, meta: RoundMeta, made: Round, told: Told | None) -> UpdateMeta:
        return UpdateMeta(
            round=meta.round,
            device=self._device,
            samples=len(self._model.rows.trained),
            bad_rows=self._model.bad_rows,
            loss=made.loss,
            held_out_loss=made.held_out_loss,
            held_out_count=made.held_out_count,
            held_out_right=made.held_out_right,
            compute_s=self._busy_s,
            noise=None if told is None else told.noise,
            epsilon=None if told is None else told.epsilon,
        )

    def _fail(self, under_way: _UnderWay, error: Exception) -> None:
        self._under_way = None
        self.ended += 1
        text = str(error)
        if under_way.told is not None:
            print(f"round {under_way.meta.round}: {text}", file=sys.stderr, flush=True)
            text = "it could not train; its own log says why"
        self._tell(under_way.meta.reply.topic, under_way.request, "engine", text)


def job_of(order: StageOrder) -> str:
    """As which a ledger knows it."""
    return f"{order.deployment}/{order.epoch}"


def name_of(
    order: StageOrder,
    device: str,
    fingerprint: str,
    measure: Measure,
    number: int,
    parts: Sequence[str],
    start: bytes = b"",
) -> str:
    """Of a private round in which these parts are trained: by all that it is made of, with the factors that it begins
    with, if it is sent some."""
    words = hashlib.sha256(start + msgspec.json.encode(order.training)).hexdigest()
    made_of = (device, measure.noise, measure.deviation, fingerprint, words)
    return release_of(job_of(order), number, *parts, *made_of)


def device_seed(seed: int, device: str) -> int:
    """By which a device draws its rows: another one than its neighbours'."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{device}".encode()).digest()[:8], "little") >> 1
