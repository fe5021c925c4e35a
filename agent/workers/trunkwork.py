"""The board that has all blocks of a model, in a round of agent.workers.splitwork."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from agent.workers.answering import factors_of
from agent.workers.splitwork import Asked, Said, SplitWork
from models.lora.adapter import Floats
from models.training.split import Misled, Question, TrunkRound
from wire.frames import Kind, Tensor
from wire.messages import SplitMeta, UpdateMeta

MOST_JUDGED: Final = 10_000
"""Batches of one device in a round that no gradient follows."""


class TrunkWork(SplitWork):
    """On the board that has the blocks."""

    _round_of: TrunkRound | None = None
    _told = False
    """Whether the round was answered; what is held out is judged still."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._next_step: list[Said] = []
        """Of boards that are a step ahead of the slowest."""
        self._heard_s: dict[str, float] = {}
        """When each device went on last."""
        self._judged: Counter[str] = Counter()

    @property
    def _waiting(self) -> Iterable[Said]:
        return (*self._said, *self._next_step)

    @property
    def _pending(self) -> bool:
        return self._round_of is not None and not self._told

    @property
    def _due(self) -> bool:
        return self._pending and self._round_of is not None and (self._round_of.over or self._round_of.complete)

    def tick(self, now_s: float) -> None:
        super().tick(now_s)
        asked, made = self._asked_for, self._round_of
        if asked is None or made is None or made.over or self._said:
            return
        for device in made.waits_for:
            if now_s - self._heard_s[device] >= asked.split.patience_s:
                self._heard_s[device] = now_s
                text = f"nothing came of it for {asked.split.patience_s:g} s"
                self._complain(asked, "deadline", text, device)

    def _begin(self, asked: Asked, tensor: Tensor | None, /) -> None:
        model, start = self._model, factors_of(tensor)
        self._round_of = TrunkRound(model.stage, model.shaped, self._task, asked.meta, start, asked.inboxes)
        self._told = False
        self._judged.clear()
        self._all_heard(asked)

    def _all_heard(self, asked: Asked) -> None:
        self._heard_s = dict.fromkeys(asked.inboxes, time.monotonic())

    def _go_on(self, asked: Asked) -> None:
        made = self._round_of
        assert made is not None
        if made.over:
            self._finish(asked, made)
        elif made.advance():  # a device at a time, so that connections are served in between
            self._all_heard(asked)
            self._said.extend(self._next_step)
            self._next_step.clear()

    def _finish(self, asked: Asked, made: TrunkRound) -> None:
        tensor = Tensor.of(made.vector()) if asked.meta.train else None
        update = UpdateMeta(
            round=asked.meta.round,
            device=self._device,
            samples=made.samples,
            compute_s=self._busy_s,
            peer_sent_bytes=self._sent_bytes,
            peer_got_bytes=self._got_bytes,
        )
        self._told = True
        self._give(asked.request, asked.meta, update, tensor)

    def _hear(self, asked: Asked, said: Said) -> None:
        made, device, step = self._round_of, said.meta.device, said.meta.step
        assert made is not None
        if said.kind is Kind.STATES:
            question = self._question(said)
            if not question.judged and step == made.step + 1 and device not in made.waits_for:
                self._next_step.append(said)  # it need not wait for those who are slower
                return
            features = self._features(made, device, question, said.meta.samples)
            if features is None:
                self.tally.stale += 1
                return
            meta = SplitMeta(device=self._device, step=step, judged=question.judged)
            self._say(asked, device, Kind.FEATURES, meta, features)
        elif said.kind is not Kind.GRADIENT:
            self._refuse(f"{said.kind.name} of {device} was not asked for")
            return
        elif not made.take(device, step, said.values.reshape(-1)):
            self.tally.stale += 1
            return
        self._heard_s[device] = time.monotonic()

    def _features(self, made: TrunkRound, device: str, question: Question, samples: int) -> Floats | None:
        if not question.judged:
            return made.features(device, question, samples)
        self._judged[device] += 1
        if self._judged[device] > MOST_JUDGED:
            raise Misled(f"has more than {MOST_JUDGED} batches judged", device)
        return made.judged(device, question)

    def _question(self, said: Said) -> Question:
        """The states that a device sent, if they can be such; raises Misled."""
        meta, states, hidden = said.meta, said.values, self.order.hidden
        lengths = np.array(meta.lengths, np.int64)
        rows, most = self._task.batch_rows, self._task.row_tokens
        fits = states.ndim == 3 and 1 <= len(states) <= rows and 1 <= states.shape[1] <= most
        if not fits or states.shape[2] != hidden:
            raise Misled(f"states of {list(states.shape)}, [1-{rows}, 1-{most}, {hidden}] were due", meta.device)
        if len(lengths) != len(states) or lengths.min() < 1 or lengths.max() > states.shape[1]:
            raise Misled("lengths that are none of these rows", meta.device)
        if meta.samples < 1:
            raise Misled("has no samples", meta.device)
        if not np.isfinite(states).all():
            raise Misled("states that are no numbers", meta.device)
        return Question(meta.step, meta.judged, states, lengths)

    def _forget_round(self) -> None:
        self._round_of, self._told = None, False
        self._next_step.clear()
