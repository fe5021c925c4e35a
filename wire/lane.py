"""A socket with a short way for messages at QoS 0: they pass by paho, which sees all other packets.

A frame between two stages finds cold caches: the compute before it ran through more memory than they hold. Then code
costs by its length, and paho's way of a message is long: 0.2 ms at either end, a third of a hop. So the connection is
paho's, with all that makes it one (CONNECT, SUBSCRIBE, PINGREQ, QoS 1), but its socket is a `Lane`, which takes PUBLISH
packets of QoS 0 out of the stream, and puts ours in, whole packets always (MQTT 3.1.1 and 5, section 3.3).

Not thread-safe, never blocks. What comes is bounded: a packet over `most_bytes` is skipped as it comes, never held.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Final

from wire.transport import Buffer, Expected, Inbound

READ_BYTES: Final = 65_536
"""What one read takes at most; the buffer grows beyond it for a larger packet only, and shrinks after it."""

_PUBLISH_QOS_0: Final = 0x30
_TYPE_AND_QOS: Final = 0xF6
"""Without the bits DUP, which QoS 0 does not have, and RETAIN."""

_RETAIN: Final = 0x01
_MOST_LENGTH_BYTES: Final = 4


class Nonsense(Exception):
    """What came is no MQTT; the connection can't be read any further."""


class Lane:
    """Stands for a connected socket in paho's hands: `recv` gives what is not for us, `send` never takes a part."""

    def __init__(self, connection: socket.socket, *, five: bool, most_bytes: int) -> None:
        self.connection = connection
        self.refused = 0
        """Packets over `most_bytes`, which were skipped, and messages whose topic is no UTF-8."""
        self._five = five
        self._most_bytes = most_bytes
        self._buffer = bytearray(READ_BYTES)
        self._filled = 0
        self._skip_bytes = 0
        self._unread = False
        """What lies in the buffer was peeked at, and is still to be read."""
        self._others = bytearray()
        """Whole packets for paho."""
        self._over: OSError | None = None
        self._ended = False
        self.unsent = bytearray()
        """What the socket did not take."""
        self._heads: dict[str, bytes] = {}

    # --- for the transport ---

    @property
    def others(self) -> bool:
        """Something waits for paho to read it: a packet, or the end of the connection."""
        return bool(self._others) or self._ended

    def publish(self, topic: str, parts: Sequence[Buffer], payload_bytes: int, retain: bool = False) -> None:
        """Send a message at QoS 0; what the socket does not take now is kept for `flush`. Raises OSError.

        `parts` are `payload_bytes` together; that and the topic are the caller's to check.
        """
        head = self._head(topic)
        size = len(head) + payload_bytes
        first = _fixed_header(_PUBLISH_QOS_0 | retain, size)
        self.put((first, head, *parts), len(first) + size)

    def packet_head(self, topic: str, payload_bytes: int) -> bytes:
        """What stands before the payload of a message at QoS 0 that is not retained."""
        head = self._head(topic)
        return _fixed_header(_PUBLISH_QOS_0, len(head) + payload_bytes) + head

    def put(self, pieces: Sequence[Buffer], packet_bytes: int) -> None:
        """Send whole packets, `packet_bytes` in all; what the socket does not take is kept. Raises OSError."""
        taken = 0
        if not self.unsent:
            try:
                taken = self.connection.sendmsg(pieces)
            except BlockingIOError:
                taken = 0
            if taken == packet_bytes:
                return
        for piece in pieces:
            if taken < len(piece):
                self.unsent += memoryview(piece)[taken:]
            taken = max(0, taken - len(piece))

    def flush(self) -> None:
        """Send of what is kept as much as the socket takes. Raises OSError."""
        while self.unsent:
            try:
                del self.unsent[: self.connection.send(self.unsent)]
            except BlockingIOError:
                return

    def read(self) -> tuple[list[Inbound], bool]:
        """Take what has come, once: the messages in it, and whether there may be more. Raises Nonsense.

        The end of the connection and its errors are left for paho to find with `recv`.
        """
        if self._unread:
            self._unread = False
            full = self._filled == len(self._buffer)
            return self._take(), full
        room = len(self._buffer) - self._filled
        try:
            count = self.connection.recv_into(memoryview(self._buffer)[self._filled :])
        except BlockingIOError:
            return [], False
        except OSError as error:
            self._over, self._ended = error, True
            return [], False
        if count == 0:
            self._ended = True
            return [], False
        self._filled += count
        return self._take(), count == room

    def peek(self, expected: Expected) -> memoryview | None:
        """Take what has come, once, and give a view of it from `gap` on if it is this packet and nothing else. Whatever
        it is, it is still to be read; the view holds until then."""
        if self._filled or self._skip_bytes or self._ended:
            return None
        buffer = self._buffer
        try:
            count = self.connection.recv_into(buffer)
        except BlockingIOError:
            return None
        except OSError as error:
            self._over, self._ended = error, True
            return None
        if count == 0:
            self._ended = True
            return None
        self._filled, self._unread = count, True
        start = len(expected.head)
        if (
            count == expected.packet_bytes
            and buffer.startswith(expected.head)
            and buffer.startswith(expected.rest, start + expected.gap)
        ):
            return memoryview(buffer)[start:count]
        return None

    # --- for paho, in place of the socket ---

    def recv(self, count: int) -> bytes:
        if self._others:
            data = bytes(self._others[:count])
            del self._others[:count]
            return data
        if self._over is not None:
            raise self._over
        if self._ended:
            return b""
        raise BlockingIOError

    def send(self, data: Buffer) -> int:
        if not self.unsent:
            try:
                taken = self.connection.send(data)
            except BlockingIOError:
                taken = 0
        else:
            taken = 0
        self.unsent += memoryview(data)[taken:]
        return len(data)

    def fileno(self) -> int:
        return self.connection.fileno()

    def setblocking(self, blocking: bool) -> None:
        self.connection.setblocking(blocking)

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.connection.setsockopt(level, option, value)

    def close(self) -> None:
        self.connection.close()

    # --- packets ---

    def _take(self) -> list[Inbound]:
        """Take all whole packets out of the buffer."""
        buffer, start, end = self._buffer, 0, self._filled
        found: list[Inbound] = []
        while True:
            if self._skip_bytes:
                skipped = min(self._skip_bytes, end - start)
                self._skip_bytes -= skipped
                start += skipped
            body, length = _variable_length(buffer, start + 1, end)
            if body < 0:
                break
            after = body + length
            if after - start > self._most_bytes:
                self.refused += 1
                self._skip_bytes = after - start
                continue
            if after > end:
                self._make_room(start, after - start)
                return found
            if buffer[start] & _TYPE_AND_QOS == _PUBLISH_QOS_0:
                self._message(buffer, start, body, after, found)
            else:
                self._others += memoryview(buffer)[start:after]
            start = after
        self._make_room(start, 0)
        return found

    def _message(self, buffer: bytearray, start: int, body: int, after: int, found: list[Inbound]) -> None:
        if after - body < 2:
            raise Nonsense("a message without a topic")
        payload = body + 2 + (buffer[body] << 8 | buffer[body + 1])
        topic = buffer[body + 2 : payload]
        if self._five:
            properties, length = _variable_length(buffer, payload, after)
            payload = properties + length if properties > 0 else after + 1
        if payload > after:
            raise Nonsense("a message that is shorter than its topic and properties")
        try:
            found.append(Inbound(topic.decode(), bytes(memoryview(buffer)[payload:after]), buffer[start] & _RETAIN > 0))
        except UnicodeDecodeError:
            self.refused += 1

    def _make_room(self, start: int, wanted: int) -> None:
        """Put what is left at the beginning of a buffer that holds at least `wanted` bytes."""
        left = self._filled - start
        size = max(READ_BYTES, wanted)
        if size != len(self._buffer):
            other = bytearray(size)
            other[:left] = memoryview(self._buffer)[start : self._filled]
            self._buffer = other
        elif left and start:
            self._buffer[:left] = self._buffer[start : self._filled]
        self._filled = left

    def _head(self, topic: str) -> bytes:
        """What stands between the fixed header and the payload, kept for next time."""
        known = self._heads.get(topic)
        if known is not None:
            return known
        name = topic.encode()
        head = len(name).to_bytes(2, "big") + name + (b"\0" if self._five else b"")
        if len(self._heads) >= _MOST_HEADS:
            self._heads.clear()
        self._heads[topic] = head
        return head


_MOST_HEADS: Final = 256


def _fixed_header(first: int, length: int) -> bytes:
    if length < 128:
        return bytes((first, length))
    if length < 128 * 128:
        return bytes((first, length & 127 | 128, length >> 7))
    header = bytearray((first,))
    while length >= 128:
        header.append(length & 127 | 128)
        length >>= 7
    header.append(length)
    return bytes(header)


def _variable_length(buffer: bytearray, start: int, end: int) -> tuple[int, int]:
    """Read a variable byte integer (MQTT 5, 1.5.5) in [start, end): where it ends, its value; -1 if it is cut off."""
    value = shift = 0
    for at in range(start, end):
        byte = buffer[at]
        value |= (byte & 127) << shift
        if byte < 128:
            return at + 1, value
        shift += 7
        if shift == 7 * _MOST_LENGTH_BYTES:
            raise Nonsense("a length of more than 4 bytes")
    return -1, 0
