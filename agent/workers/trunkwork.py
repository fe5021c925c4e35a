"""A board that has blocks of a model, all or a segment of them, in a round of agent.workers.splitwork."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final

import msgspec
import numpy as np

from agent.workers.answering import factors_of
from agent.workers.owntimes import OwnTimes
from agent.workers.questions import question_of
from agent.workers.splitwork import Asked, Said, SplitWork
from models.lora.adapter import Floats
from models.training.lowrank import trunk_kind
from models.training.rounds import Diverged
from models.training.split import Misled, Question
from models.training.trunk import Place, TrunkRound
from wire.frames import Kind, Tensor
from wire.messages import SplitMeta, UpdateMeta

MOST_JUDGED: Final = 10_000
"""Batches of one device in a round that no gradient follows."""


class TrunkWork(SplitWork):
    """On the board that has the blocks."""

    _round_of: TrunkRound | None = None
    _behind: float | None = None
    """Square of the step's gradients in the segments behind this one; None where it did not come yet."""
    _whole: float | None = None
    """The same of all segments."""
    _told = False
    """Whether the round was answered; what is held out is judged still."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._next_step: list[Said] = []
        """Of boards that are a step ahead of the slowest."""
        self._heard_s: dict[str, float] = {}
        """When each device went on last."""
        self._judged: Counter[str] = Counter()
        self._own = OwnTimes((), 0.0)
        self._judged_elsewhere: set[str] = set()
        """Devices whose last word was states to be judged, which other segments have now."""

    @property
    def _waiting(self) -> Iterable[Said]:
        return (*self._said, *self._next_step)

    @property
    def _pending(self) -> bool:
        return self._round_of is not None and not self._told

    @property
    def _due(self) -> bool:
        made = self._round_of
        if not self._pending or made is None:
            return False
        return made.over or made.addable or (made.added and self._whole is not None)

    def tick(self, now_s: float) -> None:
        super().tick(now_s)
        asked, made = self._asked_for, self._round_of
        if asked is None or made is None or made.over or self._said:
            return
        for device in self._awaited(asked, made):
            if now_s - self._heard_s[device] >= asked.split.patience_s:
                self._heard_s[device] = now_s
                text = f"nothing came of it for {asked.split.patience_s:g} s"
                self._complain(asked, "deadline", text, device)

    def _awaited(self, asked: Asked, made: TrunkRound) -> Iterable[str]:
        """Boards with the ends that this segment hears itself, and that it waits for."""
        first, last = asked.split.place == 0, asked.split.place == asked.last
        if first and last:
            return made.waits_for
        if first:
            return set(made.without_states) - self._judged_elsewhere
        return set(made.waits_for) - set(made.without_states) if last else ()

    def _begin(self, asked: Asked, tensor: Tensor | None, /) -> None:
        model, at = self._model, asked.split.place
        start = factors_of(tensor) if model.shaped else np.zeros(0, np.float32)
        if at is None or at > asked.last or not asked.ends:
            raise ValueError(f"segment {at} of {asked.last + 1}, for {len(asked.ends)} boards")
        place = Place(at == 0, at == asked.last)
        kind = trunk_kind(self._task, place)
        self._round_of = kind(model.stage, model.shaped, self._task, asked.meta, start, asked.ends, place)
        self._told = False
        self._own = OwnTimes(asked.ends, time.monotonic())
        self._judged.clear()
        self._judged_elsewhere.clear()
        self._begin_step(asked)

    def _begin_step(self, asked: Asked) -> None:
        self._heard_s = dict.fromkeys(asked.ends, time.monotonic())
        self._behind = 0.0 if asked.split.place == asked.last else None
        self._whole = None

    def _go_on(self, asked: Asked) -> None:
        made = self._round_of
        assert made is not None
        if made.over:
            self._finish(asked, made)
        elif made.addable:  # a device at a time, so that connections are served in between
            self._add_next(asked, made)
        else:
            assert self._whole is not None
            made.make_step(self._whole)
            self._begin_step(asked)
            self._said.extend(self._next_step)
            self._next_step.clear()

    def _add_next(self, asked: Asked, made: TrunkRound) -> None:
        """One device's gradients; and on to the segment before."""
        at = asked.split.place
        assert at is not None
        device, gradient = made.backwards()
        square = made.square(self._behind) if made.added and self._behind is not None else None
        if square is not None and not math.isfinite(square):
            raise Diverged(f"the gradient is {square} in step {made.step}", try_="a lower learning_rate")
        if gradient is not None:
            meta = SplitMeta(device=device, place=at, step=made.step, square=square)
            self._say(asked, asked.segments[at - 1], Kind.GRADIENT, meta, gradient)
        elif square is not None:
            self._whole = square
            meta = SplitMeta(device=device, place=at, step=made.step, square=square)
            for topic in asked.segments[1:]:
                self._say(asked, topic, Kind.STEP, meta, None)

    def _finish(self, asked: Asked, made: TrunkRound) -> None:
        tensor = Tensor.of(made.vector()) if asked.meta.train and self._model.shaped else None
        update = UpdateMeta(
            round=asked.meta.round,
            device=self._device,
            samples=made.samples,
            compute_s=self._busy_s,
            peer_sent_bytes=self._sent_bytes,
            peer_got_bytes=self._got_bytes,
            own_s=self._own.own_s if asked.split.place == 0 else {},
        )
        self._told = True
        self._give(asked.request, asked.meta, update, tensor)

    def _came(self, kind: Kind, meta: SplitMeta) -> None:
        if meta.place is None and kind in (Kind.STATES, Kind.GRADIENT):
            self._own.came(meta.device, time.monotonic(), last=kind is Kind.STATES)

    def _hear(self, asked: Asked, said: Said) -> None:
        made, at, device, step = self._round_of, asked.split.place, said.meta.device, said.meta.step
        assert made is not None and at is not None
        if said.kind is Kind.STATES and said.meta.place == (at - 1 if at else None):
            question = question_of(self.order, said)
            if not question.judged and step == made.step + 1 and device not in made.without_states:
                self._next_step.append(said)  # which need not wait for those who are slower, or on their way back
                return
            if not self._pass_on(asked, made, question, said.meta):
                self.tally.stale += 1
                return
        elif said.kind is Kind.GRADIENT and said.meta.place == (None if at == asked.last else at + 1):
            if not made.take(device, step, said.values.reshape(-1)):
                self.tally.stale += 1
                return
            if said.meta.square is not None:
                self._behind = said.meta.square
        elif said.kind is Kind.STEP and said.meta.place == 0 and at:
            if step != made.step or not made.added or said.meta.square is None:
                self.tally.stale += 1
                return
            self._whole = said.meta.square
        else:
            self._refuse(f"{said.kind.name} of {device} was not asked for")
            return
        self._heard_s[device] = time.monotonic()

    def _pass_on(self, asked: Asked, made: TrunkRound, question: Question, meta: SplitMeta) -> bool:
        """Answer, if this is the last segment; else tell the next one. False for what came before."""
        found, at = self._forwards(made, meta.device, question, meta.samples), asked.split.place
        assert at is not None
        if found is None:
            return False
        self._own.came(meta.device, time.monotonic(), last=True)  # where they came before the round was begun here
        if at == asked.last:
            answer = SplitMeta(device=meta.device, place=at, step=meta.step, judged=meta.judged)
            self._say(asked, asked.ends[meta.device], Kind.FEATURES, answer, found)
        else:
            self._say(asked, asked.segments[at + 1], Kind.STATES, msgspec.structs.replace(meta, place=at), found)
            (self._judged_elsewhere.add if meta.judged else self._judged_elsewhere.discard)(meta.device)
        self._own.answered(meta.device, time.monotonic())
        return True

    def _forwards(self, made: TrunkRound, device: str, question: Question, samples: int) -> Floats | None:
        if not question.judged:
            return made.forwards(device, question, samples)
        self._judged[device] += 1
        if self._judged[device] > MOST_JUDGED:
            raise Misled(f"has more than {MOST_JUDGED} batches judged", device)
        return made.judged(device, question)

    def _forget_round(self) -> None:
        self._round_of, self._told = None, False
        self._next_step.clear()
