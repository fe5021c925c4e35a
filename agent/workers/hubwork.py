"""A board that sums up what shards of one block make, in a round of agent.workers.splitwork: for boards with data it is
the whole trunk.

Batches go through one at a time. What comes meanwhile waits: states in the order in which they came, gradients in the
order of names.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from agent.workers.answering import factors_of
from agent.workers.questions import question_of
from agent.workers.splitwork import Asked, Said, SplitWork
from models.lora.adapter import Floats
from models.training.looped import Hub
from models.training.looping import HubRound, Wanted
from models.training.rounds import Diverged
from models.training.split import Misled
from wire.frames import Kind, Tensor
from wire.messages import SplitMeta, UpdateMeta
from wire.shares import Turn

MOST_JUDGED: Final = 10_000
"""Batches of one device in a round that no gradient follows."""


class HubWork(SplitWork):
    """On such a board."""

    _round_of: HubRound | None = None
    _turn = -1
    """That shards are asked, or were last."""
    _asked_s = 0.0
    """When they were."""
    _want: Wanted | None = None
    """What they are asked."""
    _question: SplitMeta | None = None
    """Of the batch that goes through."""
    _told = False
    """Whether the round was answered; what is held out is judged still."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._states: deque[Said] = deque()
        """That wait for their way through."""
        self._parts: dict[int, Floats] = {}
        """By shard, of this turn."""
        self._squares: dict[int, float] = {}
        """By shard, of this step's gradients."""
        self._heard_s: dict[str, float] = {}
        """When each device went on last, or was answered."""
        self._judged: Counter[str] = Counter()

    @property
    def _waiting(self) -> Iterable[Said]:
        return (*self._said, *self._states)

    @property
    def _pending(self) -> bool:
        return self._round_of is not None and not self._told

    @property
    def _due(self) -> bool:
        made, asked = self._round_of, self._asked_for
        if made is None or asked is None:
            return False
        if made.busy:
            return len(self._parts) == len(asked.shards)
        return made.addable or made.added or self._next_states() is not None or (made.over and not self._told)

    def tick(self, now_s: float) -> None:
        super().tick(now_s)
        asked, made = self._asked_for, self._round_of
        if asked is None or made is None or self._said or self.runnable:
            return
        patience_s = asked.split.patience_s
        text = f"nothing came of it for {patience_s:g} s"
        if made.busy:  # nobody else can go on
            if now_s - self._asked_s >= patience_s:
                self._asked_s = now_s
                for shard, peer in enumerate(asked.split.shards):
                    if shard not in self._parts:
                        self._complain(asked, "deadline", text, peer.device, shard)
            return
        waits = {said.meta.device for said in self._states}
        for device in () if made.over else (*made.without_states, *made.without_gradients):
            if device not in waits and now_s - self._heard_s[device] >= patience_s:
                self._heard_s[device] = now_s
                self._complain(asked, "deadline", text, device)

    def _begin(self, asked: Asked, tensor: Tensor | None, /) -> None:
        model, start = self._model, factors_of(tensor)
        if not isinstance(model.stage, Hub) or not asked.shards or not asked.ends:
            raise ValueError(f"a hub of {len(asked.shards)} shards, for {len(asked.ends)} boards")
        loops = self.order.end_block - self.order.first_block
        self._round_of = HubRound(model.stage, model.shaped, self._task, asked.meta, start, asked.ends, loops)
        self._turn, self._told = -1, False
        self._judged.clear()
        self._heard_s = dict.fromkeys(asked.ends, time.monotonic())

    def _go_on(self, asked: Asked) -> None:
        made = self._round_of
        assert made is not None
        if made.busy:
            self._sum_up(asked, made)
        elif made.added:
            self._make_step(asked, made)
        elif made.addable:
            made.begin_back()
            self._ask(asked, made)
        elif made.over and not self._told:
            self._finish(asked, made)
        else:
            said = self._next_states()
            assert said is not None
            self._states.remove(said)
            if made.begin(said.meta.device, question_of(self.order, said), said.meta.samples):
                self._question = said.meta
                self._ask(asked, made)
            else:
                self.tally.stale += 1

    def _next_states(self) -> Said | None:
        """The first that can go through now: what is of the next step waits until this one is made."""
        step = 0 if self._round_of is None else self._round_of.step
        return next((said for said in self._states if said.meta.judged or said.meta.step <= step), None)

    def _ask(self, asked: Asked, made: HubRound) -> None:
        """All shards, for their part of the next sum."""
        self._turn += 1
        self._asked_s = time.monotonic()
        self._parts.clear()
        want = self._want = made.wanted
        meta = SplitMeta(
            device=want.device,
            step=made.step,
            judged=want.judged,
            lengths=tuple(int(length) for length in want.lengths),
            turn=Turn(number=self._turn, part=want.part, backwards=want.backwards, last=want.last),
        )
        for topic in asked.shards:
            self._say(asked, topic, Kind.SHARE, meta, np.ascontiguousarray(want.values, np.float32))

    def _sum_up(self, asked: Asked, made: HubRound) -> None:
        parts = [self._parts[shard] for shard in range(len(asked.shards))]
        self._parts.clear()
        found = made.answered(parts)
        if made.busy:
            self._ask(asked, made)
        elif found is not None:
            question = self._question
            assert question is not None
            self._heard_s[question.device] = time.monotonic()
            answer = SplitMeta(device=question.device, place=0, step=question.step, judged=question.judged)
            topic = asked.ends[question.device]
            self._say(asked, topic, Kind.FEATURES, answer, np.ascontiguousarray(found, np.float32))

    def _make_step(self, asked: Asked, made: HubRound) -> None:
        square = made.square([self._squares[shard] for shard in range(len(asked.shards))])
        self._squares.clear()
        if not math.isfinite(square):
            raise Diverged(f"the gradient is {square} in step {made.step}", try_="a lower learning_rate")
        meta = SplitMeta(device=min(asked.ends), step=made.step, square=square, samples=made.samples)
        for topic in asked.shards:
            self._say(asked, topic, Kind.STEP, meta, None)
        made.make_step(square)
        self._heard_s = dict.fromkeys(asked.ends, time.monotonic())

    def _finish(self, asked: Asked, made: HubRound) -> None:
        update = UpdateMeta(
            round=asked.meta.round,
            device=self._device,
            samples=made.samples,
            compute_s=self._busy_s,
            peer_sent_bytes=self._sent_bytes,
            peer_got_bytes=self._got_bytes,
        )
        self._told = True
        self._give(asked.request, asked.meta, update, Tensor.of(made.vector()) if asked.meta.train else None)

    def _hear(self, asked: Asked, said: Said) -> None:
        made, meta = self._round_of, said.meta
        assert made is not None
        if said.kind is Kind.STATES and meta.place is None:
            question_of(self.order, said)  # who sends what can't be is named at once
            if meta.judged:
                self._judged[meta.device] += 1
                if self._judged[meta.device] > MOST_JUDGED:
                    raise Misled(f"has more than {MOST_JUDGED} batches judged", meta.device)
            self._states.append(said)
        elif said.kind is Kind.GRADIENT and meta.place is None:
            if not made.take(meta.device, meta.step, said.values.reshape(-1)):
                self.tally.stale += 1
                return
        elif said.kind is Kind.PARTIAL and meta.place is not None and meta.place < len(asked.shards):
            self._take_part(asked, made, said, meta.place)
            return
        else:
            self._refuse(f"{said.kind.name} of {meta.device} was not asked for")
            return
        self._heard_s[meta.device] = time.monotonic()

    def _take_part(self, asked: Asked, made: HubRound, said: Said, shard: int) -> None:
        """Raises Misled for what can't be a part of the sum."""
        meta, want, device = said.meta, self._want, asked.split.shards[shard].device
        if want is None or not made.busy or meta.turn is None or meta.turn.number != self._turn or shard in self._parts:
            self.tally.stale += 1
            return
        due = want.values.shape[-3:]
        if said.values.shape != due:
            raise Misled(f"a part of {list(said.values.shape)}, {list(due)} was due", device, shard)
        if not np.isfinite(said.values).all():
            raise Misled("a part that is no numbers", device, shard)
        if want.last:
            if meta.square is None:
                raise Misled("does not say how long its gradients are", device, shard)
            self._squares[shard] = meta.square
        self._parts[shard] = said.values

    def _forget_round(self) -> None:
        self._round_of, self._want, self._question, self._told = None, None, None, False
        self._states.clear()
        self._parts.clear()
        self._squares.clear()
