"""Which tensors each module has at a precision: names, dtypes, shapes. Packer and graph builder both read this.

Names are those of the checkpoint (`models.families.config.tensor_shapes`) with a suffix; q, k and v are stacked into
one matrix 'qkv', since one product of three heights is faster than three. Norms and biases keep their names.

    f32         '<matrix>.weight' float32 [in, out]; embedding and head [vocabulary, hidden]
    int8        '<matrix>.weight' uint8 [out, blocks, 32], '.scales' float32 [out * blocks]
    int4        '<matrix>.weight' uint8 [out, blocks, 16], '.scales' float32 [out * blocks],
                '.zero_points' uint8 [out * ceil(blocks / 2)]
    int4 and int8 keep embedding and head at 8 bit (docs/decisions/0003-quantisation.md).
"""

from __future__ import annotations

from typing import Final, get_args

import msgspec

from models.build.quantise import BLOCK, blocks_in
from models.engine.manifest import Precision, WeightInfo, WireDtype
from models.families.config import LlamaConfig, matrix_size
from wire.errors import UsageError

MATRICES: Final = ("qkv", "o", "gate", "up", "down")


def checked_precision(text: str) -> Precision:
    """Give `text` back if it is a precision; raise UsageError."""
    try:
        return msgspec.convert(text, type=Precision)  # type: ignore[no-any-return]
    except msgspec.ValidationError:
        raise UsageError(f"unknown precision {text!r}", try_=f"one of {', '.join(get_args(Precision))}") from None


def checked_wire_dtype(text: str) -> WireDtype:
    """Give `text` back if hidden states can travel as it; raise UsageError."""
    try:
        return msgspec.convert(text, type=WireDtype)  # type: ignore[no-any-return]
    except msgspec.ValidationError:
        raise UsageError(f"unknown wire dtype {text!r}", try_=f"one of {', '.join(get_args(WireDtype))}") from None


def table_precision(precision: Precision) -> Precision:
    """Give the precision of embedding and head in a model packed at `precision`."""
    return "f32" if precision == "f32" else "int8"


def head_matrix(config: LlamaConfig) -> str:
    """Give the name of the head's matrix: the embedding, where they are tied."""
    return "embedding" if config.tied_embeddings else "head"


def matrix_weights(name: str, out: int, columns: int, precision: Precision) -> tuple[WeightInfo, ...]:
    """Give the tensors of a matrix [out, columns] inside a block."""
    if precision == "f32":
        return (WeightInfo(f"{name}.weight", "f32", (columns, out)),)
    return _quantised(name, out, columns, precision)


def table_weights(name: str, config: LlamaConfig, precision: Precision) -> tuple[WeightInfo, ...]:
    """Give the tensors of the embedding or the head's matrix in a model packed at `precision`."""
    if table_precision(precision) == "f32":
        return (WeightInfo(f"{name}.weight", "f32", (config.vocabulary, config.hidden)),)
    return _quantised(name, config.vocabulary, config.hidden, "int8")


def norm_weights(config: LlamaConfig, prefix: str) -> tuple[WeightInfo, ...]:
    """Give the norms and biases of a block whose names start with `prefix` ('block.3.')."""
    found = [WeightInfo(f"{prefix}{name}", "f32", (config.hidden,)) for name in ("attention_norm", "ffn_norm")]
    if config.qkv_bias:
        found.append(WeightInfo(f"{prefix}qkv_bias", "f32", (matrix_size(config, "qkv")[0],)))
    if config.qk_norm:
        found += [WeightInfo(f"{prefix}{name}", "f32", (config.head_dim,)) for name in ("q_norm", "k_norm")]
    return tuple(found)


def block_weights(config: LlamaConfig, index: int, precision: Precision) -> tuple[WeightInfo, ...]:
    """Give all tensors of one block."""
    prefix = f"block.{index}."
    matrices = (matrix_weights(prefix + name, *matrix_size(config, name), precision) for name in MATRICES)
    return (*norm_weights(config, prefix), *(info for group in matrices for info in group))


def _quantised(name: str, out: int, columns: int, precision: Precision) -> tuple[WeightInfo, ...]:
    blocks = blocks_in(columns)
    bits = 4 if precision == "int4" else 8
    found = [
        WeightInfo(f"{name}.weight", "u8", (out, blocks, BLOCK * bits // 8)),
        WeightInfo(f"{name}.scales", "f32", (out * blocks,)),
    ]
    if bits == 4:
        found.append(WeightInfo(f"{name}.zero_points", "u8", (out * -(-blocks // 2),)))
    return tuple(found)
