"""What a worker that trains does with parcels.

    coordinator --ROUND(meta, factors)--> device --UPDATE(meta, factors)--> coordinator

One round at a time, step by step, so that connections are served in between. The same ROUND may come again, from the
same coordinator or from one that was started anew: what is under way goes on, and what is done is answered again from
memory. One of another number takes the place of what is under way. A lost connection loses nothing.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from agent.workers.answering import Answering, PacedSender
from agent.workers.ledger import Ledger, Spent, release_of
from agent.workers.stretch import Stretch
from models.engine.base import EngineFailed
from models.privacy.plan import measure_of
from models.training.private import Guard
from models.training.rounds import Diverged, Round, Trained
from models.training.samples import Split
from wire.channel import Delivery
from wire.errors import CorruptData
from wire.frames import Kind, Parcel, Tensor
from wire.messages import (
    Privacy,
    RoundMeta,
    StageOrder,
    TrainingTask,
    UpdateMeta,
)
from wire.tensors import Dtype


class Model(Protocol):
    """agent.workers.training.Trainee."""

    @property
    def stage(self) -> Trained: ...

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
    """`done(delivery)` returns credit to a sender; `fits()` raises EngineFailed when memory is over its limit."""

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
        super().__init__(order, sender, site, device)
        self._model = model
        self._done = done
        self._stretch = stretch
        self._fits = fits
        self._under_way: _UnderWay | None = None
        self._busy_s = 0.0

    @property
    def live(self) -> int:
        return int(self._under_way is not None)

    @property
    def runnable(self) -> bool:
        return self._under_way is not None

    def accept(self, delivery: Delivery, _now_s: float) -> None:
        """Take what arrived. Never raises for what came from the network."""
        parcel = delivery.parcel
        try:
            if parcel.epoch != self.order.epoch & 0xFFFFFFFF:
                self.tally.stale += 1
            elif parcel.kind is Kind.ROUND and parcel.tensor is not None:
                self._begin(parcel, parcel.tensor)
            elif parcel.kind is Kind.CLOSE:
                if self._under_way is not None and self._under_way.request == parcel.request:
                    self._under_way = None
                elif self._answer is not None and self._answer.parcel.request == parcel.request:
                    self._forget_answer()
            else:
                self._refuse(f"{parcel.kind.name} is not for a worker that trains")
        finally:
            self._done(delivery)

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

    def adopt(self, order: StageOrder) -> None:
        """Take a new order; rounds of another epoch count no more."""
        if order.epoch != self.order.epoch:
            self._under_way = None
            self._forget_answer()
        self.order = order

    def drop_all(self) -> None:
        """A connection was lost: a round goes on, and its answer, which may not have come through, is sent again."""
        self._lost()

    def _begin(self, parcel: Parcel, tensor: Tensor) -> None:
        meta = self._asked(parcel)
        if meta is None:
            return
        under_way = self._under_way
        if under_way is not None and under_way.request == parcel.request:
            self._under_way = under_way._replace(meta=meta)
            return
        if self._answered_before(parcel.request, meta):
            return
        try:
            if tensor.dtype is not Dtype.F32 or len(tensor.shape) != 1:
                raise ValueError("factors travel as one row of f32")
            start = np.array(tensor.array(), np.float32)
            if not np.isfinite(start).all():
                raise ValueError("a factor that came is no number")
            made, told = self._round(meta, start)
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

    def _round(self, meta: RoundMeta, start: Any) -> tuple[Round, Told | None]:
        task = self.order.training
        assert task is not None
        model = self._model
        seed = device_seed(task.seed, self._device)
        guard, told = None, None
        if task.privacy is not None and meta.train:
            guard, told = self._paid(task, task.privacy, meta, start, seed)
        return Round(model.stage, model.shaped, model.rows, task, seed, meta, start, guard), told

    def _paid(self, task: TrainingTask, privacy: Privacy, meta: RoundMeta, start: Any, seed: int) -> tuple[Guard, Told]:
        """Noise for a round, entered in the ledger before there is anything to tell."""
        model, order = self._model, self.order
        measure = measure_of(task, len(model.rows.trained), len(meta.parts), seed, meta.round)
        job = f"{order.deployment}/{order.epoch}"
        words = hashlib.sha256(start.tobytes() + msgspec.json.encode(task)).hexdigest()
        made_of = (self._device, measure.noise, measure.deviation, model.fingerprint, words)
        release = release_of(job, meta.round, *meta.parts, *made_of)
        stream, spent = model.ledger.spend(job, release, measure.cost, measure.releases, privacy.epsilon, privacy.delta)
        return Guard(privacy, measure, stream), Told(measure.noise, spent)

    def _finish(self, under_way: _UnderWay) -> None:
        meta, made, told = under_way.meta, under_way.round, under_way.told
        try:
            vector = made.vector() if meta.train else None
        except Diverged as error:
            self._fail(under_way, error)
            return
        update = UpdateMeta(
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
        tensor = None if vector is None else Tensor.of(vector)
        self._under_way = None
        self._give(under_way.request, meta, update, tensor)

    def _fail(self, under_way: _UnderWay, error: Exception) -> None:
        self._under_way = None
        self.ended += 1
        text = str(error)
        if under_way.told is not None:
            print(f"round {under_way.meta.round}: {text}", file=sys.stderr, flush=True)
            text = "it could not train; its own log says why"
        self._tell(under_way.meta.reply.topic, under_way.request, "engine", text)


def device_seed(seed: int, device: str) -> int:
    """By which a device draws its rows: another one than its neighbours'."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{device}".encode()).digest()[:8], "little") >> 1
