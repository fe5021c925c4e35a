"""A board that has a model's ends, and data, in a round of agent.workers.splitwork."""

from __future__ import annotations

import hashlib
import sys
from typing import Final

from agent.workers.ledger import Ledger, release_of
from agent.workers.roundwork import device_seed, job_of, name_of
from agent.workers.splitwork import Asked, Said, SplitWork
from models.lora.adapter import Floats
from models.privacy.noise import Stream
from models.privacy.plan import Measure, measure_of
from models.training.lowrank import ends_kind
from models.training.privateends import PrivateEnds
from models.training.split import EndsRound, Misled, Question
from wire.frames import Kind, Tensor
from wire.messages import RoundMeta, SplitMeta, UpdateMeta
from wire.privacy import Privacy

HIDDEN: Final = "it could not train; its own log says why"


class Steps:
    """Of a private round: its steps as the ledger enters them, one by one. A step that is made again of the same
    features is the same release; of others, as where another board was left out, one more."""

    def __init__(self, ledger: Ledger, job: str, name: str, measure: Measure, privacy: Privacy) -> None:
        """Raises Spent where the budget does not last for all of them, so that nobody begins what can't be ended."""
        self.measure = measure
        self.spent: float | None = None
        """Epsilon of the job, once something was told."""
        self._ledger, self._job, self._name, self._privacy = ledger, job, name, privacy
        known = ledger.steps(job, name)
        self._label = release_of(name, known.before)
        left = max(0, measure.releases - len(known.told))
        ledger.check(job, left * measure.cost_again(0), privacy.epsilon, privacy.delta)

    def draws(self, step: int) -> Stream:
        return self._ledger.draws(release_of(self._label, step, "drawn"))

    def paid(self, step: int, came: Floats) -> Stream:
        """Raises Spent, CorruptData, OSError."""
        release = release_of(self._label, step, hashlib.sha256(came.tobytes()).hexdigest())
        stream, self.spent = self._ledger.spend_step(
            self._job, self._name, step, release, self.measure.cost_again, self._privacy.epsilon, self._privacy.delta
        )
        return stream


class EndsWork(SplitWork):
    """On a board with data."""

    _round_of: EndsRound | None = None
    _question: Question | None = None
    """That waits for features; None: the next one is due."""
    _steps: Steps | None = None
    """Of a private job, in rounds that train."""

    @property
    def _pending(self) -> bool:
        return self._round_of is not None

    @property
    def _due(self) -> bool:
        return self._round_of is not None and self._question is None

    def _begin(self, asked: Asked, _tensor: Tensor | None, /) -> None:
        model, task, meta = self._model, self._task, asked.meta
        seed = device_seed(task.seed, self._device)
        if task.privacy is None or not meta.train:
            self._round_of = ends_kind(task)(model.stage, model.shaped, model.rows, task, seed, meta)
            return
        self._steps = self._account(task.privacy, meta, seed)
        self._round_of = PrivateEnds(model.stage, model.shaped, model.rows, task, seed, meta, self._steps)

    def _account(self, privacy: Privacy, meta: RoundMeta, seed: int) -> Steps:
        model, order = self._model, self.order
        measure = measure_of(self._task, len(model.rows.trained), len(meta.parts), seed, meta.round)
        name = name_of(order, self._device, model.fingerprint, measure, meta.round, meta.parts)
        return Steps(model.ledger, job_of(order), name, measure, privacy)

    @property
    def _tells_times(self) -> bool:
        return self._task.privacy is None

    def _told_of(self, error: Exception) -> str:
        if self._task.privacy is None:
            return str(error)
        print(f"a private round: {error}", file=sys.stderr, flush=True)
        return HIDDEN

    def _go_on(self, asked: Asked) -> None:
        assert self._round_of is not None
        question = self._question = self._round_of.question()
        if question is None:
            self._finish(asked, self._round_of)
            return
        meta = SplitMeta(
            device=self._device,
            step=question.step,
            judged=question.judged,
            samples=len(self._model.rows.trained),
            lengths=tuple(int(length) for length in question.lengths),
        )
        self._say(asked, asked.segments[0], Kind.STATES, meta, question.states)

    def _hear(self, asked: Asked, said: Said) -> None:
        question, made = self._question, self._round_of
        if made is None or question is None or said.kind is not Kind.FEATURES or said.meta.place != asked.last:
            self._refuse(f"{said.kind.name} of {said.meta.device} was not asked for")
            return
        if (said.meta.step, said.meta.judged) != (question.step, question.judged):
            self.tally.stale += 1
            return
        try:
            gradients = made.answered(said.values.reshape(-1).copy())
        except ValueError as error:
            raise Misled(str(error), said.meta.device) from None
        self._question = None
        if gradients is not None:
            meta = SplitMeta(device=self._device, step=question.step)
            self._say(asked, asked.segments[-1], Kind.GRADIENT, meta, gradients)

    def _takes_part(self, _asked: Asked, device: str, /) -> bool:
        return device == self._device

    def _finish(self, asked: Asked, made: EndsRound) -> None:
        update = UpdateMeta(
            round=asked.meta.round,
            device=self._device,
            samples=len(self._model.rows.trained),
            bad_rows=self._model.bad_rows,
            loss=made.loss,
            held_out_loss=made.held_out_loss,
            held_out_count=made.held_out_count,
            held_out_right=made.held_out_right,
            compute_s=self._busy_s,
            noise=None if self._steps is None else self._steps.measure.noise,
            epsilon=None if self._steps is None else self._steps.spent,
            peer_sent_bytes=self._sent_bytes,
            peer_got_bytes=self._got_bytes,
        )
        self._forget_round()
        self._give(asked.request, asked.meta, update, None)

    def _forget_round(self) -> None:
        self._round_of = self._question = self._steps = None
