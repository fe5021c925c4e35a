"""What workers do with parcels in a round in which a model is split: ends with data on some boards, the trunk on one.

    coordinator --ROUND--> ends, trunk
    ends --STATES--> trunk --FEATURES--> ends --GRADIENT--> trunk       for each step
    ends, trunk --UPDATE--> coordinator                                 the trunk's has the factors

All of them go step by step together, so whoever loses a connection or its process loses the round for all: it says so,
and the coordinator begins it anew, with another number of session. What comes of a round depends on what it began with
and on who takes part, not on how often it was begun or in which order parcels came.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import numpy as np

from agent.orders import is_inbox
from agent.workers.answering import Answering, PacedSender
from agent.workers.roundwork import device_seed
from agent.workers.sending import UNSENT
from agent.workers.stretch import Stretch
from models.engine.base import EngineFailed
from models.lora.adapter import Floats
from models.training.rounds import Diverged
from models.training.samples import Split
from models.training.split import Ends, EndsRound, Misled, Question, Trunk, TrunkRound
from wire.channel import Delivery
from wire.errors import PeerError
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.limits import MAX_ENDS, MAX_PARTIAL_BYTES
from wire.messages import RoundMeta, SplitMeta, SplitRound, StageOrder, TrainingTask, UpdateMeta, decode
from wire.tensors import Dtype

MOST_UNREAD: Final = 2
"""Parcels of one device that wait to be looked at: a gradient, and the states of the step behind it."""
MOST_JUDGED: Final = 10_000
"""Batches of one device in a round that no gradient follows."""
SAID: Final = (Kind.STATES, Kind.FEATURES, Kind.GRADIENT)
"""What devices say to each other."""


class Part(Protocol):
    """agent.workers.training.Trainee."""

    @property
    def stage(self) -> Any: ...

    @property
    def shaped(self) -> Mapping[str, tuple[int, int]]: ...

    @property
    def rows(self) -> Split: ...

    @property
    def bad_rows(self) -> int: ...


class Said(NamedTuple):
    """By another device."""

    kind: Kind
    session: int
    meta: SplitMeta
    values: Floats
    """As it was laid out: [n, T, hidden], or one row."""


class Untold(NamedTuple):
    """What went wrong, for the coordinator, who could not be reached."""

    topic: str
    request: int
    code: str
    text: str
    device: str


class Asked(NamedTuple):
    """The round that is under way."""

    request: int
    meta: RoundMeta
    split: SplitRound
    inboxes: Mapping[str, str]
    """Of the devices that it is made with."""


class SplitWork(Answering, ABC):
    """`done(delivery)` returns credit to a sender; `fits()` raises EngineFailed when memory is over its limit."""

    def __init__(
        self,
        order: StageOrder,
        part: Part,
        sender: PacedSender,
        done: Callable[[Delivery], None],
        stretch: Stretch,
        site: str,
        device: str,
        fits: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(order, sender, site, device)
        self._part = part
        self._done = done
        self._stretch = stretch
        self._fits = fits
        self._asked_for: Asked | None = None
        self._busy_s = 0.0
        self._sent_bytes = self._got_bytes = 0
        self._said: deque[Said] = deque()
        """Not yet looked at."""
        self._early: dict[str, Said] = {}
        """Of devices that heard of a session before we did: one of each, which then waits for us."""
        self._outgoing: dict[str, deque[Parcel]] = {}
        """What could not be sent yet, by topic: who takes nothing holds up nobody else."""
        self._untold: deque[Untold] = deque()

    @property
    def _task(self) -> TrainingTask:
        assert self.order.training is not None
        return self.order.training

    @property
    def live(self) -> int:
        return int(self._asked_for is not None and self._pending)

    @property
    def runnable(self) -> bool:
        return self._asked_for is not None and (bool(self._said) or self._due)

    @property
    @abstractmethod
    def _pending(self) -> bool:
        """Whether a round that was begun has not been answered."""

    @property
    @abstractmethod
    def _due(self) -> bool:
        """Whether there is something to compute although nobody said anything."""

    @abstractmethod
    def _begin(self, asked: Asked, start: Floats | None, /) -> None:
        """Raises ValueError for what a round can't begin with."""

    @abstractmethod
    def _hear(self, asked: Asked, said: Said) -> None:
        """Raises Misled, and what computing raises."""

    def _go_on(self, asked: Asked) -> None:
        """With what is due; raises what computing raises."""

    @abstractmethod
    def _forget_round(self) -> None: ...

    def accept(self, delivery: Delivery, _now_s: float) -> None:
        """Take what arrived. Never raises for what came from the network."""
        parcel = delivery.parcel
        try:
            if parcel.epoch != self.order.epoch & 0xFFFFFFFF:
                self.tally.stale += 1
            elif parcel.kind is Kind.ROUND:
                self._round(parcel)
            elif parcel.kind is Kind.CLOSE:
                if self._asked_for is not None and self._asked_for.request == parcel.request:
                    self._drop_round()
                if self._answer is not None and self._answer.parcel.request == parcel.request:
                    self._forget_answer()
                self._early.clear()
            elif parcel.kind in SAID:
                self._take(parcel)
            else:
                self._refuse(f"{parcel.kind.name} is not for a worker that trains a part of a model")
        finally:
            self._done(delivery)

    def work(self, _now_s: float) -> bool:
        """Make one step; False if there is none."""
        asked = self._asked_for
        if asked is None or not self.runnable:
            return False
        self._stretch.begin()
        try:
            if self._said:
                self._hear(asked, self._said.popleft())
            else:
                self._go_on(asked)
            self._fits()
        except Misled as error:
            self._complain(asked, "protocol", error.message, error.device)
        except (Diverged, EngineFailed, ValueError, RuntimeError) as error:  # RuntimeError: torch, out of memory mostly
            self._drop_round()
            self.ended += 1
            self._complain(asked, "engine", str(error))
        finally:
            busy_s = self._stretch.end()
            self._busy_s += busy_s
            self.tally.prefill_steps += 1
            self.tally.prefill_busy_s += busy_s
        return True

    def tick(self, _now_s: float) -> None:
        self._again()
        for topic in list(self._outgoing):
            self._flush(topic)
        while self._untold and self._tell(*self._untold[0]):
            self._untold.popleft()

    def adopt(self, order: StageOrder) -> None:
        """Take a new order; rounds of another epoch count no more."""
        if order.epoch != self.order.epoch:
            self._drop_round()
            self._early.clear()
            self._forget_answer()
        self.order = order

    def drop_all(self) -> None:
        """A connection was lost, and perhaps what was on its way: nobody can go on with the round."""
        asked = self._asked_for
        if asked is not None:  # also if it was answered: the last that others wait for may be lost
            self._untold.append(Untold(asked.meta.reply.topic, asked.request, "again", "a connection was lost", ""))
            self._drop_round()
        self._lost()

    def _round(self, parcel: Parcel) -> None:
        meta = self._asked(parcel)
        if meta is None:
            return
        asked = self._asked_for
        if asked is not None and asked.request == parcel.request and self._pending:
            self._asked_for = asked._replace(meta=meta)
            return
        if self._answered_before(parcel.request, meta):
            return
        self._drop_round()
        try:
            if meta.split is None:
                raise ValueError("the round says nothing of whom to make it with")
            inboxes = {peer.device: peer.inbox.topic for peer in meta.split.peers}
            for inbox in (peer.inbox for peer in meta.split.peers):
                if inbox.broker or not is_inbox(inbox.topic, self._site):
                    raise ValueError(f"{inbox.topic!r} is not an inbox of this site")
            asked = Asked(parcel.request, meta, meta.split, inboxes)
            self._begin(asked, None if parcel.tensor is None else _row(parcel.tensor))
        except ValueError as error:
            self._refuse(str(error))
            self._tell(meta.reply.topic, parcel.request, "engine", str(error))
            return
        self._forget_answer()
        self._untold.clear()
        self.tally.requests += 1
        self._busy_s = 0.0
        self._sent_bytes = self._got_bytes = 0
        self._asked_for = asked
        early, self._early = self._early, {}
        self._said.extend(said for said in early.values() if said.session == asked.split.session)
        self._got_bytes = sum(said.values.nbytes for said in self._said)

    def _take(self, parcel: Parcel) -> None:
        """Something of another device."""
        try:
            meta = decode(parcel.meta, SplitMeta, parcel.kind.name)
            if parcel.tensor is None or parcel.tensor.dtype is not Dtype.F32:
                raise PeerError(f"{parcel.kind.name} of {meta.device} has no numbers")
        except PeerError as error:
            self._refuse(error.message)
            return
        asked = self._asked_for
        if asked is not None and asked.split.session == parcel.request:
            if meta.device not in asked.inboxes:
                self._refuse(f"{meta.device} does not take part")
                return
            if sum(said.meta.device == meta.device for said in self._waiting) >= MOST_UNREAD:
                self._complain(asked, "protocol", "says more than it was asked for", meta.device)
                return
            self._got_bytes += parcel.tensor.nbytes
            self._said.append(Said(parcel.kind, parcel.request, meta, np.array(parcel.tensor.array(), np.float32)))
            return
        held = sum(said.values.nbytes for device, said in self._early.items() if device != meta.device)
        if len(self._early) < MAX_ENDS and held + parcel.tensor.nbytes <= MAX_PARTIAL_BYTES:
            values = np.array(parcel.tensor.array(), np.float32)
            self._early[meta.device] = Said(parcel.kind, parcel.request, meta, values)
        else:
            self.tally.stale += 1

    def _say(self, asked: Asked, device: str, kind: Kind, meta: SplitMeta, values: Floats) -> None:
        """To another device of the round, now or at the next tick."""
        parcel = Parcel(
            kind, self.order.epoch, asked.split.session, 0, FLAG_FINAL, Tensor.of(values), msgspec.json.encode(meta)
        )
        topic = asked.inboxes[device]
        self._sent_bytes += values.nbytes
        waiting = self._outgoing.setdefault(topic, deque())
        if len(waiting) >= MOST_UNREAD:
            raise Misled("takes nothing of what it asked for", device)
        waiting.append(parcel)
        self._flush(topic)

    def _flush(self, topic: str) -> None:
        waiting = self._outgoing.get(topic, deque())
        while waiting:
            try:
                self._sender.to_requester(topic, waiting[0])
            except UNSENT:
                return  # again at the next tick
            waiting.popleft()
        self._outgoing.pop(topic, None)

    @property
    def _waiting(self) -> Iterable[Said]:
        """What came and was not looked at."""
        return self._said

    def _complain(self, asked: Asked, code: str, text: str, device: str = "") -> None:
        """Tell the coordinator what is wrong, now or when it can be reached."""
        told = Untold(asked.meta.reply.topic, asked.request, code, text, device)
        if not self._tell(*told):
            self._untold.append(told)

    def _drop_round(self) -> None:
        """Nothing of it counts any more, and nothing more of it is sent."""
        if self._asked_for is not None:
            for topic in self._asked_for.inboxes.values():
                self._sender.drop(topic)
        self._asked_for = None
        self._said.clear()
        self._outgoing.clear()
        self._forget_round()


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

    def _begin(self, asked: Asked, _start: Floats | None, /) -> None:
        if len(asked.inboxes) != 1:
            raise ValueError(f"{len(asked.inboxes)} trunks, there is to be one")
        part, task = self._part, self._task
        stage: Ends = part.stage
        seed = device_seed(task.seed, self._device)
        self._round_of = EndsRound(stage, part.shaped, part.rows, task, seed, asked.meta)

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
            samples=len(self._part.rows.trained),
            lengths=tuple(int(length) for length in question.lengths),
        )
        self._say(asked, next(iter(asked.inboxes)), Kind.STATES, meta, question.states)

    def _hear(self, asked: Asked, said: Said) -> None:
        question, made = self._question, self._round_of
        if made is None or question is None or said.kind is not Kind.FEATURES:
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
            self._say(asked, said.meta.device, Kind.GRADIENT, meta, gradients)

    def _finish(self, asked: Asked, made: EndsRound) -> None:
        update = UpdateMeta(
            round=asked.meta.round,
            device=self._device,
            samples=len(self._part.rows.trained),
            bad_rows=self._part.bad_rows,
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

    def _begin(self, asked: Asked, start: Floats | None, /) -> None:
        if start is None or not np.isfinite(start).all():
            raise ValueError("factors travel as one row of f32, all of them numbers")
        stage: Trunk = self._part.stage
        self._round_of = TrunkRound(stage, self._part.shaped, self._task, asked.meta, start, asked.inboxes)
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


def _row(tensor: Tensor) -> Floats:
    if tensor.dtype is not Dtype.F32 or len(tensor.shape) != 1:
        raise ValueError("factors travel as one row of f32")
    return np.array(tensor.array(), np.float32)
