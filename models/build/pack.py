"""A checkpoint becomes one file of weights per module, quantised, named by content, kept in a cache.

A device fetches the files of its own modules and nothing else. Packing again finds the files; the index is written
last, so a pack that was cut off is made again. Weights don't depend on the wire dtype, so it is not part of the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from models.build.layout import (
    MATRICES,
    block_weights,
    checked_precision,
    checked_wire_dtype,
    head_matrix,
    table_precision,
    table_weights,
)
from models.build.quantise import quantise_4bit, quantise_8bit
from models.engine.manifest import Adapters, Precision, WeightInfo
from models.families.config import LlamaConfig
from models.families.llama import build_graph, module_names
from models.formats import safetensors
from models.formats.contents import Checkpoint
from models.graph import Graph
from models.packed import PackedFile, finish, known_files, write_file

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""

PACK_VERSION: Final = 1
"""Grows when the same checkpoint would give other bytes."""

_FINAL_NORM: Final = "final_norm"


class Packed(Struct, frozen=True, kw_only=True):
    """A model ready to be handed out: its graph, and where each artifact lies (digest -> file)."""

    graph: Graph
    files: dict[str, Path]
    config: LlamaConfig
    adapters: Adapters | None = None


def pack(
    checkpoint: Checkpoint, precision: str, wire_dtype: str, cache_dir: Path, progress: Progress | None = None
) -> Packed:
    """Give the packed model, from `cache_dir` if it is there.

    `precision` is 'f32', 'int8' or 'int4', `wire_dtype` 'f32', 'f16' or 'bf16'; others raise UsageError. Raises what
    the checkpoint raises when it is damaged, and OSError when the cache can't be written. Holds one module in memory.
    """
    packed_as, wire = checked_precision(precision), checked_wire_dtype(wire_dtype)
    config = checkpoint.config
    folder = cache_dir / "packs" / f"{checkpoint.digest.removeprefix('sha256:')[:32]}-{packed_as}-v{PACK_VERSION}"
    files = known_files(folder, _file_names(config))
    if files is None:
        files = _write(checkpoint, packed_as, folder, progress)
    digests = {file.name: file.digest for file in files}
    graph = build_graph(checkpoint.name, config, packed_as, wire, _artifacts(config, digests))
    return Packed(graph=graph, files={file.digest: file.path(folder) for file in files}, config=config)


def module_tensors(checkpoint: Checkpoint, name: str, precision: Precision) -> dict[str, Array]:
    """Give the packed tensors of one file of a pack, in the layout of `models.build.layout`."""
    config = checkpoint.config
    if name == _FINAL_NORM:
        return {name: checkpoint.tensor(name)}
    if name in ("embedding", "head"):
        return _matrix(name, checkpoint.tensor(name), table_precision(precision))
    tensors: dict[str, Array] = {}
    for matrix in MATRICES:
        weight = _stacked(checkpoint, name, "qkv") if matrix == "qkv" else checkpoint.tensor(f"{name}.{matrix}")
        for part, tensor in _matrix(f"{name}.{matrix}", weight, precision).items():
            # onnxruntime multiplies from the left; embedding and head stay [vocabulary, hidden] (rows are looked up).
            tensors[part] = np.ascontiguousarray(tensor.T) if precision == "f32" else tensor
    for norm in ("attention_norm", "ffn_norm", *(("q_norm", "k_norm") if config.qk_norm else ())):
        tensors[f"{name}.{norm}"] = checkpoint.tensor(f"{name}.{norm}")
    if config.qkv_bias:
        tensors[f"{name}.qkv_bias"] = np.concatenate([checkpoint.tensor(f"{name}.{part}_bias") for part in "qkv"])
    return tensors


def _stacked(checkpoint: Checkpoint, block: str, letters: str) -> Floats:
    return np.concatenate([checkpoint.tensor(f"{block}.{letter}") for letter in letters])


def _matrix(name: str, weight: Floats, precision: Precision) -> dict[str, Array]:
    if precision == "f32":
        return {f"{name}.weight": np.ascontiguousarray(weight, dtype=np.float32)}
    quantised = quantise_4bit(weight) if precision == "int4" else quantise_8bit(weight)
    tensors: dict[str, Array] = {f"{name}.weight": quantised.data, f"{name}.scales": quantised.scales.reshape(-1)}
    if quantised.zero_points is not None:
        tensors[f"{name}.zero_points"] = quantised.zero_points.reshape(-1)
    return tensors


def _file_names(config: LlamaConfig) -> tuple[str, ...]:
    """Tied models have no file 'head': the head reads that of the embedding."""
    names = module_names(config)
    return (*(names[:-1] if config.tied_embeddings else names), _FINAL_NORM)


def _artifacts(config: LlamaConfig, digests: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    of_modules = {name: (digests[name],) for name in module_names(config)[:-1]}
    return of_modules | {"head": (digests[head_matrix(config)], digests[_FINAL_NORM])}


def _write(checkpoint: Checkpoint, precision: Precision, folder: Path, progress: Progress | None) -> list[PackedFile]:
    names = _file_names(checkpoint.config)
    files: list[PackedFile] = []
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names))
        tensors = module_tensors(checkpoint, name, precision)
        _check(name, tensors, _expected(checkpoint.config, name, precision))
        content = safetensors.to_bytes(tensors)
        files.append(write_file(folder, name, content))
    finish(folder, files)
    if progress is not None:
        progress(len(names), len(names))
    return files


def _expected(config: LlamaConfig, name: str, precision: Precision) -> tuple[WeightInfo, ...]:
    if name == _FINAL_NORM:
        return (WeightInfo(_FINAL_NORM, "f32", (config.hidden,)),)
    if name in ("embedding", "head"):
        return table_weights(name, config, precision)
    return block_weights(config, int(name.removeprefix("block.")), precision)


def _check(name: str, tensors: Mapping[str, Array], expected: Sequence[WeightInfo]) -> None:
    """Packer and graph builder must agree on every tensor: a difference is a defect of ours, found here."""
    made = {part: (str(tensor.dtype), tensor.shape) for part, tensor in tensors.items()}
    declared = {info.name: ("float32" if info.dtype == "f32" else "uint8", info.shape) for info in expected}
    if made != declared:
        raise AssertionError(f"{name}: packed {made}, declared {declared}")
