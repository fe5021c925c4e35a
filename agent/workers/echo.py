"""Whether an inbox is open: a parcel of our own goes to the broker and must come back.

A subscription that was sent is not yet in force, and other connections may be faster: a stage that called itself ready
when it had subscribed lost the first prompt, since the word 'ready' overtook the subscription on a jittery link.
"""

from __future__ import annotations

import contextlib

from wire.channel import Backlogged, Outbox
from wire.frames import Kind, Parcel
from wire.ids import new_request_id
from wire.transport import NotConnected, Transport


class Echo:
    """One question; `send` may be repeated until `is_answer` says yes."""

    def __init__(self, transport: Transport, topic: str) -> None:
        self._outbox = Outbox(transport, topic)
        self._token = new_request_id()

    def send(self) -> None:
        with contextlib.suppress(NotConnected, Backlogged):
            self._outbox.send(Parcel(Kind.PROBE, request=self._token))

    def is_answer(self, parcel: Parcel) -> bool:
        return parcel.kind is Kind.PROBE and parcel.request == self._token

    def close(self) -> None:
        self._outbox.close()
