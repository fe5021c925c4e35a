"""Codecs: in which form hidden states cross a cut. What a codec costs in quality is measured per model (models.judge).

    as-is        the model's wire dtype: not a bit is changed, since the residual stream takes that dtype anyway
    f16, bf16    half of the bytes of a float32 stream
    int8-group   int8 with a float32 scale for each 32 channels: 9/16 of the bytes of float16
    int8-token   int8 with one float32 scale for each row: half of them, and one large channel drowns all others

A residual stream has a few channels that are a thousand times larger than the rest, so groups matter
(docs/decisions/0012-codecs.md). Both ends of a cut know its codec from their orders. Here are names, rules and sizes;
the numbers are turned in wire.coding.
"""

from __future__ import annotations

from typing import Final, get_args

from wire.messages import CodecName

AS_IS: Final[CodecName] = "as-is"
CODECS: Final[tuple[CodecName, ...]] = get_args(CodecName)

CODEC_VERSION: Final = 1
"""Grows when a codec gives other bytes, and what was measured of it holds no more."""

GROUP_CHANNELS: Final = 32
"""Of int8-group. Hidden sizes are multiples of it. With 64 a row is 5 % shorter and errs by a tenth more."""

SCALE_BYTES: Final = 4
ELEMENT_BYTES: Final = {"f32": 4, "f16": 2, "bf16": 2}


def is_codec_for(codec: CodecName, wire_dtype: str, hidden: int) -> bool:
    """Whether rows of so many channels in this wire dtype can cross a cut so, and are shorter then."""
    if codec == "int8-group":
        return hidden % GROUP_CHANNELS == 0 and hidden > GROUP_CHANNELS
    return codec in (AS_IS, "int8-token") or wire_dtype == "f32"


def codecs_for(wire_dtype: str, hidden: int) -> tuple[CodecName, ...]:
    """The codecs that a model can have at its cuts, as-is first."""
    return tuple(codec for codec in CODECS if is_codec_for(codec, wire_dtype, hidden))


def group_of(codec: CodecName, hidden: int) -> int:
    """How many channels share a scale; 0 where there are no scales."""
    return {"int8-group": GROUP_CHANNELS, "int8-token": hidden}.get(codec, 0)


def payload_bytes(codec: CodecName, wire_dtype: str, hidden: int, rows: int = 1) -> int:
    """Bytes of so many rows as they cross a cut, headers left out."""
    group = group_of(codec, hidden)
    if group:
        return rows * (hidden + hidden // group * SCALE_BYTES)
    return rows * hidden * ELEMENT_BYTES[wire_dtype if codec == AS_IS else codec]
