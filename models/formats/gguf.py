"""GGUF files: header, metadata, tensor table. One file, version 2 or 3, little-endian.

    "GGUF"  u32 version  u64 tensors  u64 keys
    keys    x (string key, u32 type, value)
    tensors x (string name, u32 rank, u64 dims[rank] fastest first, u32 ggml type, u64 offset from the data's start)
    padding to `general.alignment`, then the data

The file is mapped, not read. A count is believed only after the bytes it needs are known to be there, so a damaged or
hostile file costs an error that names file, thing and offset. What a model family makes of the keys is in
models.formats.gguf_checkpoint.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from models.formats.ggml import FORMATS, UNREAD, NumberFormat, supported_names
from wire.errors import CorruptData, Refused, UsageError
from wire.limits import MAX_GGUF_METADATA_BYTES

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
ALIGNMENT_DEFAULT: Final = 32
MAX_ALIGNMENT: Final = 1 << 16
MAX_KEYS: Final = 1 << 16
"""Real files have 20 to 60."""
MAX_TENSORS: Final = 1 << 16
"""Llama 3.1 405B has 1138."""
MAX_RANK: Final = 4
MAX_KEY_BYTES: Final = 65_535
"""Of the format's definition; tensor names there have 64, which we don't insist on."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_SCALARS: Final[Mapping[int, np.dtype[Any]]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING: Final = 8
_ARRAY: Final = 9

Scalar = int | float | bool | str
Numbers = npt.NDArray[Any]
Value = Scalar | list[str] | Numbers


class TensorInfo(Struct, frozen=True, kw_only=True):
    """Where a tensor lies. `shape` is [out, in] order: slowest first, the reverse of the file's."""

    name: str
    shape: tuple[int, ...]
    kind: NumberFormat
    start: int
    """Bytes from the start of the file."""
    size_bytes: int


class GgufFile:
    """An open GGUF file: `.metadata` (key -> value), `.tensors` (name -> TensorInfo), and the bytes themselves."""

    def __init__(self, path: Path, data: mmap.mmap, metadata: dict[str, Value], tensors: dict[str, TensorInfo]) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = tensors
        self._data = data

    def rows(self, name: str) -> npt.NDArray[np.uint8]:
        """Give a tensor's bytes as a read-only view uint8 [rows, row bytes] into the mapped file."""
        info = self.tensors[name]
        flat = np.frombuffer(self._data, np.uint8, info.size_bytes, info.start)
        return flat.reshape(-1, info.kind.row_bytes(info.shape[-1]))


def open_gguf(path: Path) -> GgufFile:
    """Map and check a file. Raises UsageError (not there), CorruptData (damaged), Refused (not supported)."""
    try:
        with path.open("rb") as stream:
            size_bytes = stream.seek(0, 2)
            if size_bytes < 24:
                raise CorruptData(f"{path}: {size_bytes} bytes are too few for a GGUF header")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", try_="a path to a .gguf file") from error
    cursor = _Cursor(path, data)
    tensor_count, key_count = _header(cursor)
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.string("a key", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.corrupt(f"key {key!r} twice")
        metadata[key] = cursor.value(key)
    entries = [_tensor_entry(cursor) for _ in range(tensor_count)]
    alignment = _alignment(cursor, metadata)
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(path, data, metadata, _placed(cursor, entries, start, alignment))


def _header(cursor: _Cursor) -> tuple[int, int]:
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise CorruptData(f"{cursor.path}: not a GGUF file (starts with {magic!r})", try_="a .gguf file")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0:
        raise Refused(f"{cursor.path}: big-endian GGUF is not supported", try_="a little-endian conversion of it")
    if version not in VERSIONS:
        raise Refused(f"{cursor.path}: GGUF version {version} is not supported (2 and 3 are)")
    tensor_count, key_count = cursor.u64("the tensor count"), cursor.u64("the key count")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise cursor.corrupt(f"a claim of {tensor_count} tensors and {key_count} keys")
    return tensor_count, key_count


def _alignment(cursor: _Cursor, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT_DEFAULT)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.corrupt(f"general.alignment {alignment!r}, which is no power of two up to {MAX_ALIGNMENT}")
    return alignment


class _Entry(Struct, frozen=True):
    name: str
    shape: tuple[int, ...]
    kind_number: int
    offset: int


def _tensor_entry(cursor: _Cursor) -> _Entry:
    name = cursor.string("a tensor name", MAX_KEY_BYTES)
    rank = cursor.u32(f"the rank of {name!r}")
    if not 1 <= rank <= MAX_RANK:
        raise cursor.corrupt(f"tensor {name!r} with rank {rank}")
    dims = [cursor.u64(f"the shape of {name!r}") for _ in range(rank)]
    return _Entry(name, tuple(reversed(dims)), cursor.u32(f"the type of {name!r}"), cursor.u64(f"offset of {name!r}"))


def _placed(cursor: _Cursor, entries: list[_Entry], start: int, alignment: int) -> dict[str, TensorInfo]:
    """Check types, sizes, places and overlaps of all tensors against the file's real size."""
    tensors: dict[str, TensorInfo] = {}
    for entry in entries:
        kind = FORMATS.get(entry.kind_number)
        if kind is None:
            number = UNREAD.get(entry.kind_number, f"number {entry.kind_number}")
            raise Refused(
                f"{cursor.path}: tensor {entry.name!r} has type {number}, which is not supported",
                try_=f"a conversion to one of {supported_names()}",
            )
        weights = 1
        for dim in entry.shape:
            weights *= dim
        columns = entry.shape[-1]
        if weights == 0 or columns % kind.weights:
            raise cursor.corrupt(f"tensor {entry.name!r} of type {kind.name} with shape {list(entry.shape)}")
        size_bytes = weights // kind.weights * kind.block_bytes
        at = start + entry.offset
        if entry.offset % alignment:
            raise cursor.corrupt(f"tensor {entry.name!r} at offset {entry.offset}, not a multiple of {alignment}")
        if at + size_bytes > cursor.size_bytes:
            raise CorruptData(
                f"{cursor.path}: tensor {entry.name!r} needs bytes {at} to {at + size_bytes}, "
                f"the file ends at {cursor.size_bytes}",
                try_="fetch the file again: it was cut short",
            )
        if entry.name in tensors:
            raise cursor.corrupt(f"tensor {entry.name!r} twice")
        tensors[entry.name] = TensorInfo(name=entry.name, shape=entry.shape, kind=kind, start=at, size_bytes=size_bytes)
    in_order = sorted(tensors.values(), key=lambda info: info.start)
    for one, following in pairwise(in_order):
        if one.start + one.size_bytes > following.start:
            raise cursor.corrupt(f"tensors {one.name!r} and {following.name!r} on the same bytes")
    return tensors


class _Cursor:
    """Reads forward through the mapped file and never past its end or the cap on metadata."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.size_bytes = len(data)
        self.at = 0
        self._data = data
        self._end = min(self.size_bytes, MAX_GGUF_METADATA_BYTES)

    def corrupt(self, what: str) -> CorruptData:
        return CorruptData(f"{self.path}: {what}, near byte {self.at}", try_="fetch or convert the file again")

    def require(self, count: int, what: str) -> None:
        """Raise unless `count` more bytes are there."""
        if count > self._end - self.at:
            whose = "the file ends" if self._end == self.size_bytes else "metadata may end"
            raise self.corrupt(f"{what} needs {count} bytes, but {whose} at {self._end}")

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        taken = self._data[self.at : self.at + count]
        self.at += count
        return taken

    def u32(self, what: str) -> int:
        number: int = _U32.unpack(self.take(4, what))[0]
        return number

    def u64(self, what: str) -> int:
        number: int = _U64.unpack(self.take(8, what))[0]
        return number

    def string(self, what: str, most_bytes: int = MAX_GGUF_METADATA_BYTES) -> str:
        length = self.u64(what)
        if length > most_bytes:
            raise self.corrupt(f"{what} of {length} bytes")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.corrupt(f"{what} that is not UTF-8 text") from error

    def value(self, key: str) -> Value:
        number = self.u32(f"the type of {key!r}")
        if number != _ARRAY:
            return self._scalar(key, number)
        element, count = self.u32(f"the element type of {key!r}"), self.u64(f"the length of {key!r}")
        if element == _STRING:
            return self._strings(key, count)
        if element == _ARRAY:
            raise Refused(f"{self.path}: key {key!r} is an array of arrays, which is not supported")
        if element not in _SCALARS:
            raise self.corrupt(f"key {key!r} of unknown type {element}")
        dtype = _SCALARS[element]
        self.require(count * dtype.itemsize, f"{count} values of {key!r}")
        values: Numbers = np.frombuffer(self._data, dtype, count, self.at).copy()
        self.at += values.nbytes
        return values

    def _scalar(self, key: str, number: int) -> Scalar:
        if number == _STRING:
            return self.string(f"the text of {key!r}")
        if number not in _SCALARS:
            raise self.corrupt(f"key {key!r} of unknown type {number}")
        dtype = _SCALARS[number]
        raw = self.take(dtype.itemsize, f"the value of {key!r}")
        plain: Scalar = np.frombuffer(raw, dtype)[0].item()
        return plain

    def _strings(self, key: str, count: int) -> list[str]:
        self.require(8 * count, f"{count} texts of {key!r}")  # a text has at least its own length
        data, at, end, length_of = self._data, self.at, self._end, _U64.unpack_from
        texts: list[str] = []
        for index in range(count):
            # Inlined `string`: vocabularies have 100,000 entries and more.
            stop = at + 8 + (length_of(data, at)[0] if at + 8 <= end else end)
            if stop > end:
                self.at = at
                raise self.corrupt(f"text {index} of {key!r} past the end at {end}")
            try:
                texts.append(data[at + 8 : stop].decode())
            except UnicodeDecodeError as error:
                self.at = at
                raise self.corrupt(f"text {index} of {key!r} that is not UTF-8") from error
            at = stop
        self.at = at
        return texts
