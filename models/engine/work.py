"""What one module of a stage reads and computes in a step, from the manifest of its graph."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from models.engine.manifest import StageManifest

CODES_PER_BLOCK = 32
"""Of 4 and 8 bit matrices; their last dimension is the bytes of one block (models.build.layout)."""


class Work(NamedTuple):
    weight_bytes: int
    """Read in each step."""
    row_operations: int
    """For each row: a multiplication and an addition for each weight of a matrix. Attention over keys is not in it."""


def work_of(manifest: StageManifest) -> Work:
    """Of one block; or of embedding or head, where there are no blocks."""
    blocks = max(1, manifest.end_block - manifest.first_block)
    entries = 0
    for info in manifest.weights:
        if info.dtype == "u8" and len(info.shape) == 3:
            entries += info.shape[0] * info.shape[1] * CODES_PER_BLOCK
        elif info.dtype == "f32" and len(info.shape) == 2:
            entries += prod(info.shape)
    return Work(sum(info.size_bytes for info in manifest.weights) // blocks, 2 * entries // blocks)
