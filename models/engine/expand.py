"""Weights as a graph of standard operators wants them: matrices of floating point numbers, from packed ones.

TensorRT reads no 4 bit weights with zero points of their own, so codes are expanded when a stage is loaded: to
float16, or to float32 where the model was packed at float32. Tables are [vocabulary, hidden], matrices of blocks
[in, out], norms float32, biases of the type of the products that they are added to.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from models.build.layout import MATRICES, head_matrix, table_precision
from models.build.quantise import Quantised, blocks_in, dequantise
from models.engine.base import Array
from models.engine.manifest import Precision, StageManifest, WeightInfo
from models.families.config import matrix_size

Floats = npt.NDArray[np.float32]
Compute = Literal["f32", "f16"]
"""What products are made in."""

FILE_ALIGNMENT_BYTES: Final = 4096
"""Between weights in a file: pages, so that a reader may map each."""

_LARGEST: Final = float(np.finfo(np.float16).max)


def compute_of(precision: Precision) -> Compute:
    return "f32" if precision == "f32" else "f16"


def standard_weights(manifest: StageManifest) -> tuple[WeightInfo, ...]:
    """The initialisers of the standard graph of a stage, in the order in which `expanded` gives them."""
    config, compute = manifest.config, compute_of(manifest.precision)
    found = []
    for name, matrix, _ in _matrices(manifest):
        out, columns = matrix_size(config, matrix)
        found.append(WeightInfo(name, compute, (columns, out) if matrix in MATRICES else (out, columns)))
    for info in manifest.weights:
        if info.name.endswith("norm"):
            found.append(info)
        elif info.name.endswith("bias"):
            found.append(WeightInfo(info.name, compute, info.shape))
    return tuple(found)


def offsets_bytes(weights: tuple[WeightInfo, ...]) -> tuple[int, ...]:
    """Where each of them begins in a file of all."""
    offsets, end = [], 0
    for info in weights:
        offsets.append(end)
        end = -(-(end + info.size_bytes) // FILE_ALIGNMENT_BYTES) * FILE_ALIGNMENT_BYTES
    return tuple(offsets)


def standard_arrays(manifest: StageManifest, stored: Mapping[str, Array]) -> Iterator[tuple[WeightInfo, Array]]:
    """The initialisers by name, one in memory at a time. What is beyond float16 becomes its largest number."""
    floats = expanded(manifest, stored)
    for info, (name, values) in zip(standard_weights(manifest), floats, strict=True):
        assert info.name == name and info.shape == values.shape, "one order, one shape"
        if info.dtype == "f16":
            yield info, np.clip(values, -_LARGEST, _LARGEST).astype(np.float16, order="C")
        else:
            yield info, np.ascontiguousarray(values)


def expanded(manifest: StageManifest, stored: Mapping[str, Array]) -> Iterator[tuple[str, Floats]]:
    """A stage's weights in float32 by name ('block.3.qkv', 'embedding', 'final_norm'); matrices of blocks [in, out]."""
    config = manifest.config
    for name, matrix, precision in _matrices(manifest):
        out, columns = matrix_size(config, matrix)
        weight = stored[f"{name}.weight"]
        if precision == "f32":
            yield name, np.array(weight, np.float32)
            continue
        zeros = stored.get(f"{name}.zero_points")
        codes = Quantised(
            data=weight.astype(np.uint8, copy=False),
            scales=stored[f"{name}.scales"].astype(np.float32, copy=False).reshape(out, blocks_in(columns)),
            zero_points=None if zeros is None else zeros.astype(np.uint8, copy=False).reshape(out, -1),
        )
        floats = dequantise(codes, columns)
        yield name, np.array(floats.T if matrix in MATRICES else floats, np.float32)
    for info in manifest.weights:
        if info.name.endswith(("norm", "bias")):
            yield info.name, np.array(stored[info.name], np.float32)


def _matrices(manifest: StageManifest) -> Iterator[tuple[str, str, Precision]]:
    """Name, which of `matrix_size`, and precision of all matrices; a tied table once."""
    tables = (["embedding"] if manifest.embedding else []) + ([head_matrix(manifest.config)] if manifest.head else [])
    for table in dict.fromkeys(tables):
        yield table, table, table_precision(manifest.precision)
    for index in manifest.blocks:
        for matrix in MATRICES:
            yield f"block.{index}.{matrix}", matrix, manifest.precision
