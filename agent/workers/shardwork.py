"""A board that has a share of the block that stands at every depth, in a round of agent.workers.splitwork.

    hub --SHARE--> shard --PARTIAL--> hub       for each sum of a batch, forwards, and backwards
    hub --STEP--> shard                         when all gradients of a step are added

It keeps its weights and their gradients, and nothing of a batch: all that a turn needs comes with it.
"""

from __future__ import annotations

import math

import numpy as np

from agent.workers.answering import factors_of
from agent.workers.splitwork import Asked, Said, SplitWork
from models.training.looped import Shard
from models.training.looping import ShardRound
from models.training.rounds import Diverged
from models.training.split import Misled
from wire.frames import Kind, Tensor
from wire.messages import SplitMeta, UpdateMeta
from wire.shares import Turn


class ShardWork(SplitWork):
    """On such a board."""

    _round_of: ShardRound | None = None
    _turn = -1
    """The last one that was answered."""
    _square: float | None = None
    """Of this step's gradients, when they are complete."""
    _samples = 0
    _told = False
    """Whether the round was answered; what is held out is judged still."""

    @property
    def _pending(self) -> bool:
        return self._round_of is not None and not self._told

    @property
    def _due(self) -> bool:
        return self._pending and self._round_of is not None and self._round_of.over

    def _begin(self, asked: Asked, tensor: Tensor | None, /) -> None:
        model, start, at = self._model, factors_of(tensor), asked.split.place
        if not isinstance(model.stage, Shard) or at is None or at >= len(asked.shards) or not asked.ends:
            raise ValueError(f"shard {at} of {len(asked.shards)}, for {len(asked.ends)} boards")
        self._round_of = ShardRound(model.stage, model.shaped, self._task, asked.meta, start)
        self._turn, self._square, self._told = -1, None, False

    def _go_on(self, asked: Asked) -> None:
        made = self._round_of
        assert made is not None
        update = UpdateMeta(
            round=asked.meta.round,
            device=self._device,
            samples=self._samples,
            compute_s=self._busy_s,
            peer_sent_bytes=self._sent_bytes,
            peer_got_bytes=self._got_bytes,
        )
        self._told = True
        self._give(asked.request, asked.meta, update, Tensor.of(made.vector()) if asked.meta.train else None)

    def _hear(self, asked: Asked, said: Said) -> None:
        made, meta = self._round_of, said.meta
        assert made is not None
        if said.kind is Kind.SHARE and meta.turn is not None and meta.place is None:
            current = meta.step == made.step and self._square is None and not made.over
            if meta.turn.number <= self._turn or not (current or (meta.judged and not meta.turn.backwards)):
                self.tally.stale += 1
                return
            self._answer_turn(asked, made, said, meta.turn)
        elif said.kind is Kind.STEP and meta.place is None:
            if meta.step != made.step or made.over or self._square is None or meta.square is None:
                self.tally.stale += 1
                return
            self._samples, self._square = meta.samples, None
            made.make_step(meta.square)
        else:
            self._refuse(f"{said.kind.name} of {meta.device} was not asked for")

    def _answer_turn(self, asked: Asked, made: ShardRound, said: Said, turn: Turn) -> None:
        meta, values = said.meta, said.values
        lengths = self._lengths(said, turn)
        found = made.answer(turn.part, turn.backwards, values, lengths)
        if not np.isfinite(found).all():
            raise Misled("states that the model makes no numbers of", meta.device)
        self._turn = turn.number
        square = None
        if turn.last:
            square = self._square = made.square()
            if not math.isfinite(square):
                raise Diverged(f"the gradient is {square} in step {made.step}", try_="a lower learning_rate")
        answer = SplitMeta(
            device=meta.device, place=asked.split.place, step=meta.step, judged=meta.judged, square=square, turn=turn
        )
        self._say(asked, asked.segments[0], Kind.PARTIAL, answer, np.ascontiguousarray(found, np.float32))

    def _lengths(self, said: Said, turn: Turn) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Of the texts of a turn, if that is one; raises ValueError: the hub alone says what comes here."""
        values, task = said.values, self._task
        shape = values.shape[1:] if turn.backwards and values.ndim == 4 and len(values) == 2 else values.shape
        if values.ndim != 3 + turn.backwards or len(shape) != 3 or shape[2] != self.order.hidden:
            raise ValueError(f"the hub sends values of {list(values.shape)}")
        lengths = np.array(said.meta.lengths, np.int64)
        fits = 1 <= shape[0] <= task.batch_rows and 1 <= shape[1] <= task.row_tokens
        if not fits or len(lengths) != shape[0] or lengths.min() < 1 or lengths.max() > shape[1]:
            raise ValueError(f"the hub sends {list(shape)} of {len(lengths)} texts, which is no batch")
        if not np.isfinite(values).all():
            raise ValueError("the hub sends what is no number")
        return lengths

    def _forget_round(self) -> None:
        self._round_of, self._square, self._told = None, None, False
