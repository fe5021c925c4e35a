"""One block of an encoder that stands at every depth, and its weights in parts: of each shard some attention heads and
columns of the feed-forward layer, and what is not divided.

    shard    q, k, v    rows of its heads, with biases      o     the same of its columns
             up         rows of its columns, with biases    down  the same of its columns
    hub      biases of o and down, both norms, the task module

Inside they have the names of block 0 (models.lora.whole), from which a checkpoint's is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from models.families.bert import BertConfig
from models.lora.whole import shapes_of
from wire.shares import Share

Floats = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, int]]

FIRST = "block.0."
HEADS = ("q", "k", "v")
"""Matrices whose rows are of heads."""


def of_first(shaped: Shapes) -> dict[str, tuple[int, int]]:
    """Of the shapes of all blocks those of the one that is shared."""
    return {name: shape for name, shape in shaped.items() if name.startswith(FIRST)}


def shapes_of_shard(config: BertConfig, share: Share) -> dict[str, tuple[int, int]]:
    """In the order in which they travel. Raises ValueError for a share that such a model has not."""
    if not share.first_head < share.end_head <= config.num_attention_heads:
        raise ValueError(f"heads {share.first_head} to {share.end_head} of {config.num_attention_heads}")
    if not share.first_column < share.end_column <= config.intermediate_size:
        raise ValueError(f"columns {share.first_column} to {share.end_column} of {config.intermediate_size}")
    found = {}
    for name, shape in of_first(shapes_of(config)).items():
        cut = _cut(config, name, share)
        if cut is not None:
            axis, first, end = cut
            found[name] = (end - first, shape[1]) if axis == 0 else (shape[0], end - first)
    return found


def shapes_of_hub(shaped: Shapes) -> dict[str, tuple[int, int]]:
    """Of all that a job trains, what no shard has."""
    return {name: shape for name, shape in shaped.items() if not name.startswith(FIRST) or not _is_divided(name)}


def part_of(config: BertConfig, weights: Mapping[str, Floats], share: Share | None) -> dict[str, Floats]:
    """Of all weights a shard's part, or the hub's."""
    if share is None:
        return {name: weights[name] for name in weights if not name.startswith(FIRST) or not _is_divided(name)}
    found = {}
    for name, values in weights.items():
        cut = _cut(config, name, share)
        if cut is not None:
            axis, first, end = cut
            found[name] = values[first:end] if axis == 0 else values[:, first:end]
    return found


def joined(parts: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
    """All weights again: of the hub, then of the shards in their order."""
    found = dict(parts[0])
    for name in parts[1]:
        found[name] = np.concatenate([part[name] for part in parts[1:]], axis=_axis(name))
    return found


def at_every_depth(config: BertConfig, weights: Mapping[str, Floats]) -> dict[str, Floats]:
    """As the weights of all blocks."""
    return {name: weights[FIRST + name.split(".", 2)[2]] for name in shapes_of(config)}


def _is_divided(name: str) -> bool:
    _, _, matrix, what, *_ = name.split(".")
    return matrix in (*HEADS, "up") or (matrix in ("o", "down") and what == "weight")


def _axis(name: str) -> int:
    """Along which it is divided: biases lie in one row."""
    _, _, matrix, what, *_ = name.split(".")
    return 1 if what == "bias" or matrix in ("o", "down") else 0


def _cut(config: BertConfig, name: str, share: Share) -> tuple[int, int, int] | None:
    """Axis, and the edges there of a share; None for what no shard has."""
    if not name.startswith(FIRST) or not _is_divided(name):
        return None
    if name.split(".")[2] in ("up", "down"):
        return _axis(name), share.first_column, share.end_column
    width = config.hidden_size // config.num_attention_heads
    return _axis(name), share.first_head * width, share.end_head * width
