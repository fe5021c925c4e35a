"""Buffers that a step reads its rows from and writes its results to, bound once and used again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.engine.base import Array
from models.engine.manifest import StageManifest

WIRE_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}

_SPECIAL_BITS: Final[Mapping[str, np.unsignedinteger[Any]]] = {
    "f32": np.uint32(0x7F80_0000),
    "f16": np.uint16(0x7C00),
    "bf16": np.uint16(0x7F80),
}
"""As which integers to look at hidden states, and the exponent bits that are all set in infinities and NaNs only."""


class Rows:
    """Buffers for steps of so many rows of so many requests, shared by all slots: a result is valid until the next."""

    def __init__(self, manifest: StageManifest, requests: int, count: int, logits_rows: int = 1) -> None:
        wire, hidden = manifest.wire_dtype, manifest.config.hidden
        shape = (requests, count, hidden)
        self._bits = _SPECIAL_BITS[wire].dtype
        self.given: Array = np.zeros(shape[:2], np.int64) if manifest.embedding else np.zeros(shape, WIRE_DTYPES[wire])
        self.scratch = np.zeros(shape, self._bits)
        self.last_row = np.zeros(requests, np.int32)
        self.end = np.zeros((), np.int32)
        makes = manifest.embedding or manifest.blocks
        self.hidden: Array | None = np.zeros(shape, WIRE_DTYPES[wire]) if makes else None
        self.logits: Array | None = None
        if manifest.head:
            self.logits = np.zeros((requests * logits_rows, manifest.config.vocabulary), np.float32)
        self.logits_from = np.array([-logits_rows], np.int64)
        self.adapters: Array | None = None
        if manifest.adapters is not None:
            self.adapters = np.zeros((requests, 1, manifest.adapters.width), np.float32)
        self._name_parts()

    def _name_parts(self) -> None:
        """`result` is what a step gives: of one request without its dimension."""
        alone = len(self.given) == 1 and (self.logits is None or len(self.logits) == 1)
        self.given_rows: Array = self.given[0]
        self.bits: Array = (self.given if self.hidden is None else self.hidden).view(self._bits)
        result = self.logits if self.logits is not None else self.hidden
        assert result is not None, "a stage gives something"
        self.result: Array = result[0] if alone else result

    def take(self, at: int, ranks: slice | None) -> None:
        """Have the rows of a request take part with these ranks of the adapters, or with none."""
        if self.adapters is not None:
            self.adapters[at] = 0
            if ranks is not None:
                self.adapters[at, 0, ranks] = 1

    def first(self, requests: int) -> Rows:
        """The same buffers for fewer requests."""
        part = copy.copy(self)
        part.given, part.scratch = self.given[:requests], self.scratch[:requests]
        part.last_row = self.last_row[:requests]
        part.hidden = None if self.hidden is None else self.hidden[:requests]
        part.logits = None if self.logits is None else self.logits[:requests]
        part.adapters = None if self.adapters is None else self.adapters[:requests]
        part._name_parts()
        return part

    @property
    def size_bytes(self) -> int:
        arrays = (self.given, self.hidden, self.logits, self.scratch, self.adapters)
        return sum(array.nbytes for array in arrays if array is not None)


def has_special(bits: npt.NDArray[Any], scratch: npt.NDArray[Any], wire_dtype: str) -> bool:
    """Is there an infinity or a NaN, whose exponent is all ones?"""
    exponent = _SPECIAL_BITS[wire_dtype]
    np.bitwise_and(bits, exponent, out=scratch)
    return bool(np.maximum.reduce(scratch, axis=None) == exponent)
