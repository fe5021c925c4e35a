"""A tensor as it crosses the network: dtype, shape and the little-endian bytes behind them, without copies.

Layouts of the bytes (row-major, little-endian):
    F32 F16 I32 U8   the elements
    BF16             the elements as uint16 bit patterns (the upper half of a float32)
    I8               float32 scales [..., last / group], then int8 values [..., last]; value = scale * int8
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from wire.errors import MalformedFrame
from wire.limits import MAX_DIM, MAX_RANK, MAX_TENSOR_BYTES

Array = npt.NDArray[Any]


class Dtype(IntEnum):
    """Element type; the number is byte 10 of a frame."""

    NONE = 0
    F32 = 1
    F16 = 2
    BF16 = 3
    I8 = 4
    I32 = 5
    U8 = 6


_NUMPY: Final[dict[Dtype, np.dtype[Any]]] = {
    Dtype.F32: np.dtype("<f4"),
    Dtype.F16: np.dtype("<f2"),
    Dtype.BF16: np.dtype("<u2"),
    Dtype.I8: np.dtype("i1"),
    Dtype.I32: np.dtype("<i4"),
    Dtype.U8: np.dtype("u1"),
}
_OF_NUMPY: Final[dict[str, Dtype]] = {"<f4": Dtype.F32, "<f2": Dtype.F16, "<i4": Dtype.I32, "|u1": Dtype.U8}
_OF_DTYPE: Final[dict[np.dtype[Any], Dtype]] = {np.dtype(name): dtype for name, dtype in _OF_NUMPY.items()}
_ITEM_BYTES: Final = (0, 4, 2, 2, 1, 4, 1)
"""By Dtype."""

_INT8_MOST: Final = 127
"""Symmetric range: -128 is not used, so that the sign of a value never changes its magnitude."""


def tensor_bytes(dtype: Dtype, shape: Sequence[int], group: int = 0) -> int:
    """Give the payload bytes of a tensor; raise MalformedFrame if dtype, shape and group don't make one.

    Every dimension is 1 to MAX_DIM, the rank 1 to MAX_RANK, the bytes at most MAX_TENSOR_BYTES. `group` is 0 except
    for I8, where it divides the last dimension.
    """
    if dtype is Dtype.NONE:
        if shape or group:
            raise MalformedFrame(f"no tensor, but shape {tuple(shape)} and group {group}")
        return 0
    if not 1 <= len(shape) <= MAX_RANK:
        raise MalformedFrame(f"rank {len(shape)}, 1 to {MAX_RANK} are taken")
    if min(shape) < 1 or max(shape) > MAX_DIM:
        raise MalformedFrame(f"shape {tuple(shape)}: a dimension is not in 1 to {MAX_DIM}")
    count = math.prod(shape)
    size = count * _ITEM_BYTES[dtype]
    if dtype is Dtype.I8:
        if group < 1 or shape[-1] % group:
            raise MalformedFrame(f"int8 groups of {group} don't divide rows of {shape[-1]}")
        size += count // group * 4
    elif group:
        raise MalformedFrame(f"group {group} for dtype {dtype.name}, only I8 has groups")
    if size > MAX_TENSOR_BYTES:
        raise MalformedFrame(f"tensor of {size} bytes, at most {MAX_TENSOR_BYTES} are taken")
    return size


class Tensor(Struct, frozen=True, eq=False, gc=False):
    """`buffers` one after the other are the payload; they share memory with whatever the tensor was made from."""

    dtype: Dtype
    shape: tuple[int, ...]
    group: int
    buffers: tuple[memoryview, ...]

    @staticmethod
    def of(array: Array) -> Tensor:
        """Wrap a float32, float16, int32 or uint8 array; copied only if it is not contiguous and little-endian."""
        dtype = _OF_DTYPE.get(array.dtype)
        if dtype is None or not array.flags.c_contiguous:
            array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            dtype = _OF_NUMPY.get(array.dtype.str)
            if dtype is None:
                raise ValueError(f"no wire dtype for {array.dtype}; float32, float16, int32 and uint8 have one")
        tensor_bytes(dtype, array.shape)
        return Tensor(dtype, array.shape, 0, (_bytes_of(array),))

    @staticmethod
    def bf16(bits: Array) -> Tensor:
        """Wrap bfloat16 values given as their uint16 bit patterns (see `bf16_bits`)."""
        if bits.dtype != np.uint16:
            raise ValueError(f"bfloat16 travels as uint16 bits, not {bits.dtype}")
        plain = np.ascontiguousarray(bits, dtype="<u2")
        tensor_bytes(Dtype.BF16, plain.shape)
        return Tensor(Dtype.BF16, plain.shape, 0, (_bytes_of(plain),))

    @staticmethod
    def int8(array: Array, group: int) -> Tensor:
        """Quantise float32 [..., last] to int8 with one float32 scale per `group` of the last axis (copies).

        scale = largest magnitude of the group / 127; the error of a value is at most half its scale.
        """
        tensor_bytes(Dtype.I8, array.shape, group)
        grouped = np.ascontiguousarray(array, dtype=np.float32).reshape(*array.shape[:-1], -1, group)
        scales = np.abs(grouped).max(axis=-1) / np.float32(_INT8_MOST)
        safe = np.where(scales > 0, scales, np.float32(1))
        values = np.clip(np.rint(grouped / safe[..., None]), -_INT8_MOST, _INT8_MOST).astype(np.int8)
        scale_bytes = _bytes_of(np.ascontiguousarray(scales, dtype="<f4"))
        return Tensor(Dtype.I8, array.shape, group, (scale_bytes, _bytes_of(values)))

    @staticmethod
    def over(dtype: Dtype, shape: tuple[int, ...], group: int, payload: memoryview) -> Tensor:
        """Put dtype and shape over flat bytes whose length was checked to be theirs."""
        if dtype is not Dtype.I8:
            return Tensor(dtype, shape, 0, (payload,))
        scale_bytes = math.prod(shape) // group * 4
        return Tensor(dtype, shape, group, (payload[:scale_bytes], payload[scale_bytes:]))

    @property
    def nbytes(self) -> int:
        return sum(len(buffer) for buffer in self.buffers)

    def array(self) -> Array:
        """Give a view of the elements, bfloat16 as uint16 bits; read-only where the bytes are. Not for int8."""
        if self.dtype is Dtype.I8:
            raise ValueError("an int8 tensor has scales: use to_f32()")
        return np.frombuffer(self.buffers[0], dtype=_NUMPY[self.dtype]).reshape(self.shape)

    def to_f32(self) -> Array:
        """Give the values as float32 (a view if they are float32 already)."""
        if self.dtype is Dtype.BF16:
            return bf16_to_f32(self.array())
        if self.dtype is Dtype.I8:
            scales = np.frombuffer(self.buffers[0], dtype="<f4").reshape(*self.shape[:-1], -1, 1)
            values = np.frombuffer(self.buffers[1], dtype=np.int8).reshape(*scales.shape[:-1], self.group)
            wide: Array = (values.astype(np.float32) * scales).reshape(self.shape)
            return wide
        plain: Array = self.array().astype(np.float32, copy=False)
        return plain


def bf16_bits(array: Array) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16, nearest even; NaN stays a quiet NaN. Gives uint16 bit patterns of the same shape."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded: npt.NDArray[np.uint16] = (
        (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    ).astype(np.uint16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if nan.any():
        quiet = ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16)
        rounded = np.where(nan, quiet, rounded)
    return rounded


def bf16_to_f32(bits: Array) -> npt.NDArray[np.float32]:
    """Widen bfloat16 bit patterns to float32; exact."""
    wide: npt.NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def _bytes_of(array: Array) -> memoryview:
    """A flat view of the bytes of a contiguous array."""
    return array.data.cast("B")
