"""Hidden states into the form in which they cross a cut, and back: the codecs of wire.codecs at work.

What comes in another form than the cut has, or with a scale that is no number, is a MalformedFrame. Sizes follow from
dtype, shape and group, and are checked when a frame is parsed, before anything is allocated for it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np

from wire.codecs import AS_IS, group_of, is_codec_for, payload_bytes
from wire.errors import MalformedFrame
from wire.messages import CodecName
from wire.tensors import Array, Dtype, Tensor, bf16_bits, bf16_to_f32

HIDDEN_DTYPE: Final = {"f32": Dtype.F32, "f16": Dtype.F16, "bf16": Dtype.BF16}

_BEYOND_F16: Final = 65520.0
"""The least number that float16 rounds to infinity."""

_MOST_SCALE: Final = {"f32": 2.6e36, "f16": 65519.0 / 127, "bf16": 2.6e36}
"""So that 127 times the scale, rounded to the wire dtype, is finite."""


class Coder:
    """One codec for one kind of rows: hidden states [n, hidden] in wire dtype (bf16 as bits) to tensors and back."""

    def __init__(self, codec: CodecName, wire_dtype: str, hidden: int) -> None:
        if not is_codec_for(codec, wire_dtype, hidden):
            raise ValueError(f"no codec {codec} for {wire_dtype} rows of {hidden}")
        self.codec = codec
        self._wire_dtype = wire_dtype
        self._hidden = hidden
        self._group = group_of(codec, hidden)
        self._dtype = Dtype.I8 if self._group else HIDDEN_DTYPE[wire_dtype if codec == AS_IS else codec]
        self._row_bytes = payload_bytes(codec, wire_dtype, hidden)

    def unfit(self, rows: Array) -> list[int]:
        """Which rows this codec can't carry, though they are numbers: float32 beyond the range of float16."""
        if self.codec != "f16":
            return []
        return [int(row) for row in np.flatnonzero(np.abs(rows).max(axis=-1) >= _BEYOND_F16)]

    def encode(self, rows: Array) -> Tensor:
        """Rows that are numbers and fit, as they travel; as-is they share memory with what is given."""
        if self._group:
            return Tensor.int8(bf16_to_f32(rows) if self._wire_dtype == "bf16" else rows, self._group)
        if self._dtype is Dtype.BF16:
            return Tensor.bf16(rows if self._wire_dtype == "bf16" else bf16_bits(rows))
        return Tensor.of(rows.astype(np.float16) if self.codec == "f16" else rows)

    def decode(self, tensor: Tensor) -> Array:
        """The rows that a tensor holds, in wire dtype; raise MalformedFrame if it is of another form."""
        shape = tensor.shape
        if tensor.dtype is not self._dtype or tensor.group != self._group or len(shape) != 2:
            raise self._other(tensor)
        if shape[1] != self._hidden:
            raise self._other(tensor)
        if self.codec == AS_IS:
            return tensor.array()
        if self._group:
            scales = np.frombuffer(tensor.buffers[0], dtype="<f4")
            most = _MOST_SCALE[self._wire_dtype]
            if not (scales.min() >= 0 and scales.max() <= most):  # a NaN is neither
                raise MalformedFrame(f"hidden states with a scale that is not in 0 to {most:.3g}")
        return self._narrowed(tensor.to_f32())

    def payload_of(self, row: Array) -> bytes:
        """The bytes of a row [1, hidden] as they travel."""
        return b"".join(self.encode(row).buffers)

    def row_in(self, payload: memoryview) -> memoryview | None:
        """The bytes in wire dtype of the row that a payload holds; None if it holds none."""
        if len(payload) != self._row_bytes:
            return None
        try:
            row = self.decode(Tensor.over(self._dtype, (1, self._hidden), self._group, payload))
        except MalformedFrame:
            return None
        return row.data.cast("B")

    def _narrowed(self, rows: Array) -> Array:
        if self._wire_dtype == "bf16":
            return bf16_bits(rows)
        return rows.astype(np.float16) if self._wire_dtype == "f16" else rows

    def _other(self, tensor: Tensor) -> MalformedFrame:
        found, due = _form(tensor.dtype, tensor.group), _form(self._dtype, self._group)
        return MalformedFrame(f"hidden states as {found} {tensor.shape}, they are {due} [n, {self._hidden}]")


@lru_cache(maxsize=64)
def coder(codec: CodecName, wire_dtype: str, hidden: int) -> Coder:
    """The coder of a cut; raise ValueError for a codec that such a model can't have."""
    return Coder(codec, wire_dtype, hidden)


def _form(dtype: Dtype, group: int) -> str:
    return f"{dtype.name} in groups of {group}" if group else dtype.name
