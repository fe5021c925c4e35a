"""safetensors files: 8 bytes of header length, a JSON header, the tensors without gaps.

Reading maps the file and gives views; nothing is copied and nothing is executed. Writing is atomic and deterministic:
equal tensors and metadata give equal bytes, so that an artifact's digest is a name for its content.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from models.cache import write_atomic
from wire.errors import CorruptData, Refused, UsageError
from wire.limits import MAX_SAFETENSORS_HEADER_BYTES

Array = npt.NDArray[np.generic]

MAX_RANK: Final = 8
MAX_TENSORS: Final = 1 << 18
"""A sharded file of the largest models has some thousands."""

ALIGNMENT: Final = 8
"""The header is padded to this, and tensors stand by falling item size, so every view is aligned."""

_LENGTH = struct.Struct("<Q")
_DTYPES: Final[Mapping[str, np.dtype[np.generic]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items() if name != "BF16"}


class TensorInfo(Struct, frozen=True, kw_only=True):
    """Where a tensor lies: `start` in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


class _Entry(Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class SafetensorsFile:
    """An open file: `.tensors` (name -> TensorInfo), `.metadata` (text -> text), and views of the mapped bytes."""

    def __init__(self, path: Path, data: mmap.mmap, tensors: dict[str, TensorInfo], metadata: dict[str, str]) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self._data = data

    @property
    def pages(self) -> mmap.mmap:
        """The mapped file, for whoever has to advise the kernel about its pages."""
        return self._data

    def view(self, name: str) -> Array:
        """Give a tensor as a read-only view. BF16 comes as its uint16 bits. Raises KeyError."""
        info = self.tensors[name]
        dtype = _DTYPES[info.dtype]
        count = info.size_bytes // dtype.itemsize
        return np.frombuffer(self._data, dtype, count, info.start).reshape(info.shape)

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """Give a floating-point tensor as float32: a view if it is one, else a new array."""
        info, stored = self.tensors[name], self.view(name)
        if info.dtype == "BF16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        if info.dtype not in ("F64", "F32", "F16"):
            raise Refused(f"{self.path}: tensor {name!r} has dtype {info.dtype}, not a floating-point one")
        return stored.astype(np.float32, copy=False)


def open_safetensors(path: Path) -> SafetensorsFile:
    """Map and check a file. Raises UsageError (not there), CorruptData (damaged), Refused (unknown dtype)."""
    try:
        with path.open("rb") as stream:
            size_bytes = stream.seek(0, 2)
            if size_bytes < _LENGTH.size + 2:
                raise CorruptData(f"{path}: {size_bytes} bytes are too few for a safetensors header")
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", try_="a path to a .safetensors file") from error
    header_bytes: int = _LENGTH.unpack(data[: _LENGTH.size])[0]
    if header_bytes > min(MAX_SAFETENSORS_HEADER_BYTES, size_bytes - _LENGTH.size):
        raise CorruptData(f"{path}: a header of {header_bytes} bytes in a file of {size_bytes}")
    start = _LENGTH.size + header_bytes
    entries, metadata = _header(path, data[_LENGTH.size : start])
    return SafetensorsFile(path, data, _placed(path, entries, start, size_bytes), metadata)


def read(path: Path) -> dict[str, Array]:
    """Give all tensors of a file as read-only views of the mapped bytes (BF16 as uint16 bits)."""
    file = open_safetensors(path)
    return {name: file.view(name) for name in file.tensors}


def _header(path: Path, text: bytes) -> tuple[dict[str, _Entry], dict[str, str]]:
    try:
        parts = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        metadata = msgspec.json.decode(parts.pop("__metadata__", msgspec.Raw(b"{}")), type=dict[str, str])
        if len(parts) > MAX_TENSORS:
            raise CorruptData(f"{path}: {len(parts)} tensors")
        return {name: msgspec.json.decode(part, type=_Entry) for name, part in parts.items()}, metadata
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptData(f"{path}: damaged safetensors header: {error}") from error


def _placed(path: Path, entries: dict[str, _Entry], start: int, size_bytes: int) -> dict[str, TensorInfo]:
    """Check that dtypes, shapes and offsets fit, and that the tensors fill the file without gap or overlap."""
    tensors: dict[str, TensorInfo] = {}
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise Refused(f"{path}: tensor {name!r} has dtype {entry.dtype!r} ({', '.join(_DTYPES)} are supported)")
        if len(entry.shape) > MAX_RANK or any(dim < 0 for dim in entry.shape):
            raise CorruptData(f"{path}: tensor {name!r} has shape {entry.shape[: MAX_RANK + 1]}")
        needed = dtype.itemsize
        for dim in entry.shape:
            needed *= dim
        begin, end = entry.data_offsets
        if begin != expected or end - begin != needed:
            raise CorruptData(
                f"{path}: tensor {name!r} lies at {begin} to {end}, expected {expected} to {expected + needed}"
            )
        tensors[name] = TensorInfo(dtype=entry.dtype, shape=tuple(entry.shape), start=start + begin, size_bytes=needed)
        expected = end
    if start + expected != size_bytes:
        raise CorruptData(
            f"{path}: tensors end at byte {start + expected}, the file at {size_bytes}",
            try_="fetch the file again: it was cut short or joined with another",
        )
    return tensors


def to_bytes(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Give the file's bytes: the same for the same tensors and metadata, in whatever order they are given.

    bfloat16 bits are written as what they are here: uint16.
    """
    in_order = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    pieces: list[bytes] = []
    offset = 0
    for name, tensor in in_order:
        dtype = tensor.dtype.newbyteorder("<")
        if dtype not in _NAMES or name == "__metadata__":
            raise ValueError(f"tensor {name!r} of dtype {tensor.dtype} can't be written")
        piece = tensor.astype(dtype, copy=False).tobytes()
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(piece)],
        }
        pieces.append(piece)
        offset += len(piece)
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % ALIGNMENT)
    return b"".join([_LENGTH.pack(len(text)), text, *pieces])


def write(path: Path, tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> None:
    """Write a file so that others see all of it or nothing; see `to_bytes`. Raises OSError."""
    write_atomic(path, to_bytes(tensors, metadata))
