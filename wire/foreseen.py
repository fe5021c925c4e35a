"""One frame that is foreseen, and one that was laid out, on the short way of a connection (wire.transport.ShortWay).

All that is known beforehand is put together beforehand: what is left when the message comes, or when its payload is
there, is a comparison, a checksum and a write.
"""

from __future__ import annotations

from zlib import crc32

from wire.frames import CHECKSUM_BYTES, LEAD, Laid
from wire.transport import Buffer, Expected, ShortWay


def frame_head(way: ShortWay, topic: str, frame_bytes: int) -> bytes:
    """What stands before the checksum of a frame of this length to this topic. Raises NotConnected."""
    return way.packet_head(topic, frame_bytes) + LEAD


class Coming:
    """A frame that should come: `head` is its `frame_head`."""

    def __init__(self, head: bytes, laid: Laid) -> None:
        self._expected = Expected(head, CHECKSUM_BYTES, laid.rest, len(head) - len(LEAD) + laid.frame_bytes)
        self._payload_at = CHECKSUM_BYTES + len(laid.rest)

    def look(self, way: ShortWay) -> memoryview | None:
        """The payload, if what has come is this frame and whole; to be called within `way.ahead`."""
        view = way.peek(self._expected)
        if view is None or crc32(view[CHECKSUM_BYTES:]) != int.from_bytes(view[:CHECKSUM_BYTES], "little"):
            return None
        return view[self._payload_at :]


class Going:
    """A frame that will go: `head` is its `frame_head`."""

    def __init__(self, head: bytes, laid: Laid) -> None:
        self.laid = laid
        self._head = head
        self._rest_crc = crc32(laid.rest)
        self._packet_bytes = len(head) - len(LEAD) + laid.frame_bytes

    def send(self, way: ShortWay, payload: Buffer) -> None:
        """Send it with its payload, whose length was laid out. Raises NotConnected."""
        laid = self.laid
        checksum = crc32(payload, self._rest_crc).to_bytes(CHECKSUM_BYTES, "little")
        way.put((self._head, checksum, laid.rest, payload), self._packet_bytes, laid.frame_bytes)
