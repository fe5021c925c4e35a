"""Where a stage's parcels go: the next stage, and the requesters, each with a credit-controlled outbox. The next stage
may be reached through another connection than requesters are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from wire.channel import Outbox
from wire.frames import Laid, Parcel
from wire.limits import CHUNK_BYTES_DEFAULT
from wire.messages import InboxAddress
from wire.pace import Pace
from wire.transport import Transport

MAX_REQUESTERS: Final = 64
"""Requesters that are answered at one time; the longest silent one is forgotten, and may come again."""


class Outboxes:
    """The `Sender` of a stage: `site` leads to requesters, `outward` to the next stage."""

    def __init__(
        self,
        site: Transport,
        outward: Transport,
        next_inbox: InboxAddress,
        make: Callable[[Transport, str], Outbox] = Outbox,
    ) -> None:
        self._site = site
        self._outward = outward
        self._make = make
        self._next_topic = next_inbox.topic
        self._next = make(outward, next_inbox.topic)
        self._requesters: OrderedDict[str, Outbox] = OrderedDict()
        self._closed_frames = 0

    @property
    def next_backlog_bytes(self) -> int:
        return self._next.backlog_bytes

    @property
    def next_topic(self) -> str:
        return self._next_topic

    @property
    def next_bytes(self) -> int:
        return self._next.bytes

    @property
    def frames(self) -> int:
        """Frames sent since the start."""
        return self._closed_frames + self._next.frames + sum(box.frames for box in self._requesters.values())

    def to_next(self, parcel: Parcel) -> None:
        self._next.send(parcel)

    def lay_out_next(self, parcel: Parcel) -> Laid | None:
        """See wire.channel.Outbox.lay_out."""
        return self._next.lay_out(parcel)

    def next_went(self, laid: Laid) -> None:
        self._next.went(laid)

    @property
    def paced(self) -> bool:
        """Whether something waits for its pace: `tick` often."""
        return any(box.pace is not None and box.backlog_bytes for box in self._requesters.values())

    def pace(self, topic: str, bytes_per_s: float | None) -> None:
        """How fast what goes to a requester is sent from now on; None: as fast as goes."""
        box = self._requester(topic)
        if bytes_per_s is None:
            box.pace = None
        elif box.pace is None or box.pace.bytes_per_s != bytes_per_s:
            box.pace = Pace(bytes_per_s, CHUNK_BYTES_DEFAULT)

    def waits(self, topic: str) -> bool:
        return topic in self._requesters and self._requesters[topic].backlog_bytes > 0

    def drop(self, topic: str) -> None:
        if topic in self._requesters:
            self._requesters[topic].drop()

    def to_requester(self, topic: str, parcel: Parcel) -> None:
        self._requester(topic).send(parcel)

    def _requester(self, topic: str) -> Outbox:
        box = self._requesters.get(topic)
        if box is None:
            box = self._requesters[topic] = self._make(self._site, topic)
            if len(self._requesters) > MAX_REQUESTERS:
                self._retire(self._requesters.popitem(last=False)[1])
        else:
            self._requesters.move_to_end(topic)
        return box

    def redirect(self, outward: Transport, next_inbox: InboxAddress) -> None:
        """Send to another next stage from now on, or another way."""
        if next_inbox.topic != self._next_topic or outward is not self._outward:
            self._retire(self._next)
            self._next_topic = next_inbox.topic
            self._outward = outward
            self._next = self._make(outward, next_inbox.topic)

    def tick(self) -> None:
        """Ask again for credit where something waits for it."""
        self._next.tick()
        for box in self._requesters.values():
            box.tick()

    def _retire(self, box: Outbox) -> None:
        self._closed_frames += box.frames
        box.close()
