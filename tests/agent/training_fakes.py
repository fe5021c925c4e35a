"""What workers that train send by, and what comes to them, without a broker."""

from __future__ import annotations

from collections.abc import MutableSequence

from wire.frames import Parcel
from wire.transport import NotConnected


class Delivery:
    def __init__(self, parcel: Parcel) -> None:
        self.parcel = parcel


class Sender:
    """Keeps what it is given; may be `down`, or have each topic `waiting`."""

    next_backlog_bytes = 0
    next_bytes = 0

    def __init__(self, sent: MutableSequence[tuple[str, Parcel]]) -> None:
        self.sent = sent
        self.paces: list[float | None] = []
        self.waiting = False
        self.dropped: list[str] = []
        self.down = False

    def pace(self, _topic: str, bytes_per_s: float | None) -> None:
        self.paces.append(bytes_per_s)

    def waits(self, _topic: str) -> bool:
        return self.waiting

    def drop(self, topic: str) -> None:
        self.dropped.append(topic)

    def to_next(self, parcel: Parcel) -> None:
        raise AssertionError("there is no next stage")

    def to_requester(self, topic: str, parcel: Parcel) -> None:
        if self.down:
            raise NotConnected("down")
        self.sent.append((topic, parcel))
