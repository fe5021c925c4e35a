"""What workers do with parcels in a round in which a model is split: ends with data on some boards, the trunk on one,
or cut into segments on several.

    coordinator --ROUND--> ends, segments
    ends --STATES--> first -> ... -> last --FEATURES--> ends            for each step
    ends --GRADIENT--> last -> ... -> first --STEP--> other segments
    ends, segments --UPDATE--> coordinator                              segments' have their factors

All of them go step by step together, so whoever loses a connection or its process loses the round for all: it says so,
and the coordinator begins it anew, with another number of session. What comes of a round depends on what it began with
and on who takes part, not on how often it was begun or in which order parcels came.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from agent.orders import is_inbox
from agent.workers.answering import Answering
from agent.workers.ledger import Spent
from agent.workers.sending import UNSENT
from models.engine.base import EngineFailed
from models.lora.adapter import Floats
from models.training.rounds import Diverged
from models.training.split import Misled
from wire.errors import CorruptData, PeerError
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.limits import MAX_ENDS, MAX_PARTIAL_BYTES
from wire.messages import RoundMeta, SplitMeta, SplitRound, decode
from wire.tensors import Dtype

MOST_UNREAD: Final = 2
"""Parcels of one device that wait to be looked at: a gradient, and the states of the step behind it."""
SAID: Final = (Kind.STATES, Kind.FEATURES, Kind.GRADIENT, Kind.STEP, Kind.SHARE, Kind.PARTIAL)
"""What devices say to each other."""


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
    shard: int | None


class Asked(NamedTuple):
    """The round that is under way."""

    request: int
    meta: RoundMeta
    split: SplitRound
    ends: Mapping[str, str]
    """Inboxes of the devices that have the ends; of a segment alone."""
    segments: Sequence[str]
    """Inboxes of those that have the blocks, in their order."""
    shards: Sequence[str] = ()
    """The same of shards of one block."""

    @property
    def last(self) -> int:
        return len(self.segments) - 1

    def most_unsent(self, topic: str) -> int:
        """Parcels that may wait to be sent there."""
        return MOST_UNREAD if topic in self.ends.values() else MOST_UNREAD * max(1, len(self.ends)) + 1


class SplitWork(Answering):
    """On a board that has a part of the model."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As agent.workers.answering.Answering."""
        super().__init__(*arguments, **options)
        self._asked_for: Asked | None = None
        self._sent_bytes = self._got_bytes = 0
        self._said: deque[Said] = deque()
        """Not yet looked at."""
        self._early: dict[str, Said] = {}
        """Of devices that heard of a session before we did: one of each, which then waits for us."""
        self._outgoing: dict[str, deque[Parcel]] = {}
        """What could not be sent yet, by topic: who takes nothing holds up nobody else."""
        self._untold: deque[Untold] = deque()

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
    def _begin(self, asked: Asked, tensor: Tensor | None, /) -> None:
        """Raises ValueError for what a round can't begin with, and what a ledger raises."""

    @abstractmethod
    def _hear(self, asked: Asked, said: Said) -> None:
        """Raises Misled, and what computing raises."""

    @abstractmethod
    def _go_on(self, asked: Asked) -> None:
        """With what is due; raises what computing raises."""

    @abstractmethod
    def _forget_round(self) -> None: ...

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
            self._complain(asked, "protocol", error.message, error.device, error.shard)
        except (Spent, CorruptData, OSError) as error:  # of a board's ledger
            self._drop_round()
            self.ended += 1
            self._complain(asked, "engine", str(error))
        except (Diverged, EngineFailed, ValueError, RuntimeError) as error:  # RuntimeError: torch, out of memory mostly
            self._drop_round()
            self.ended += 1
            self._complain(asked, "engine", self._told_of(error))
        finally:
            busy_s = self._stretch.end()
            if self._tells_times:
                self._busy_s += busy_s
                self.tally.prefill_steps += 1
                self.tally.prefill_busy_s += busy_s
        return True

    @property
    def _tells_times(self) -> bool:
        """Whether anybody may know what steps took."""
        return True

    def _told_of(self, error: Exception) -> str:
        """What others are told of what went wrong here."""
        return str(error)

    def tick(self, _now_s: float) -> None:
        self._again()
        for topic in list(self._outgoing):
            self._flush(topic)
        while self._untold and self._tell(*self._untold[0]):
            self._untold.popleft()

    def drop_all(self) -> None:
        """A connection was lost, and perhaps what was on its way: nobody can go on with the round."""
        asked = self._asked_for
        if asked is not None:  # also if it was answered: the last that others wait for may be lost
            lost = Untold(asked.meta.reply.topic, asked.request, "again", "a connection was lost", "", None)
            self._untold.append(lost)
            self._drop_round()
        self._lost()

    def _close(self, request: int) -> None:
        if self._asked_for is not None and self._asked_for.request == request:
            self._drop_round()
        self._early.clear()

    def _round(self, parcel: Parcel, meta: RoundMeta) -> None:
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
            for inbox in (peer.inbox for peer in (*meta.split.ends, *meta.split.segments, *meta.split.shards)):
                if inbox.broker or not is_inbox(inbox.topic, self._site):
                    raise ValueError(f"{inbox.topic!r} is not an inbox of this site")
            ends = {peer.device: peer.inbox.topic for peer in meta.split.ends}
            segments = [peer.inbox.topic for peer in meta.split.segments]
            shards = [peer.inbox.topic for peer in meta.split.shards]
            asked = Asked(parcel.request, meta, meta.split, ends, segments, shards)
            self._begin(asked, parcel.tensor)
        except (ValueError, Spent, CorruptData, OSError) as error:
            self._refuse(str(error))
            self._tell(meta.reply.topic, parcel.request, "engine", str(error))
            return
        self._forget_answer()
        # That this one was lost here is told all the same: it may be asked again while others are in the midst of it.
        self._untold = deque(told for told in self._untold if told.request == parcel.request)
        self.tally.requests += 1
        self._busy_s = 0.0
        self._sent_bytes = self._got_bytes = 0
        self._asked_for = asked
        early, self._early = self._early, {}
        self._said.extend(said for said in early.values() if said.session == asked.split.session)
        self._got_bytes = sum(said.values.nbytes for said in self._said)

    def _take(self, parcel: Parcel) -> bool:
        if parcel.kind not in SAID:
            return False
        self._take_said(parcel)
        return True

    def _take_said(self, parcel: Parcel) -> None:
        """Something of another device."""
        try:
            meta = decode(parcel.meta, SplitMeta, parcel.kind.name)
            values = _values(parcel, meta)
        except PeerError as error:
            self._refuse(error.message)
            return
        asked = self._asked_for
        if asked is not None and asked.split.session == parcel.request:
            if not self._takes_part(asked, meta.device):
                self._refuse(f"{meta.device} does not take part")
                return
            shard = meta.place if parcel.kind is Kind.PARTIAL else None
            if (
                sum(
                    _shard_or_device(said.kind, said.meta) == _shard_or_device(parcel.kind, meta)
                    for said in self._waiting
                )
                >= MOST_UNREAD
            ):
                self._complain(asked, "protocol", "says more than it was asked for", meta.device, shard)
                return
            self._got_bytes += values.nbytes
            self._came(parcel.kind, meta)
            self._said.append(Said(parcel.kind, parcel.request, meta, values.copy()))
            return
        held = sum(said.values.nbytes for device, said in self._early.items() if device != meta.device)
        if len(self._early) < MAX_ENDS and held + values.nbytes <= MAX_PARTIAL_BYTES:
            self._early[meta.device] = Said(parcel.kind, parcel.request, meta, values.copy())
        else:
            self.tally.stale += 1

    def _came(self, kind: Kind, meta: SplitMeta) -> None:
        """Something of the round, which is looked at later."""

    def _say(self, asked: Asked, topic: str, kind: Kind, meta: SplitMeta, values: Floats | None) -> None:
        """To another worker of the round, now or at the next tick. Raises Misled where it takes nothing."""
        tensor = None if values is None or not values.size else Tensor.of(values)
        parcel = Parcel(kind, self.order.epoch, asked.split.session, 0, FLAG_FINAL, tensor, msgspec.json.encode(meta))
        self._sent_bytes += 0 if values is None else values.nbytes
        waiting = self._outgoing.setdefault(topic, deque())
        if len(waiting) >= asked.most_unsent(topic):
            raise Misled("takes nothing of what it asked for", meta.device)
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

    def _takes_part(self, asked: Asked, device: str, /) -> bool:
        """Whether what is said of this device's batches concerns us."""
        return device in asked.ends

    @property
    def _waiting(self) -> Iterable[Said]:
        """What came and was not looked at."""
        return self._said

    def _complain(self, asked: Asked, code: str, text: str, device: str = "", shard: int | None = None) -> None:
        """Tell the coordinator what is wrong, now or when it can be reached."""
        told = Untold(asked.meta.reply.topic, asked.request, code, text, device, shard)
        if not self._tell(*told):
            self._untold.append(told)

    def _drop_round(self) -> None:
        """Nothing of it counts any more, and nothing more of it is sent."""
        if self._asked_for is not None:
            asked = self._asked_for
            for topic in (*asked.ends.values(), *asked.segments, *asked.shards):
                self._sender.drop(topic)
        self._asked_for = None
        self._said.clear()
        self._outgoing.clear()
        self._forget_round()


def _shard_or_device(kind: Kind, meta: SplitMeta) -> str | int | None:
    """Who says it: of a batch's parts each comes of another shard."""
    return meta.place if kind is Kind.PARTIAL else meta.device


def _values(parcel: Parcel, meta: SplitMeta) -> Floats:
    """Of what was said, as they lie in the parcel; raises PeerError."""
    unneeded = parcel.kind is Kind.GRADIENT and parcel.tensor is None and meta.place is not None
    if parcel.kind is Kind.STEP or unneeded:  # by a segment whose gradient nobody before it needs
        return np.zeros(0, np.float32)
    if parcel.tensor is None or parcel.tensor.dtype is not Dtype.F32:
        raise PeerError(f"{parcel.kind.name} of {meta.device} has no numbers")
    return np.asarray(parcel.tensor.array(), np.float32)
