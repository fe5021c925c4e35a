"""What a stage's graph file says about itself, readable without an ONNX library and before anything is loaded.

The builder writes a StageManifest as JSON into the ONNX model's metadata; the engine must know which weights a graph
wants before onnxruntime opens it, and a board has no ONNX library. Only the few protobuf fields on the way there are
read: ModelProto.metadata_props (14), a list of (key, value) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from models.engine.base import EngineFailed, StageSpec
from models.families.config import MAX_BLOCKS, LlamaConfig, matrix_size
from wire.errors import EdgelamError
from wire.limits import ADAPTER_ID, MAX_ADAPTER_RANK, MAX_ADAPTERS, MAX_DIM, MAX_RANK

KEY: Final = "edgelam.stage"
FORMAT: Final = "edgelam.stage/1"

WEIGHTS_LOCATION: Final = "supplied-by-the-engine"
"""File name under which graphs declare their weights. Nothing is read from it, but onnxruntime wants it to exist."""

MAX_GRAPH_BYTES: Final = 64 * 1024 * 1024
"""A graph holds no weights: 126 blocks make about 0.3 MB."""

_METADATA_FIELD: Final = 14
_KEY_FIELD: Final = 1
_VALUE_FIELD: Final = 2

Precision = Literal["f32", "int8", "int4"]
WireDtype = Literal["f32", "f16", "bf16"]
Operators = Literal["fused", "standard"]
"""Of onnxruntime's own (models.build.stage), or of ONNX alone (models.build.standard)."""
Dim = Annotated[int, Meta(ge=1, le=MAX_DIM)]
AdapterId = Annotated[str, Meta(pattern=ADAPTER_ID)]
Rank = Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)]
Product = Literal["qkv", "o", "gate", "up", "down"]
Letters = Annotated[tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...], Meta(min_length=1, max_length=3)]
"""Which matrices of a stacked product have factors; of the others the one there is."""


class WeightInfo(Struct, frozen=True, array_like=True):
    """One tensor that the engine must supply."""

    name: str
    dtype: Literal["f32", "f16", "u8"]
    shape: Annotated[tuple[Dim, ...], Meta(min_length=1, max_length=MAX_RANK)]

    @property
    def size_bytes(self) -> int:
        count = {"f32": 4, "f16": 2, "u8": 1}[self.dtype]
        for dim in self.shape:
            count *= dim
        return count


class Adapters(Struct, frozen=True, kw_only=True):
    """Low-rank factors that a stage has beside its weights, those of all adapters in one pair for each product: rows
    take part with the ranks of one adapter, or with none.

    Such a product of `letters` has A [in, len(letters) * width] and B [len(letters) * width, out]: for each letter the
    ranks of all adapters, one behind the other, and zeros in B where a letter has no rows.
    """

    ranks: Annotated[tuple[tuple[AdapterId, Rank], ...], Meta(min_length=1, max_length=MAX_ADAPTERS)]
    products: Annotated[tuple[tuple[Product, Letters], ...], Meta(min_length=1, max_length=5)]

    @property
    def width(self) -> int:
        return sum(rank for _, rank in self.ranks)

    def columns(self, adapter: str) -> slice | None:
        """The ranks of an adapter among all; None if it is not here."""
        start = 0
        for name, rank in self.ranks:
            if name == adapter:
                return slice(start, start + rank)
            start += rank
        return None

    def weights_of(self, config: LlamaConfig, block: int) -> tuple[WeightInfo, ...]:
        """Both factors of each product of a block."""
        found: list[WeightInfo] = []
        for product, letters in self.products:
            out, columns = matrix_size(config, product)
            ranks = len(letters) * self.width
            found.append(WeightInfo(f"block.{block}.{product}.lora_a", "f32", (columns, ranks)))
            found.append(WeightInfo(f"block.{block}.{product}.lora_b", "f32", (ranks, out)))
        return tuple(found)


class StageManifest(Struct, frozen=True, kw_only=True):
    """Blocks are [first_block, end_block); `weights` in the order of the graph."""

    format: Literal["edgelam.stage/1"] = FORMAT
    precision: Precision
    wire_dtype: WireDtype
    embedding: bool
    head: bool
    first_block: Annotated[int, Meta(ge=0, le=MAX_BLOCKS)]
    end_block: Annotated[int, Meta(ge=0, le=MAX_BLOCKS)]
    config: LlamaConfig
    weights: Annotated[tuple[WeightInfo, ...], Meta(max_length=MAX_BLOCKS * 32)]
    """As they are packed, whatever the graph's own initialisers are."""
    operators: Operators = "fused"
    adapters: Adapters | None = None

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.end_block)

    def check(self, spec: StageSpec, where: str) -> None:
        """Raise EngineFailed if the graph is not the stage that was ordered."""
        ordered = (
            ("embedding", self.embedding, spec.embedding),
            ("head", self.head, spec.head),
            ("blocks", len(self.blocks), spec.end_block - spec.first_block),
            ("first block", self.first_block, spec.first_block),
            ("hidden", self.config.hidden, spec.hidden),
            ("vocabulary", self.config.vocabulary, spec.vocabulary),
            ("wire dtype", self.wire_dtype, spec.wire_dtype),
        )
        for name, found, expected in ordered:
            if found != expected:
                raise EngineFailed(f"{where}: {name} is {found}, the order says {expected}")


def load_graph(path: Path, spec: StageSpec, operators: Operators = "fused") -> tuple[bytes, StageManifest]:
    """Read a graph file: its bytes and its manifest, checked against the order. Raises EngineFailed."""
    try:
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise EngineFailed(f"{path}: {path.stat().st_size} bytes are too many for a graph without weights")
        graph = path.read_bytes()
    except OSError as error:
        raise EngineFailed(f"{path}: {error.strerror}") from error
    manifest = read_manifest(graph, path.name)
    manifest.check(spec, path.name)
    if manifest.operators != operators:
        raise EngineFailed(
            f"{path.name}: a graph of {manifest.operators} operators, this engine reads {operators} ones"
        )
    return graph, manifest


def read_manifest(graph: bytes, where: str) -> StageManifest:
    """Give the manifest inside an ONNX model; raise EngineFailed (with `where`) if there is none or it is damaged."""
    data = metadata_of(graph, KEY, where)
    try:
        return msgspec.json.decode(data, type=StageManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, EdgelamError) as error:
        raise EngineFailed(f"{where}: damaged stage graph: {error}") from error


def metadata_of(graph: bytes, key: str, where: str) -> bytes:
    """Give what an ONNX model's metadata holds under a key; raise EngineFailed if it holds nothing there."""
    try:
        for field, value in _fields(memoryview(graph)):
            if field == _METADATA_FIELD:
                pair = {number: bytes(text) for number, text in _fields(value)}
                if pair.get(_KEY_FIELD) == key.encode():
                    return pair.get(_VALUE_FIELD, b"")
    except ValueError as error:
        raise EngineFailed(f"{where}: damaged stage graph: {error}") from error
    raise EngineFailed(f"{where}: not a stage graph of edgelam", try_="install the same edgelam version everywhere")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give (number, bytes) of each length-delimited field of a protobuf message; skip the others.

    Raises ValueError where the bytes are no message.
    """
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(message)}")
        if kind == 2:
            yield tag >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Give (value, next position); raise ValueError at the end of the bytes or beyond 64 bits."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("cut off inside a number")
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"a number without end at byte {at}")
