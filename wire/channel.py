"""Parcels over a Transport: an Outbox sends into one inbox topic, an Inbox receives from many senders.

The two keep the credit of every sender (wire.flow): frames go on the inbox topic, grants come back on the credit topic
beside it. Single-threaded: both belong to the thread that polls their transport. Neither raises out of a handler; what
the network sends wrongly is counted, dropped and noted.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from msgspec import Struct

from wire import topics
from wire.assembly import Assembler
from wire.errors import EdgelamError, MalformedFrame, PeerError
from wire.flow import Credit, ReceiveWindow, SendWindow, Verdict, encode_credit, parse_credit
from wire.frames import Dtype, Frame, Kind, Laid, Parcel, Tensor, encode, lay_out, parse
from wire.ids import new_stream_id
from wire.limits import (
    CHUNK_BYTES_DEFAULT,
    CHUNK_BYTES_FAST,
    CREDIT_ASK_S,
    CREDIT_WINDOW_BYTES,
    MAX_BACKLOG_BYTES,
    MAX_HELD_BYTES,
    MAX_SENDERS,
    MAX_WINDOW_BYTES,
)
from wire.pace import Pace
from wire.transport import Buffer, Inbound, Link, NotConnected, Transport

Clock = Callable[[], float]

_RETAINED_SHARE: Final = 4
"""A parcel keeps at most 1/4 of its sender's window until it is done with: the rest flows back as chunks arrive, so
that a parcel may be larger than the window, and yet only a few whole ones wait for a slow consumer. Three quarters
remain: enough for one chunk of CHUNK_BYTES_FAST and the quarter that makes a grant due, so a stream never stops."""

_LEAST_HELD_BYTES: Final = 1024
"""What an empty parcel costs in memory, about; counted in MAX_HELD_BYTES."""


class Backlogged(EdgelamError):
    """The receiver gives no credit and MAX_BACKLOG_BYTES are queued already; this parcel was not queued."""


class Outbox:
    """One stream of parcels into one inbox. Sends at once as far as credit goes and queues the rest."""

    def __init__(
        self,
        transport: Transport,
        inbox_topic: str,
        *,
        stream: int | None = None,
        chunk_bytes: int = CHUNK_BYTES_DEFAULT,
        clock: Clock = time.monotonic,
    ) -> None:
        if not 1 <= chunk_bytes <= CHUNK_BYTES_FAST:
            raise ValueError(f"chunks of {chunk_bytes} bytes, 1 to {CHUNK_BYTES_FAST} are possible")
        self.stream = new_stream_id() if stream is None else stream
        self.topic = inbox_topic
        self.parcels = 0
        self.frames = 0
        self.bytes = 0
        """Payload bytes handed to the transport: whole frames, without topic names."""
        self.dropped_frames = 0
        """Frames that were queued or cut when the link went down."""
        self.bad_credits = 0
        self.pace: Pace | None = None
        """How fast it may send, besides what credit allows; None: at once."""
        self._transport = transport
        self._chunk_bytes = chunk_bytes
        self._clock = clock
        self._window = SendWindow()
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._end_offset = 0
        self._blocked_since_s: float | None = None
        self._blocked_s = 0.0
        self._asked_s = 0.0
        self._credit_topic = topics.credit_of(inbox_topic)
        transport.subscribe(self._credit_topic, self._on_credit)

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for credit."""
        return self._backlog_bytes

    @property
    def blocked_s(self) -> float:
        """Seconds in which something waited for credit, in total, until now."""
        if self._blocked_since_s is None:
            return self._blocked_s
        return self._blocked_s + self._clock() - self._blocked_since_s

    def send(self, parcel: Parcel) -> None:
        """Send a parcel, or what credit allows of it, and queue a copy of the rest.

        The tensor may be overwritten when this returns. Raises NotConnected if the link is down (nothing of the parcel
        will arrive whole) and Backlogged if too much is queued.
        """
        if self._transport.link is not Link.UP:
            self._drop_backlog()
            raise NotConnected(f"{self.topic}: the connection is {self._transport.link.value}, nothing was sent")
        if self._backlog:
            tensor_bytes = 0 if parcel.tensor is None else parcel.tensor.nbytes
            if self._backlog_bytes + tensor_bytes > MAX_BACKLOG_BYTES:
                raise Backlogged(
                    f"{self.topic}: {self._backlog_bytes} bytes wait for credit, the receiver takes none",
                    try_="see whether the device behind this topic still works: edgelam top",
                )
        frames = encode(parcel, self.stream, self._end_offset, self.parcels, self._chunk_bytes)
        self.parcels += 1
        sizes = [sum(map(len, frame)) for frame in frames]
        self._end_offset += sum(sizes)
        for index, frame in enumerate(frames):
            frame_bytes = sizes[index]
            if self._backlog or not self._may_send(frame_bytes):
                self._queue(frame, frame_bytes)
                continue
            try:
                self._publish(frame, frame_bytes)
            except NotConnected:
                self.dropped_frames += len(frames) - index
                self._drop_backlog()
                raise

    def lay_out(self, parcel: Parcel) -> Laid | None:
        """Lay out the frame of the parcel that may come next (see wire.frames.lay_out); None if it could not go out at
        once, as one chunk. Whoever sends it instead of `send` says so with `went`."""
        tensor = parcel.tensor
        if tensor is None or self._backlog or tensor.nbytes > self._chunk_bytes or self._transport.link is not Link.UP:
            return None
        if self.pace is not None:
            return None
        laid = lay_out(parcel, self.stream, self._end_offset, self.parcels)
        return laid if self._window.may_send(laid.frame_bytes) else None

    def went(self, laid: Laid) -> None:
        """What was laid out last has been sent, and nothing since then."""
        self.parcels += 1
        self._end_offset += laid.frame_bytes
        self._window.sent(laid.frame_bytes)
        self.frames += 1
        self.bytes += laid.frame_bytes

    def tick(self) -> None:
        """Call at least every CREDIT_ASK_S, and where there is a pace more often: sends what has become due, and asks
        again for credit that may have been lost."""
        if not self._backlog:
            return
        if self._transport.link is not Link.UP:
            self._drop_backlog()
            return
        self._flush()
        if not self._backlog or self._window.may_send(len(self._backlog[0])):
            return  # it waits for its pace
        now_s = self._clock()
        if self._blocked_since_s is None or now_s - max(self._blocked_since_s, self._asked_s) < CREDIT_ASK_S:
            return
        self._asked_s = now_s
        [ask] = encode(Parcel(Kind.ASK), self.stream, self._window.offset, self.parcels)
        try:
            self._transport.publish(self.topic, ask)
        except NotConnected:
            self._drop_backlog()

    def drop(self) -> None:
        """Send nothing more of what is queued; the receiver sees a gap, and takes what comes behind it."""
        self._drop_backlog()

    def close(self) -> None:
        """Stop listening for credit; what is queued is dropped."""
        self._drop_backlog()
        self._transport.unsubscribe(self._credit_topic, self._on_credit)

    def _on_credit(self, inbound: Inbound) -> None:
        try:
            credit = parse_credit(inbound.payload)
        except MalformedFrame:
            self.bad_credits += 1
            return
        if credit.stream == self.stream and self._window.granted(credit.limit):
            self._flush()

    def _may_send(self, frame_bytes: int) -> bool:
        return self._window.may_send(frame_bytes) and (self.pace is None or self.pace.may_send(frame_bytes))

    def _flush(self) -> None:
        try:
            while self._backlog and self._may_send(len(self._backlog[0])):
                frame = self._backlog.popleft()
                self._backlog_bytes -= len(frame)
                self._publish(frame, len(frame))
        except NotConnected:
            self.dropped_frames += 1
            self._drop_backlog()
        if not self._backlog:
            self._unblocked()

    def _publish(self, frame: Buffer | list[Buffer], frame_bytes: int) -> None:
        """Publish a frame; its bytes are counted as sent even if the link is down (the receiver will see a gap)."""
        self._window.sent(frame_bytes)
        if self.pace is not None:
            self.pace.sent(frame_bytes)
        self._transport.publish(self.topic, frame)
        self.frames += 1
        self.bytes += frame_bytes

    def _queue(self, frame: list[Buffer], frame_bytes: int) -> None:
        """Queue a copy: the tensor belongs to an engine that overwrites it at its next step."""
        self._backlog.append(b"".join(frame))
        self._backlog_bytes += frame_bytes
        if self._blocked_since_s is None:
            self._blocked_since_s = self._clock()

    def _drop_backlog(self) -> None:
        """After the link went down: a queued rest of a parcel is of no use, and its bytes show as a gap."""
        self.dropped_frames += len(self._backlog)
        self._backlog.clear()
        self._backlog_bytes = 0
        self._window.sent(self._end_offset - self._window.offset)
        self._unblocked()

    def _unblocked(self) -> None:
        self._blocked_s = self.blocked_s
        self._blocked_since_s = None


@dataclass(slots=True)
class _Sender:
    """State of one stream: `retained_bytes` of credit and `frame_bytes` belong to its parcel in assembly."""

    window: ReceiveWindow
    retained_bytes: int = 0
    frame_bytes: int = 0
    grant_waits: bool = False


class Delivery(Struct, frozen=True, eq=False, gc=False):
    """A parcel that arrived whole. Give it back with `Inbox.done` when its bytes are no longer needed."""

    parcel: Parcel
    stream: int
    bytes: int
    """Whole frames of the parcel, headers counted."""
    arrived_s: float
    """The inbox's clock at its last chunk."""
    credit_bytes: int
    """What `done` returns to the sender."""
    sender: _Sender
    inbox: Inbox
    """Whose it is."""


@dataclass(slots=True)
class InboxCounters:
    """Totals since the start."""

    parcels: int = 0
    frames: int = 0
    bytes: int = 0
    """Bytes of all messages that came, the refused ones too."""
    refused: int = 0
    duplicates: int = 0
    gaps: int = 0
    lost_bytes: int = 0
    dropped_parcels: int = 0
    """Parcels of which a part never came."""
    refusals: dict[str, str] = field(default_factory=dict)
    """The first refusal of each kind ('malformed', 'retained', 'credit', 'full'), in words."""


class Inbox:
    """Receives the parcels for one topic, from any number of senders up to MAX_SENDERS, in the order they complete."""

    def __init__(
        self,
        transport: Transport,
        topic: str,
        *,
        window_bytes: int = CREDIT_WINDOW_BYTES,
        clock: Clock = time.monotonic,
    ) -> None:
        if not CREDIT_WINDOW_BYTES <= window_bytes <= MAX_WINDOW_BYTES:
            raise ValueError(
                f"window of {window_bytes} bytes, {CREDIT_WINDOW_BYTES} to {MAX_WINDOW_BYTES} are possible"
            )
        self.topic = topic
        self.counters = InboxCounters()
        self.last_refusal = ""
        """Words about the newest kind of refusal, '' while there was none."""
        self._transport = transport
        self._window_bytes = window_bytes
        self._clock = clock
        self._senders: OrderedDict[int, _Sender] = OrderedDict()
        self._assembler = Assembler()
        self._ready: deque[Delivery] = deque()
        self._last: Frame | None = None
        self._held_bytes = 0
        self._credit_topic = topics.credit_of(topic)
        transport.subscribe(topic, self._on_frame)

    @property
    def waiting(self) -> int:
        """Parcels that `take` would give."""
        return len(self._ready)

    @property
    def held_bytes(self) -> int:
        """Bytes of parcels that were not yet `done`, and of those in assembly."""
        return self._held_bytes + self._assembler.held_bytes

    def take(self) -> Delivery | None:
        """Give the oldest parcel that is whole, or None."""
        return self._ready.popleft() if self._ready else None

    def foresee(self, request: int, position: int) -> Laid | None:
        """How the next frame will look if it goes on as the last one did: the same sender, kind, dtype and shape, no
        meta, one chunk, for this row of this request. None if the last was not of that kind, or there is no credit."""
        last = self._last
        if last is None or last.request != request or last.meta or last.chunks != 1 or last.dtype is Dtype.NONE:
            return None
        sender = self._senders.get(last.stream)
        if sender is None or self._ready or not sender.window.takes(last.whole_bytes):
            return None
        tensor = Tensor(last.dtype, last.shape, last.group, ())
        parcel = Parcel(last.kind, last.epoch, request, position, last.flags, tensor)
        laid = lay_out(parcel, last.stream, sender.window.expected, last.parcel + 1)
        return Laid(laid.rest, last.whole_bytes)

    def done(self, delivery: Delivery) -> None:
        """Return the credit of a taken parcel to its sender. Exactly once per delivery."""
        self._held_bytes -= _held_bytes(delivery.bytes)
        delivery.sender.window.consumed(delivery.credit_bytes)
        if self._senders.get(delivery.stream) is delivery.sender:
            self._grant(delivery.stream, delivery.sender)

    def tick(self) -> None:
        """Call every second or so: repeats grants that could not be sent, drops parcels whose chunks stopped coming."""
        for stream in self._assembler.stale(self._clock()):
            self._drop_partial(stream)
        for stream, sender in self._senders.items():
            if sender.grant_waits:
                self._send_grant(stream, sender, sender.window.grant_now())

    def close(self) -> None:
        """Stop receiving; what was delivered stays valid."""
        self._transport.unsubscribe(self.topic, self._on_frame)
        self._senders.clear()

    def _on_frame(self, inbound: Inbound) -> None:
        self.counters.bytes += len(inbound.payload)
        if inbound.retained:
            self._refuse("retained", "a retained frame: frames are never retained, somebody else put it there")
            return
        try:
            frame = parse(inbound.payload)
        except MalformedFrame as error:
            self._refuse("malformed", error.message)
            return
        sender = self._sender(frame)
        if frame.kind is Kind.ASK:
            self._settle(frame.stream, sender, sender.window.asked(frame.offset))
            self._send_grant(frame.stream, sender, sender.window.grant_now())
            return
        if self._held_bytes + _held_bytes(frame.whole_bytes) > MAX_HELD_BYTES:
            self._refuse("full", f"{self._held_bytes} bytes wait to be taken already")
            return
        arrival = sender.window.arrived(frame.offset, frame.whole_bytes)
        if arrival.verdict is Verdict.DUPLICATE:
            self.counters.duplicates += 1
        elif arrival.verdict is Verdict.BEYOND:
            self._refuse("credit", f"stream {frame.stream:x} sent more than it was granted")
        else:
            self.counters.frames += 1
            self._last = frame
            self._settle(frame.stream, sender, arrival.lost_bytes)
            self._assemble(frame, sender)
            self._grant(frame.stream, sender)

    def _assemble(self, frame: Frame, sender: _Sender) -> None:
        """Add a fresh frame; queue the parcel it completes. What is not retained of its credit flows back."""
        if self._assembler.supersedes(frame):
            self._drop_partial(frame.stream)
        try:
            parcel = self._assembler.add(frame, self._clock())
        except PeerError as error:
            sender.window.consumed(frame.whole_bytes)
            self._refuse("malformed" if isinstance(error, MalformedFrame) else "full", error.message)
            return
        room = max(0, self._window_bytes // _RETAINED_SHARE - sender.retained_bytes)
        retained = min(frame.whole_bytes, room) if frame.chunks > 1 else frame.whole_bytes
        sender.retained_bytes += retained
        sender.frame_bytes += frame.whole_bytes
        sender.window.consumed(frame.whole_bytes - retained)
        if parcel is None:
            return
        delivery = Delivery(
            parcel, frame.stream, sender.frame_bytes, self._clock(), sender.retained_bytes, sender, self
        )
        sender.retained_bytes = sender.frame_bytes = 0
        self._held_bytes += _held_bytes(delivery.bytes)
        self.counters.parcels += 1
        self._ready.append(delivery)

    def _sender(self, frame: Frame) -> _Sender:
        """State of the frame's stream; a new one starts at this frame, the longest silent one is forgotten for it."""
        sender = self._senders.get(frame.stream)
        if sender is None:
            if len(self._senders) >= MAX_SENDERS:
                forgotten, _ = self._senders.popitem(last=False)
                self._assembler.drop(forgotten)
            sender = self._senders[frame.stream] = _Sender(ReceiveWindow(self._window_bytes, frame.offset))
        else:
            self._senders.move_to_end(frame.stream)
        return sender

    def _settle(self, stream: int, sender: _Sender, lost_bytes: int) -> None:
        if lost_bytes:
            self.counters.gaps += 1
            self.counters.lost_bytes += lost_bytes
            if sender.frame_bytes:
                self._drop_partial(stream)

    def _drop_partial(self, stream: int) -> None:
        """Forget an unfinished parcel: a chunk of it is lost for good."""
        if self._assembler.drop(stream):
            self.counters.dropped_parcels += 1
        sender = self._senders.get(stream)
        if sender is not None:
            sender.window.consumed(sender.retained_bytes)
            sender.retained_bytes = sender.frame_bytes = 0
            self._grant(stream, sender)

    def _grant(self, stream: int, sender: _Sender) -> None:
        limit = sender.window.grant_due()
        if limit is not None:
            self._send_grant(stream, sender, limit)

    def _send_grant(self, stream: int, sender: _Sender, limit: int) -> None:
        try:
            self._transport.publish(self._credit_topic, encode_credit(Credit(stream, limit)))
            sender.grant_waits = False
        except NotConnected:
            sender.grant_waits = True

    def _refuse(self, kind: str, words: str) -> None:
        self.counters.refused += 1
        if kind not in self.counters.refusals:
            self.counters.refusals[kind] = self.last_refusal = f"{self.topic}: {words}"


def _held_bytes(parcel_bytes: int) -> int:
    return max(parcel_bytes, _LEAST_HELD_BYTES)
