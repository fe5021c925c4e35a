"""What a stage of an item model says about itself, and how the tensors of a cut travel: one after the other, as bytes.

A board has no ONNX library: the manifest is JSON in the graph's metadata, as for stages of language models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from models.engine.base import EngineFailed
from models.engine.manifest import WeightInfo, metadata_of
from wire.errors import MalformedFrame
from wire.limits import MAX_DIM, MAX_LABELS, MAX_TENSOR_BYTES
from wire.messages import Label

Array = npt.NDArray[np.generic]
DtypeName = Literal["f32", "f16", "i64", "i32", "u8", "i8", "bool"]

KEY: Final = "edgelam.items"
LABELS_KEY: Final = "edgelam.labels"
"""In the metadata of a whole net that tells labels: which, as JSON."""
Labels = Annotated[tuple[Label, ...], Meta(min_length=2, max_length=MAX_LABELS)]
ROWS: Final = 0
"""Stands in a shape for the number of rows of the item at hand: the tokens of a text."""
MAX_PORTS: Final = 32
"""Tensors over one cut: a U-Net of sixteen levels has seventeen."""
MAX_PORT_RANK: Final = 8
MAX_ROWS: Final = 65_536
ALIGNMENT: Final = 8
"""Of each tensor in a bundle: the largest item size."""

DTYPES: Final[Mapping[str, np.dtype[np.generic]]] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "i64": np.dtype("<i8"),
    "i32": np.dtype("<i4"),
    "u8": np.dtype("u1"),
    "i8": np.dtype("i1"),
    "bool": np.dtype("?"),
}


class Port(Struct, frozen=True, array_like=True):
    """A tensor over a cut. A dimension of ROWS is as large as the item has rows."""

    name: Annotated[str, Meta(max_length=1024)]
    dtype: DtypeName
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_DIM)], ...], Meta(max_length=MAX_PORT_RANK)]

    def dims(self, rows: int) -> tuple[int, ...]:
        return tuple(rows if dim == ROWS else dim for dim in self.shape)

    def size_bytes(self, rows: int) -> int:
        return math.prod(self.dims(rows)) * DTYPES[self.dtype].itemsize


Ports = Annotated[tuple[Port, ...], Meta(max_length=MAX_PORTS)]


class ItemManifest(Struct, frozen=True, kw_only=True):
    """`inputs` and `outputs` are all that crosses the cuts before and behind the stage. What is in both is handed on
    as it came; `fed` of the inputs go into the graph. `weights` are supplied by the engine."""

    format: Literal["edgelam.items/1"] = "edgelam.items/1"
    inputs: Ports
    outputs: Ports
    fed: Annotated[tuple[str, ...], Meta(max_length=MAX_PORTS)]
    most_rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    weights: Annotated[tuple[WeightInfo, ...], Meta(max_length=65_536)]

    @property
    def has_rows(self) -> bool:
        return any(ROWS in port.shape for port in (*self.inputs, *self.outputs))


def read_item_manifest(graph: bytes, where: str) -> ItemManifest:
    """Give the manifest inside a stage's graph; raise EngineFailed if there is none or it is damaged."""
    data = metadata_of(graph, KEY, where)
    try:
        manifest = msgspec.json.decode(data, type=ItemManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EngineFailed(f"{where}: damaged stage graph: {error}") from error
    if not set(manifest.fed) <= {port.name for port in manifest.inputs}:
        raise EngineFailed(f"{where}: damaged stage graph: it is fed with what does not come")
    return manifest


def bundle_bytes(ports: Sequence[Port], rows: int) -> int:
    """Bytes of a bundle; 0 for no tensors. Numbers only: nothing is allocated."""
    return sum(_padded(port.size_bytes(rows)) for port in ports)


def views(ports: Sequence[Port], rows: int, data: npt.NDArray[np.uint8]) -> dict[str, Array]:
    """Give the tensors of a bundle where they lie; raise MalformedFrame if it is not of that size."""
    wanted = bundle_bytes(ports, rows)
    if data.size != wanted:
        raise MalformedFrame(f"{data.size} bytes came for an item of {rows} rows, {wanted} are due")
    found: dict[str, Array] = {}
    at = 0
    for port in ports:
        size = port.size_bytes(rows)
        found[port.name] = data[at : at + size].view(DTYPES[port.dtype]).reshape(port.dims(rows))
        at += _padded(size)
    return found


def bundle(ports: Sequence[Port], rows: int, tensors: Mapping[str, Array]) -> npt.NDArray[np.uint8]:
    """Put tensors, whose dtypes and shapes are those of the ports, one after the other."""
    data = np.zeros(bundle_bytes(ports, rows), np.uint8)
    for name, view in views(ports, rows, data).items():
        view[...] = tensors[name]
    return data


def check_size(ports: Sequence[Port], rows: int, what: str) -> None:
    """Raise MalformedFrame if such a bundle is more than may cross."""
    size = bundle_bytes(ports, rows)
    if not 1 <= size <= min(MAX_TENSOR_BYTES, MAX_DIM):
        raise MalformedFrame(f"{what}: {size} bytes, 1 to {min(MAX_TENSOR_BYTES, MAX_DIM)} may cross a cut")


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
