"""How long codecs take on this machine: one row, or a chunk of them, coded and decoded."""

from __future__ import annotations

import time

import numpy as np

from models.engine.rows import WIRE_DTYPES
from wire.coding import coder
from wire.messages import CodecName
from wire.tensors import bf16_bits


class CodingStep:
    """Codes rows of random numbers and decodes them; a call gives the seconds that both took.

    Before each it runs through `swept_bytes` of memory: behind a step of a model neither finds its code and its rows in
    the cache.
    """

    def __init__(self, codec: CodecName, wire_dtype: str, rows: int, width: int, swept_bytes: int) -> None:
        values = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)
        self._given = bf16_bits(values) if wire_dtype == "bf16" else values.astype(WIRE_DTYPES[wire_dtype])
        self._coder = coder(codec, wire_dtype, width)
        self._coded = self._coder.encode(self._given)
        self._swept = np.ones(swept_bytes, np.uint8)

    def __call__(self) -> float:
        self._swept.max()
        began_s = time.perf_counter()
        self._coder.encode(self._given)
        took_s = time.perf_counter() - began_s
        self._swept.max()
        began_s = time.perf_counter()
        self._coder.decode(self._coded)
        return took_s + time.perf_counter() - began_s
