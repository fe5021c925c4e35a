"""Weights in blocks of 32 along the input dimension, in the layout that MatMulNBits reads. Pure numpy.

A matrix [out, in] becomes, with `blocks = ceil(in / 32)` and zeros behind the last column:
    data         uint8 [out, blocks, 16] (4 bit: two codes a byte, the lower half first) or [out, blocks, 32] (8 bit)
    scales       float32 [out, blocks]
    zero_points  uint8 [out, ceil(blocks / 2)], 4 bit only, packed like the data; 8 bit has 128 everywhere
and stands for scale * (code - zero_point).

4 bit is asymmetric with whole zero points, the only form that is both accurate and fast: symmetric blocks degrade the
text, and float zero points have no fast kernel (docs/decisions/0003-quantisation.md).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]

BLOCK: Final = 32
"""Weights that share a scale: that of GGUF's own formats, so their blocks fall on ours."""

ZERO_POINT_8BIT: Final = 128
"""What MatMulNBits takes for 8 bit when it is given no zero points."""

_SLICE_BLOCKS: Final = 4096
"""Blocks quantised at a time: 512 KB of float32, which stays in the second-level cache."""

_RANGES: Final = (1.0, 0.92, 0.84)
"""Parts of the range from least to largest weight that are tried: clipping the ends makes the steps finer."""

_ZERO_SHIFTS: Final = (0, -1, 1)
"""Offsets tried around the rounded zero point: rounding it moves a whole block, the neighbour may move it less."""


class Quantised(Struct, frozen=True, eq=False):
    """See the module docstring for shapes. `zero_points` is None for 8 bit."""

    data: Codes
    scales: Floats
    zero_points: Codes | None


def blocks_in(columns: int) -> int:
    """Give the number of blocks in a row of `columns` weights."""
    return -(-columns // BLOCK)


def quantise_4bit(weight: Floats) -> Quantised:
    """Choose scale and zero point of each block for the least squared error among a few candidates.

    A block that comes from a 4 bit format with its own scale and minimum (Q4_1) finds its own grid, with the zero point
    rounded, among the candidates. The scale is refitted by least squares to the codes of each candidate.
    """
    out, blocks = weight.shape[0], blocks_in(weight.shape[1])
    rows = _in_blocks(weight)
    codes = np.empty(rows.shape, np.uint8)
    scales = np.empty(len(rows), np.float32)
    zeros = np.empty(len(rows), np.uint8)
    for start in range(0, len(rows), _SLICE_BLOCKS):
        part = slice(start, start + _SLICE_BLOCKS)
        codes[part], scales[part], zeros[part] = _best_4bit(rows[part])
    packed_zeros = np.zeros((out, blocks + blocks % 2), np.uint8)
    packed_zeros[:, :blocks] = zeros.reshape(out, blocks)
    return Quantised(
        data=_paired(codes).reshape(out, blocks, BLOCK // 2),
        scales=scales.reshape(out, blocks),
        zero_points=_paired(packed_zeros),
    )


def quantise_8bit(weight: Floats) -> Quantised:
    """Round each block to 255 steps, symmetric about zero.

    What was Q8_0 comes back bit for bit: its largest code is 127, so its scale is the largest weight / 127 exactly.
    """
    out, blocks = weight.shape[0], blocks_in(weight.shape[1])
    rows = _in_blocks(weight)
    codes = np.empty(rows.shape, np.uint8)
    scales = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _SLICE_BLOCKS):
        part = slice(start, start + _SLICE_BLOCKS)
        scale = np.abs(rows[part]).max(axis=1) / np.float32(127)
        steps = np.rint(rows[part] / np.where(scale > 0, scale, np.float32(1))[:, None])
        codes[part] = (np.clip(steps, -127, 127) + ZERO_POINT_8BIT).astype(np.uint8)
        scales[part] = scale
    return Quantised(data=codes.reshape(out, blocks, BLOCK), scales=scales.reshape(out, blocks), zero_points=None)


def dequantise(quantised: Quantised, columns: int) -> Floats:
    """Give the float32 matrix [out, columns] that the codes stand for."""
    out, blocks, width = quantised.data.shape
    if width == BLOCK:
        codes = quantised.data.astype(np.float32) - ZERO_POINT_8BIT
    else:
        if quantised.zero_points is None:
            raise ValueError("4 bit codes without zero points")
        halves = np.stack((quantised.data & 15, quantised.data >> 4), axis=-1).reshape(out, blocks, BLOCK)
        zeros = np.stack((quantised.zero_points & 15, quantised.zero_points >> 4), axis=-1).reshape(out, -1)
        codes = halves.astype(np.float32) - zeros[:, :blocks, None]
    return (codes * quantised.scales[:, :, None]).reshape(out, blocks * BLOCK)[:, :columns]


def _paired(codes: Codes) -> Codes:
    """[n, 2m] 4 bit codes -> [n, m] bytes, the first of each pair in the lower half."""
    paired: Codes = codes[:, 0::2] | np.left_shift(codes[:, 1::2], np.uint8(4))
    return paired


def _in_blocks(weight: Floats) -> Floats:
    """[out, in] -> [out * blocks, 32], zeros behind the last column."""
    out, columns = weight.shape
    missing = -columns % BLOCK
    if missing:
        weight = np.pad(weight, ((0, 0), (0, missing)))
    return np.ascontiguousarray(weight, dtype=np.float32).reshape(out * blocks_in(columns), BLOCK)


def _best_4bit(rows: Floats) -> tuple[Codes, Floats, Codes]:
    """[n, 32] -> codes [n, 32], scales [n], zero points [n].

    With u = code - zero point and the best scale for these codes, <w, u> / <u, u>, the squared error is
    <w, w> - <w, u>^2 / <u, u>: so the candidate with the largest <w, u>^2 / <u, u> wins.
    """
    least = np.minimum(rows.min(axis=1), 0)
    most = np.maximum(rows.max(axis=1), 0)
    best_gain = np.full(len(rows), -1, np.float32)
    best_codes = np.zeros(rows.shape, np.uint8)
    best_scales = np.zeros(len(rows), np.float32)
    best_zeros = np.zeros(len(rows), np.uint8)
    for part in _RANGES:
        step = (most - least) * np.float32(part / 15)
        step[step == 0] = 1
        scaled = rows / step[:, None]
        middle = np.rint(-least * np.float32(part) / step)
        rounded = np.rint(scaled, out=scaled)
        for shift in _ZERO_SHIFTS:
            zero = np.clip(middle + np.float32(shift), 0, 15)
            centred = np.clip(rounded, -zero[:, None], (15 - zero)[:, None])
            along = np.einsum("ij,ij->i", rows, centred)
            norm = np.einsum("ij,ij->i", centred, centred)
            scale = along / np.where(norm > 0, norm, np.float32(1))
            gain = along * scale
            better = gain > best_gain
            best_gain[better] = gain[better]
            best_codes[better] = (centred[better] + zero[better, None]).astype(np.uint8)
            best_scales[better] = scale[better]
            best_zeros[better] = zero[better].astype(np.uint8)
    return best_codes, best_scales, best_zeros
