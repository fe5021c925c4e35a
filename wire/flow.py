"""Flow control of one stream of frames: how far a sender may go, and what a receiver has seen. No I/O, no clock.

MQTT has no back-pressure: a broker drops silently for a receiver that doesn't keep up. So every stream has a credit,
cumulative as in QUIC (RFC 9000, section 4): the receiver grants a *limit*, the number of the byte up to which the
sender may send, counted from the start of the stream; a frame carries its offset. A lost grant is mended by the next
one, and bytes that were lost on the way are counted as consumed when a gap shows them, so losses never leak credit.

Frames of one stream arrive in order (one connection, one topic) or not at all; one that comes late is treated as a
duplicate, so nothing is applied twice. When all that was outstanding is lost no gap will ever show: the blocked
sender then asks, naming the offset it has sent up to, and the receiver settles what is missing.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple
from zlib import crc32

from wire.errors import MalformedFrame
from wire.limits import CREDIT_WINDOW_BYTES, MAX_WINDOW_BYTES
from wire.version import PROTOCOL

_CREDIT: Final = struct.Struct("<3sBIQQ")
_CREDIT_MAGIC: Final = b"elc"
_CREDIT_CRC_END: Final = 8

GRANT_FRACTION: Final = 4
"""A new limit is told when a quarter of the window was consumed: no credit message per token, and never a full stop."""


class SendWindow:
    """The sender's end: bytes below `limit` may be sent."""

    def __init__(self, limit: int = CREDIT_WINDOW_BYTES) -> None:
        self.limit = limit
        self.offset = 0
        """Bytes sent so far, those that were skipped included: the offset of the next frame."""

    def may_send(self, frame_bytes: int) -> bool:
        return self.offset + frame_bytes <= self.limit

    def sent(self, frame_bytes: int) -> int:
        """Count a frame and give the offset it carries. The caller asked `may_send` before."""
        offset = self.offset
        self.offset += frame_bytes
        return offset

    def granted(self, limit: int) -> bool:
        """Take a limit; give whether it raised ours. Old ones and such as no receiver can mean change nothing."""
        if limit <= self.limit or limit > self.offset + MAX_WINDOW_BYTES:
            return False
        self.limit = limit
        return True


class Verdict(Enum):
    FRESH = "fresh"
    DUPLICATE = "duplicate"
    BEYOND = "beyond the credit"


class Arrival(NamedTuple):
    """`lost_bytes` were sent before this frame and never came."""

    verdict: Verdict
    lost_bytes: int


class ReceiveWindow:
    """The receiver's end, from the first frame that it sees: a receiver that starts again starts at that offset."""

    def __init__(self, window_bytes: int, first_offset: int = 0) -> None:
        self._window_bytes = window_bytes
        self._expected = first_offset
        self._consumed = first_offset
        self._granted = first_offset + window_bytes

    @property
    def held_bytes(self) -> int:
        """Bytes that arrived and were not yet consumed; never more than the window."""
        return self._expected - self._consumed

    @property
    def expected(self) -> int:
        """Offset of the next frame if nothing is lost."""
        return self._expected

    def takes(self, frame_bytes: int) -> bool:
        """Whether the next frame would be within the credit."""
        return self._expected + frame_bytes <= self._granted

    def arrived(self, offset: int, frame_bytes: int) -> Arrival:
        """Judge a frame. FRESH ones are held until `consumed`; the others change nothing and must be dropped."""
        if offset < self._expected:
            return Arrival(Verdict.DUPLICATE, 0)
        if offset + frame_bytes > self._granted:
            return Arrival(Verdict.BEYOND, 0)
        lost = self._settle(offset)
        self._expected += frame_bytes
        return Arrival(Verdict.FRESH, lost)

    def asked(self, offset: int) -> int:
        """A blocked sender has sent up to `offset`: what has not come by now is lost. Gives the lost bytes."""
        return self._settle(offset)

    def consumed(self, frame_bytes: int) -> None:
        """Return the credit of bytes that are no longer held."""
        if frame_bytes > self.held_bytes:
            raise ValueError(f"{frame_bytes} bytes consumed, {self.held_bytes} are held")
        self._consumed += frame_bytes

    def grant_due(self) -> int | None:
        """Give the new limit if it is worth a message, else None. Whoever asks sends it."""
        limit = self._consumed + self._window_bytes
        if limit - self._granted < self._window_bytes // GRANT_FRACTION:
            return None
        return self.grant_now()

    def grant_now(self) -> int:
        """Give the limit as it stands, to be sent in any case."""
        self._granted = max(self._granted, self._consumed + self._window_bytes)
        return self._granted

    def _settle(self, offset: int) -> int:
        lost = max(0, offset - self._expected)
        self._expected += lost
        self._consumed += lost
        return lost


class Credit(NamedTuple):
    """One grant: the stream may go up to byte `limit`."""

    stream: int
    limit: int


def encode_credit(credit: Credit) -> bytes:
    """24 bytes: magic "elc", version u8, crc32 u32 of the rest, stream u64, limit u64; little-endian."""
    data = _CREDIT.pack(_CREDIT_MAGIC, PROTOCOL, 0, credit.stream, credit.limit)
    return data[:4] + crc32(data[_CREDIT_CRC_END:]).to_bytes(4, "little") + data[_CREDIT_CRC_END:]


def parse_credit(data: bytes) -> Credit:
    """Inverse of `encode_credit`; raise MalformedFrame."""
    if len(data) != _CREDIT.size:
        raise MalformedFrame(f"credit of {len(data)} bytes, it has {_CREDIT.size}")
    magic, version, checksum, stream, limit = _CREDIT.unpack(data)
    if magic != _CREDIT_MAGIC or version != PROTOCOL:
        raise MalformedFrame(
            f"credit starts with {magic!r} version {version}, not {_CREDIT_MAGIC!r} version {PROTOCOL}"
        )
    if crc32(data[_CREDIT_CRC_END:]) != checksum:
        raise MalformedFrame("checksum does not fit the credit")
    return Credit(stream, limit)


@dataclass(frozen=True, slots=True)
class Deadline:
    """A moment on the caller's monotonic clock."""

    at_s: float

    @staticmethod
    def after(now_s: float, seconds: float) -> Deadline:
        return Deadline(now_s + seconds)

    def remaining_s(self, now_s: float) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at_s - now_s)

    def passed(self, now_s: float) -> bool:
        return now_s >= self.at_s
