"""Number formats of GGUF tensors, and how each becomes float32.

A quantised row is a run of blocks; a block holds 32 or 256 weights as small integers plus scales. Every `_name`
function below takes blocks as uint8 [n, block bytes] and gives float32 [n, block weights], with the arithmetic (and so
the last bit) of the reference implementation. Layouts: ggml-common.h of the ggml project.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

CHUNK_WEIGHTS: Final = 1 << 20
"""Weights dequantised at a time: scratch stays at a few MB however large the tensor."""


def _halves(blocks: Bytes, at: int) -> Floats:
    """Give the float16 at byte `at` of each block as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[n, 16] -> [n, 32]: low halves first, then high halves."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """Give bit j of the 32-bit word at byte `at` as 0 or 16 for weight j: [n, 32]."""
    word = np.ascontiguousarray(blocks[:, at : at + 4])
    bits: Bytes = np.unpackbits(word, axis=1, bitorder="little")
    shifted: Bytes = bits << np.uint8(4)
    return shifted


def _f32(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float32)


def _f16(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view(np.float16).astype(np.float32)


def _bf16(blocks: Bytes) -> Floats:
    return (np.ascontiguousarray(blocks).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return _halves(blocks, 0) * (_nibbles(blocks[:, 2:]).astype(np.float32) - 8)


def _q4_1(blocks: Bytes) -> Floats:
    return _halves(blocks, 0) * _nibbles(blocks[:, 4:]) + _halves(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    levels = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).astype(np.float32) - 16
    return _halves(blocks, 0) * levels


def _q5_1(blocks: Bytes) -> Floats:
    return _halves(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)) + _halves(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _halves(blocks, 0) * blocks[:, 2:].view(np.int8)


def _six_bit_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Unpack 12 bytes into 8 scales and 8 minimums of 6 bits each (Q4_K, Q5_K): two [n, 8]."""
    low_scale, low_minimum, mixed = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low_scale & 0x3F, (mixed & 0x0F) | ((low_scale >> 6) << 4)], axis=1)
    minimums = np.concatenate([low_minimum & 0x3F, (mixed >> 4) | ((low_minimum >> 6) << 4)], axis=1)
    return scales, minimums


def _affine_super_block(blocks: Bytes, levels: Bytes) -> Floats:
    """(d * scale) * level - (dmin * minimum), for levels [n, 8, 32] of a block that starts with d, dmin, scales."""
    scales, minimums = _six_bit_scales(blocks[:, 4:16])
    step = (_halves(blocks, 0) * scales)[:, :, None]
    offset = (_halves(blocks, 2) * minimums)[:, :, None]
    return (step * levels - offset).reshape(len(blocks), 256)


def _nibble_groups(packed: Bytes) -> Bytes:
    """[n, 128] -> [n, 8, 32]: each 32 bytes give one group of low halves, then one of high halves."""
    quads = packed.reshape(-1, 4, 32)
    return np.stack([quads & 0x0F, quads >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(blocks: Bytes) -> Floats:
    return _affine_super_block(blocks, _nibble_groups(blocks[:, 16:]))


def _q5_k(blocks: Bytes) -> Floats:
    # Bit g of byte j is the fifth bit of weight j of group g.
    group = np.arange(8, dtype=np.uint8)[None, :, None]
    fifth = ((blocks[:, 16:48][:, None, :] >> group) & np.uint8(1)) << np.uint8(4)
    return _affine_super_block(blocks, _nibble_groups(blocks[:, 48:]) | fifth)


def _q6_k(blocks: Bytes) -> Floats:
    # Two halves of 128 weights; in each, 64 bytes hold low nibbles and 32 bytes hold four times 2 high bits.
    low = blocks[:, 0:128].reshape(-1, 2, 2, 32)
    nibbles = np.stack([low & 0x0F, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shift = np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shift) & 0x03
    levels = (nibbles | (high << 4)).view(np.int8).reshape(-1, 16, 16) - np.int8(32)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    step: Floats = (_halves(blocks, 208) * scales)[:, :, None]
    weights: Floats = step * levels
    return weights.reshape(len(blocks), 256)


class NumberFormat(Struct, frozen=True, kw_only=True):
    """One ggml type that we read. `weights` per block, in `block_bytes` bytes."""

    name: str
    weights: int
    block_bytes: int
    decode: Callable[[Bytes], Floats]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights, which must be a multiple of `weights`."""
        return columns // self.weights * self.block_bytes


def _format(name: str, weights: int, block_bytes: int, decode: Callable[[Bytes], Floats]) -> NumberFormat:
    return NumberFormat(name=name, weights=weights, block_bytes=block_bytes, decode=decode)


FORMATS: Final[Mapping[int, NumberFormat]] = MappingProxyType(
    {
        0: _format("F32", 1, 4, _f32),
        1: _format("F16", 1, 2, _f16),
        2: _format("Q4_0", 32, 18, _q4_0),
        3: _format("Q4_1", 32, 20, _q4_1),
        6: _format("Q5_0", 32, 22, _q5_0),
        7: _format("Q5_1", 32, 24, _q5_1),
        8: _format("Q8_0", 32, 34, _q8_0),
        12: _format("Q4_K", 256, 144, _q4_k),
        13: _format("Q5_K", 256, 176, _q5_k),
        14: _format("Q6_K", 256, 210, _q6_k),
        30: _format("BF16", 1, 2, _bf16),
    }
)

# Types that exist and that we don't read: only their names, for the message that says so.
UNREAD: Final[Mapping[int, str]] = MappingProxyType(
    {
        9: "Q8_1",
        10: "Q2_K",
        11: "Q3_K",
        15: "Q8_K",
        16: "IQ2_XXS",
        17: "IQ2_XS",
        18: "IQ3_XXS",
        19: "IQ1_S",
        20: "IQ4_NL",
        21: "IQ3_S",
        22: "IQ2_S",
        23: "IQ4_XS",
        24: "I8",
        25: "I16",
        26: "I32",
        27: "I64",
        28: "F64",
        29: "IQ1_M",
        34: "TQ1_0",
        35: "TQ2_0",
        39: "MXFP4",
    }
)


def supported_names() -> str:
    """'F32, F16, Q4_0, ...' for messages."""
    return ", ".join(kind.name for kind in FORMATS.values())


def dequantise(kind: NumberFormat, rows: Bytes) -> Floats:
    """Turn uint8 [rows, row bytes] into float32 [rows, columns]; a new array, which the caller may change."""
    count, row_bytes = rows.shape
    blocks = rows.reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.weights), np.float32)
    at_once = max(1, CHUNK_WEIGHTS // kind.weights)
    with np.errstate(over="ignore", invalid="ignore"):  # scales of a damaged file may be inf or nan: passed on as such
        for start in range(0, len(blocks), at_once):
            out[start : start + at_once] = kind.decode(blocks[start : start + at_once])
    return out.reshape(count, row_bytes // kind.block_bytes * kind.weights)
