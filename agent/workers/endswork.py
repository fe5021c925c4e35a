"""A board that has a model's ends, and data, in a round of agent.workers.splitwork."""

from __future__ import annotations

from agent.workers.roundwork import device_seed
from agent.workers.splitwork import Asked, Said, SplitWork
from models.training.lowrank import ends_kind
from models.training.split import EndsRound, Misled, Question
from wire.frames import Kind, Tensor
from wire.messages import SplitMeta, UpdateMeta


class EndsWork(SplitWork):
    """On a board with data."""

    _round_of: EndsRound | None = None
    _question: Question | None = None
    """That waits for features; None: the next one is due."""

    @property
    def _pending(self) -> bool:
        return self._round_of is not None

    @property
    def _due(self) -> bool:
        return self._round_of is not None and self._question is None

    def _begin(self, asked: Asked, _tensor: Tensor | None, /) -> None:
        model, task = self._model, self._task
        seed = device_seed(task.seed, self._device)
        self._round_of = ends_kind(task)(model.stage, model.shaped, model.rows, task, seed, asked.meta)

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
            peer_sent_bytes=self._sent_bytes,
            peer_got_bytes=self._got_bytes,
        )
        self._forget_round()
        self._give(asked.request, asked.meta, update, None)

    def _forget_round(self) -> None:
        self._round_of = self._question = None
