"""All weights of an encoder's blocks, where they are trained themselves and not factors beside them.

Inside, 'block.3.q.weight.w' [out, in] and 'block.3.q.bias.w' [1, out] are of a matrix, 'block.3.norm0.weight.w' and
'block.3.norm0.bias.w' [1, hidden] of a norm: part 'w' of what a job trains. In a file they have Hugging Face's names.
Embeddings stay as they are: they are on the boards with data, wherever the blocks are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.families.bert import BertConfig, matrix_sizes
from models.formats.bert import BLOCK_NORMS, MATRICES, BertFile, matrix_name

Floats = npt.NDArray[np.float32]


class Trained(NamedTuple):
    """A tensor that is trained: its name in a checkpoint, without a prefix, and its shape there."""

    file_name: str
    shape: tuple[int, ...]


def tensors_of(config: BertConfig) -> Iterator[tuple[str, Trained]]:
    """Inside name, and what it is of; blocks in order."""
    width = config.hidden_size
    for block in range(config.blocks):
        for matrix in MATRICES:
            out, columns = matrix_sizes(config)[matrix]
            long = matrix_name(block, matrix)
            yield f"block.{block}.{matrix}.weight.w", Trained(f"{long}.weight", (out, columns))
            yield f"block.{block}.{matrix}.bias.w", Trained(f"{long}.bias", (out,))
        for number, norm in enumerate(BLOCK_NORMS):
            for what in ("weight", "bias"):
                long = f"encoder.layer.{block}.{norm}.{what}"
                yield f"block.{block}.norm{number}.{what}.w", Trained(long, (width,))


def shapes_of(config: BertConfig) -> dict[str, tuple[int, int]]:
    """As they travel: all of two dimensions."""
    return {name: _flat(tensor.shape) for name, tensor in tensors_of(config)}


def weights_of(file: BertFile) -> dict[str, Floats]:
    """As they are in a checkpoint; raises CorruptData."""
    return {
        name: np.array(file.tensor(tensor.file_name, *tensor.shape), np.float32).reshape(_flat(tensor.shape))
        for name, tensor in tensors_of(file.config)
    }


def to_file(config: BertConfig, weights: Mapping[str, Floats]) -> dict[str, Floats]:
    """By the names of a checkpoint, in its shapes."""
    return {tensor.file_name: weights[name].reshape(tensor.shape) for name, tensor in tensors_of(config)}


def _flat(shape: tuple[int, ...]) -> tuple[int, int]:
    return (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
