"""Chunks become parcels again, within bounds that no sender can move.

One parcel per stream is in assembly at a time: a stream is in order, so when a later parcel begins, an unfinished one
can never be finished and is dropped. Within a parcel chunks may come in any order and more than once. The buffer of
the whole tensor is allocated at its first chunk, after all checks; a parcel of one chunk is used where it lies.
"""

from __future__ import annotations

from typing import Final

from wire.errors import MalformedFrame, PeerError
from wire.frames import Frame, Parcel
from wire.limits import MAX_PARTIAL_BYTES, MAX_PARTIAL_TENSORS, PARTIAL_TIMEOUT_S

_HALF_RANGE: Final = 1 << 31


class _Partial:
    """A parcel in assembly."""

    def __init__(self, first: Frame, now_s: float) -> None:
        self.first = first
        self.chunk_bytes = _chunk_bytes(first)
        self.buffer = memoryview(bytearray(first.tensor_bytes))
        self.missing = set(range(first.chunks))
        self.meta = b""
        self.touched_s = now_s

    def add(self, frame: Frame, now_s: float) -> bool:
        """Put a chunk in its place; give whether the parcel is whole. Raises MalformedFrame on a contradiction."""
        if _address(frame) != _address(self.first) or _chunk_bytes(frame) != self.chunk_bytes:
            raise MalformedFrame(f"chunk {frame.chunk} of {frame.chunks} contradicts an earlier chunk of its parcel")
        self.touched_s = now_s
        if frame.chunk not in self.missing:
            return False
        start = frame.chunk * self.chunk_bytes
        self.buffer[start : start + len(frame.payload)] = frame.payload
        self.missing.remove(frame.chunk)
        if frame.chunk == 0:
            self.meta = frame.meta
        return not self.missing


def _address(frame: Frame) -> tuple[object, ...]:
    """What all chunks of a parcel have in common."""
    return (
        frame.kind, frame.flags, frame.dtype, frame.shape, frame.group, frame.epoch, frame.parcel, frame.request,
        frame.position, frame.chunks,
    )  # fmt: skip


def _chunk_bytes(frame: Frame) -> int:
    """Length of all chunks but the last."""
    if frame.chunk < frame.chunks - 1:
        return len(frame.payload)
    return (frame.tensor_bytes - len(frame.payload)) // (frame.chunks - 1)


class Assembler:
    """Assembles the parcels of many streams; bounded by MAX_PARTIAL_TENSORS, MAX_PARTIAL_BYTES, PARTIAL_TIMEOUT_S."""

    def __init__(self) -> None:
        self._partials: dict[int, _Partial] = {}
        self._bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers of unfinished parcels."""
        return self._bytes

    @property
    def partials(self) -> int:
        return len(self._partials)

    def supersedes(self, frame: Frame) -> bool:
        """Does this frame begin a later parcel than the unfinished one of its stream, which must be dropped first?"""
        partial = self._partials.get(frame.stream)
        return partial is not None and 0 < (frame.parcel - partial.first.parcel) % (2 * _HALF_RANGE) < _HALF_RANGE

    def add(self, frame: Frame, now_s: float) -> Parcel | None:
        """Take a frame; give the parcel it completes, or None.

        An unfinished parcel that this one supersedes is dropped. Raises MalformedFrame if the frame contradicts its
        parcel or belongs to one that was superseded, and PeerError if there is no room for its parcel.
        """
        if self.supersedes(frame):
            self.drop(frame.stream)
        if frame.chunks == 1:
            return frame.parcel_with(frame.payload, frame.meta)
        partial = self._partials.get(frame.stream)
        if partial is None:
            partial = self._begin(frame, now_s)
        if not partial.add(frame, now_s):
            return None
        self.drop(frame.stream)
        return frame.parcel_with(partial.buffer, partial.meta)

    def drop(self, stream: int) -> bool:
        """Forget the unfinished parcel of a stream; give whether there was one."""
        partial = self._partials.pop(stream, None)
        if partial is None:
            return False
        self._bytes -= partial.first.tensor_bytes
        return True

    def stale(self, now_s: float) -> list[int]:
        """Streams whose unfinished parcel got no chunk for PARTIAL_TIMEOUT_S."""
        return [key for key, partial in self._partials.items() if now_s - partial.touched_s > PARTIAL_TIMEOUT_S]

    def _begin(self, frame: Frame, now_s: float) -> _Partial:
        if len(self._partials) >= MAX_PARTIAL_TENSORS:
            raise PeerError(f"{MAX_PARTIAL_TENSORS} tensors are in assembly already")
        if self._bytes + frame.tensor_bytes > MAX_PARTIAL_BYTES:
            raise PeerError(f"tensors in assembly would hold more than {MAX_PARTIAL_BYTES} bytes")
        partial = _Partial(frame, now_s)
        self._partials[frame.stream] = partial
        self._bytes += frame.tensor_bytes
        return partial
