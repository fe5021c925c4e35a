"""Frames: how a parcel (one tensor with its address) crosses MQTT. The same bytes on every broker and MQTT version.

A frame is a header, padding included, of `header_bytes(rank)` bytes; then meta, padded to a multiple of 8; then the
payload, which so stands aligned in memory and is used where it lies. Little-endian throughout:

    0   magic "elm"        3 bytes      24  stream   u64   sender's byte stream to this inbox
    3   protocol version   u8           32  offset   u64   bytes of whole frames this stream sent before this one
    4   crc32 of all that follows       40  request  u64
    8   kind               u8           48  position u32   row of the request that the tensor starts at
    9   flags              u8           52  chunk    u16   number of this chunk
    10  dtype              u8           54  chunks   u16   how many chunks the parcel has
    11  rank               u8           56  dims     u32 x rank, zeros up to a multiple of 8
    12  int8 group         u16
    14  meta length        u16
    16  epoch              u32
    20  parcel             u32   sequence number in the stream, wraps

The payload bytes of the whole tensor follow from dtype, dims and group, so no header can announce another number.
All chunks but the last have the same length, so a chunk's place follows from its number. Meta rides on chunk 0 only.
Every check is made before memory is allocated; what fails is a MalformedFrame that names the field.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Final, NamedTuple
from zlib import crc32

from msgspec import Struct

from wire.errors import MalformedFrame
from wire.limits import CHUNK_BYTES_DEFAULT, MAX_CHUNKS, MAX_META_BYTES, MAX_PUBLISH_BYTES, MAX_RANK
from wire.tensors import Dtype, Tensor, bf16_bits, bf16_to_f32, tensor_bytes
from wire.transport import Buffer
from wire.version import PROTOCOL

__all__ = [
    "FLAG_DRAFTS",
    "FLAG_FINAL",
    "LARGEST_CHUNK_BYTES",
    "Dtype",
    "Frame",
    "Kind",
    "Parcel",
    "Tensor",
    "bf16_bits",
    "bf16_to_f32",
    "encode",
    "header_bytes",
    "parse",
]

MAGIC: Final = b"elm"
FLAG_FINAL: Final = 1
"""Last parcel of a request in this direction."""

FLAG_DRAFTS: Final = 2
"""On HIDDEN: all rows but the first are of tokens that were guessed, which meta names (wire.drafts)."""

_FIXED: Final = struct.Struct("<3sBIBBBBHHIIQQQIHH")
_LEAD: Final = struct.Struct("<3sBI")
_CRC_END: Final = _LEAD.size
LEAD: Final = MAGIC + bytes([PROTOCOL])
"""What every frame begins with; its checksum, 4 bytes little-endian, comes next."""

CHECKSUM_BYTES: Final = 4
_DIMS: Final = tuple(struct.Struct(f"<{rank}I") for rank in range(MAX_RANK + 1))
_REST: Final = tuple(struct.Struct(f"<BBBBHHIIQQQIHH{rank}I{rank % 2 * 4}x") for rank in range(MAX_RANK + 1))
"""By rank: all after the checksum, padded."""

MAX_OFFSET: Final = 1 << 62
"""A stream is fenced far below u64, so that a credit limit (offset + window) always fits."""


class Kind(IntEnum):
    """What a parcel is for."""

    HIDDEN = 1
    """Hidden states [n, hidden] in wire dtype."""
    TOKENS = 2
    """Token ids, int32 [n]."""
    CLOSE = 3
    """Free the request's slot."""
    ERROR = 4
    """Meta is a StageError."""
    PROBE = 5
    """Bytes to measure a link with."""
    ASK = 6
    """A blocked sender says how far it has sent (`offset`) and asks for its credit again; channel.py only."""
    INQUIRY = 7
    """A requester asks a stage whether it works and knows the request; meta is an Inquiry."""
    STANDING = 8
    """The stage's answer to the requester; meta is a Standing."""
    ROWS = 9
    """One row of each of several requests: hidden states [b, hidden] or token ids [b]; meta says whose (wire.rows)."""
    ITEM = 10
    """All tensors of an item that cross a cut, or come out behind the last, as bytes [n]; meta is an ItemMeta."""
    ROUND = 11
    """The factors that a round begins with, float32 [n]; meta is a RoundMeta."""
    UPDATE = 12
    """What a device made of them, float32 [m], or none; meta is an UpdateMeta."""
    STATES = 13
    """Of a batch, float32 [n, T, hidden], from a device with the ends of a model to its trunk, and there from segment
    to segment; meta is a SplitMeta."""
    FEATURES = 14
    """What the trunk makes of them, the task module behind it, float32 [m]; meta is a SplitMeta."""
    GRADIENT = 15
    """Of the loss by these, float32 [m], or by the states that a segment was sent; meta is a SplitMeta."""
    STEP = 16
    """The trunk's first segment tells the others how long the gradient is as a whole; meta is a SplitMeta."""
    SECURE = 17
    """A step of a sum of which nobody learns a part: asked for, and answered; meta is a SecureMeta, which says what the
    tensor is."""
    SHARE = 18
    """What a hub asks each of its shards to multiply, float32 [n, T, hidden] or [2, n, T, hidden]; meta is a SplitMeta,
    which says the turn."""
    PARTIAL = 19
    """What a shard makes of it, float32 [n, T, hidden]; meta is a SplitMeta."""


_KINDS: Final = {int(kind): kind for kind in Kind}
_DTYPES: Final = {int(dtype): dtype for dtype in Dtype}


class Parcel(Struct, frozen=True, eq=False, gc=False):
    """One thing said by one stage to another: a tensor, or none, with whom it is for."""

    kind: Kind
    epoch: int = 0
    request: int = 0
    position: int = 0
    flags: int = 0
    tensor: Tensor | None = None
    meta: bytes = b""

    @property
    def final(self) -> bool:
        return bool(self.flags & FLAG_FINAL)


class Frame(NamedTuple):
    """A frame as it came, checked in itself. `payload` is a view of the received bytes; `whole_bytes` is the length of
    the whole frame, which is what flow control counts."""

    kind: Kind
    flags: int
    dtype: Dtype
    shape: tuple[int, ...]
    group: int
    epoch: int
    parcel: int
    stream: int
    offset: int
    request: int
    position: int
    chunk: int
    chunks: int
    meta: bytes
    payload: memoryview
    tensor_bytes: int
    whole_bytes: int

    def parcel_with(self, payload: memoryview, meta: bytes) -> Parcel:
        """Make the parcel whose whole payload, `tensor_bytes` long, is given."""
        tensor = None
        if self.dtype is not Dtype.NONE:
            tensor = Tensor.over(self.dtype, self.shape, self.group, payload)
        return Parcel(self.kind, self.epoch, self.request, self.position, self.flags, tensor, meta)


def _padded(count: int) -> int:
    return (count + 7) & ~7


def header_bytes(rank: int) -> int:
    """Bytes in front of meta and payload: 64 for rank 1 and 2. One chunk without meta costs exactly this."""
    return _padded(_FIXED.size + 4 * rank)


LARGEST_CHUNK_BYTES: Final = MAX_PUBLISH_BYTES - header_bytes(MAX_RANK) - _padded(MAX_META_BYTES)


def encode(
    parcel: Parcel, stream: int, offset: int, parcel_number: int, chunk_bytes: int = CHUNK_BYTES_DEFAULT
) -> list[list[Buffer]]:
    """Cut a parcel into frames, each a list of buffers to be sent one after the other; the tensor is not copied.

    Raises ValueError for numbers or meta out of range (our own fault, not a peer's).
    """
    if len(parcel.meta) > MAX_META_BYTES:
        raise ValueError(f"meta of {len(parcel.meta)} bytes, at most {MAX_META_BYTES} may ride on a parcel")
    if not 1 <= chunk_bytes <= LARGEST_CHUNK_BYTES:
        raise ValueError(f"chunks of {chunk_bytes} bytes, 1 to {LARGEST_CHUNK_BYTES} are possible")
    tensor = parcel.tensor
    buffers = () if tensor is None else tensor.buffers
    total = sum(map(len, buffers))
    if total <= chunk_bytes:
        return [_frame(parcel, stream, offset, parcel_number, 0, 1, buffers)]
    chunks = -(-total // chunk_bytes)
    if chunks > MAX_CHUNKS:
        raise ValueError(f"{total} bytes in chunks of {chunk_bytes} are {chunks} chunks, at most {MAX_CHUNKS}")
    frames: list[list[Buffer]] = []
    for chunk in range(chunks):
        payload = _slice(buffers, chunk * chunk_bytes, (chunk + 1) * chunk_bytes)
        frame = _frame(parcel, stream, offset, parcel_number, chunk, chunks, payload)
        frames.append(frame)
        offset += sum(map(len, frame))
    return frames


def _frame(
    parcel: Parcel,
    stream: int,
    offset: int,
    parcel_number: int,
    chunk: int,
    chunks: int,
    payload: Sequence[memoryview],
) -> list[Buffer]:
    """One frame: its header, with meta on chunk 0, and the buffers behind it."""
    tensor, meta = parcel.tensor, b"" if chunk else parcel.meta
    after_crc = _after_checksum(
        parcel, len(meta), () if tensor is None else tensor.shape, stream, offset, parcel_number, chunk, chunks
    )
    if meta:
        after_crc += meta + bytes(-len(meta) % 8)
    checksum = crc32(after_crc)
    for piece in payload:
        checksum = crc32(piece, checksum)
    return [_LEAD.pack(MAGIC, PROTOCOL, checksum) + after_crc, *payload]


def _after_checksum(
    parcel: Parcel,
    meta_bytes: int,
    shape: tuple[int, ...],
    stream: int,
    offset: int,
    parcel_number: int,
    chunk: int,
    chunks: int,
) -> bytes:
    """The header after the checksum, padded."""
    tensor = parcel.tensor
    dtype, group = (Dtype.NONE, 0) if tensor is None else (tensor.dtype, tensor.group)
    rank = len(shape)
    return _REST[rank].pack(
        parcel.kind, parcel.flags, dtype, rank, group, meta_bytes, parcel.epoch & 0xFFFFFFFF,
        parcel_number & 0xFFFFFFFF, stream, offset, parcel.request, parcel.position, chunk, chunks, *shape,
    )  # fmt: skip


class Laid(NamedTuple):
    """A frame that was laid out before its payload is there: one chunk, no meta."""

    rest: bytes
    """The header after the checksum."""
    frame_bytes: int


def lay_out(parcel: Parcel, stream: int, offset: int, parcel_number: int) -> Laid:
    """Lay out the frame of a parcel whose tensor has dtype and shape, but not yet the bytes."""
    tensor = parcel.tensor
    if tensor is None or parcel.meta:
        raise ValueError("only a tensor without meta can be laid out")
    rest = _after_checksum(parcel, 0, tensor.shape, stream, offset, parcel_number, 0, 1)
    return Laid(rest, _CRC_END + len(rest) + tensor.nbytes)


def _slice(buffers: tuple[memoryview, ...], start: int, end: int) -> list[memoryview]:
    """Views of bytes [start, end) of the concatenation of `buffers`."""
    pieces = []
    for buffer in buffers:
        piece = buffer[max(0, start) : max(0, end)]
        if len(piece):
            pieces.append(piece)
        start -= len(buffer)
        end -= len(buffer)
    return pieces


def parse(data: bytes) -> Frame:
    """Read a frame where it lies; raise MalformedFrame saying what is wrong with it."""
    if len(data) < _FIXED.size:
        raise MalformedFrame(f"{len(data)} bytes are no frame, the header alone has {_FIXED.size}")
    if len(data) > MAX_PUBLISH_BYTES:
        raise MalformedFrame(f"frame of {len(data)} bytes, at most {MAX_PUBLISH_BYTES} are taken")
    (magic, version, checksum, kind, flags, dtype, rank, group, meta_bytes, epoch, parcel, stream, offset, request,
     position, chunk, chunks) = _FIXED.unpack_from(data)  # fmt: skip
    if magic != MAGIC:
        raise MalformedFrame(f"starts with {magic!r}, a frame starts with {MAGIC!r}")
    if version != PROTOCOL:
        raise MalformedFrame(f"frame of protocol {version}, this is {PROTOCOL}", try_="install one version everywhere")
    view = memoryview(data)
    if crc32(view[_CRC_END:]) != checksum:
        raise MalformedFrame("checksum does not fit the frame")
    if rank > MAX_RANK or meta_bytes > MAX_META_BYTES:
        raise MalformedFrame(f"rank {rank}, meta of {meta_bytes} bytes: at most {MAX_RANK} and {MAX_META_BYTES}")
    meta_start = header_bytes(rank)
    payload_start = meta_start + _padded(meta_bytes)
    if payload_start > len(data):
        raise MalformedFrame(f"frame of {len(data)} bytes ends inside its header")
    if kind not in _KINDS or dtype not in _DTYPES:
        raise MalformedFrame(f"frame of kind {kind} and dtype {dtype}, one of which is not known")
    kind, dtype = _KINDS[kind], _DTYPES[dtype]
    shape = _DIMS[rank].unpack_from(data, _FIXED.size)
    if flags & ~(FLAG_FINAL | FLAG_DRAFTS) or (flags & FLAG_DRAFTS and kind is not Kind.HIDDEN):
        raise MalformedFrame(f"flags {flags:#x} are not known of {kind.name}")
    if offset > MAX_OFFSET:
        raise MalformedFrame(f"offset {offset} is beyond {MAX_OFFSET}")
    total = tensor_bytes(dtype, shape, group)
    payload = view[payload_start:]
    _check_chunk(chunk, chunks, len(payload), total, meta_bytes)
    return Frame(
        kind, flags, dtype, shape, group, epoch, parcel, stream, offset, request, position, chunk, chunks,
        data[meta_start : meta_start + meta_bytes], payload, total, len(data),
    )  # fmt: skip


def _check_chunk(chunk: int, chunks: int, payload_bytes: int, total: int, meta_bytes: int) -> None:
    """Does a chunk of this length fit into a tensor of `total` bytes at this number?"""
    if chunks == 1:
        if chunk or payload_bytes != total:
            raise MalformedFrame(f"chunk {chunk} of 1 has {payload_bytes} bytes, the tensor {total}")
        return
    if not 0 <= chunk < chunks <= MAX_CHUNKS:
        raise MalformedFrame(f"chunk {chunk} of {chunks}, at most {MAX_CHUNKS}")
    if chunk and meta_bytes:
        raise MalformedFrame(f"meta on chunk {chunk}, it belongs on chunk 0")
    if chunk < chunks - 1:
        fits = payload_bytes * (chunks - 1) < total <= payload_bytes * chunks
    else:
        before = total - payload_bytes
        fits = before % (chunks - 1) == 0 and 1 <= payload_bytes <= before // (chunks - 1)
    if not fits:
        raise MalformedFrame(f"chunk {chunk} of {chunks} with {payload_bytes} bytes does not fit a tensor of {total}")
