"""What a worker that trains does with parcels.

    coordinator --ROUND(meta, factors)--> device --UPDATE(meta, factors)--> coordinator

One round at a time, step by step, so that connections are served in between. The same ROUND may come again, from the
same coordinator or from one that was started anew: what is under way goes on, and what is done is answered again from
memory. One of another number takes the place of what is under way. A lost connection loses nothing.
"""

from __future__ import annotations

import hashlib
import sys
from typing import Any, NamedTuple

import msgspec

from agent.workers.answering import Answering, factors_of
from agent.workers.ledger import Spent, release_of
from models.engine.base import EngineFailed
from models.privacy.plan import measure_of
from models.training.private import Guard
from models.training.rounds import Diverged, Round
from wire.errors import CorruptData
from wire.frames import Parcel, Tensor
from wire.messages import (
    Privacy,
    RoundMeta,
    TrainingTask,
    UpdateMeta,
)


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
            made, told = self._made(meta, factors_of(parcel.tensor))
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

    def _made(self, meta: RoundMeta, start: Any) -> tuple[Round, Told | None]:
        task, model = self._task, self._model
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


def device_seed(seed: int, device: str) -> int:
    """By which a device draws its rows: another one than its neighbours'."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{device}".encode()).digest()[:8], "little") >> 1
