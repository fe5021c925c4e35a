"""Loading a stage on one of the engines (models.engine.names), or on the next one that works."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from models.engine.base import EngineFailed, StageEngine, StageSpec
from models.engine.names import FALLBACKS
from wire.messages import EngineName


class StageFiles(NamedTuple):
    """What a stage is loaded from. `standard`: the same stage in standard operators, if there is such a graph."""

    graph: Path
    standard: Path | None
    weights: tuple[Path, ...]
    built: Path
    """Folder in which engines that were built here are kept."""


class Chosen(NamedTuple):
    """An engine that was loaded, and why it is not the one that was asked for; '' if it is."""

    engine: StageEngine
    name: EngineName
    fell_back: str


def first_that_works(
    wanted: EngineName,
    load: Callable[[EngineName], StageEngine],
    crashed: Mapping[str, str],
    trying: Callable[[EngineName], None] = lambda _: None,
) -> Chosen:
    """Load on the engine that is wanted, or on the first of its fallbacks that works.

    `load` loads and tries a stage; EngineFailed goes on to the next engine, everything else (damaged files, no memory,
    a model that can't be run) passes through, as does the last engine's failure, behind the others' reasons. `crashed`:
    engines that took their process along when they were tried, and how.
    """
    failures: list[str] = []
    try_ = ""
    for name in (wanted, *FALLBACKS[wanted]):
        if name in crashed:
            failures.append(f"{name}: {crashed[name]}")
            continue
        trying(name)
        try:
            return Chosen(load(name), name, "; ".join(failures))
        except EngineFailed as error:
            failures.append(f"{name}: {error}" if FALLBACKS[wanted] else str(error))
            try_ = error.try_
        gc.collect()  # what was half loaded holds memory that the next one needs
    raise EngineFailed("; ".join(failures), try_=try_)


def load_on(
    name: EngineName, files: StageFiles, spec: StageSpec, say: Callable[[str], None] = lambda _: None
) -> StageEngine:
    """Load a stage on one engine; `say` hears what takes long. Raises EngineFailed, CorruptData, Refused."""
    if name == "tensorrt":
        from models.engine.built import BuiltEngines
        from models.engine.cuda import CudaMemory
        from models.engine.tensorrt import load_stage

        return load_stage(_standard(files), files.weights, spec, BuiltEngines(files.built), CudaMemory.open, say)
    if name == "onnxruntime-cuda":
        from models.engine.providers import load_stage as load_provider_stage

        return load_provider_stage(_standard(files), files.weights, spec)
    if name == "onnxruntime":
        from models.engine.onnx import OnnxStage

        return OnnxStage.load(files.graph, files.weights, spec)
    stage: StageEngine = _torch_stage().load(files.graph, files.weights, spec, _torch_device(name))
    return stage


def start(name: EngineName) -> None:
    """Load what an engine needs for whatever stage, so that its memory is not taken for a stage's. Raises EngineFailed
    if it can't be used here."""
    if name == "tensorrt":
        from models.engine.cuda import CudaMemory
        from models.engine.tensorrt import import_tensorrt

        import_tensorrt()
        CudaMemory.open()
    elif name == "onnxruntime-cuda":
        from models.engine.cuda import CudaMemory
        from models.engine.providers import CUDA, check_offered

        check_offered(CUDA)
        CudaMemory.open()
    elif name == "onnxruntime":
        import models.engine.onnx  # noqa: F401
    else:
        _torch_stage()


def load_synthetic_on(name: EngineName, files: StageFiles, spec: StageSpec, seed: int) -> StageEngine:
    """Load a stage with made-up weights, for measuring. Raises EngineFailed."""
    if name == "tensorrt":
        from models.engine.built import BuiltEngines
        from models.engine.cuda import CudaMemory
        from models.engine.tensorrt import load_synthetic

        return load_synthetic(_standard(files), spec, seed, BuiltEngines(files.built), CudaMemory.open)
    if name == "onnxruntime-cuda":
        from models.engine.providers import load_synthetic as load_provider_synthetic

        return load_provider_synthetic(_standard(files), spec, seed)
    if name == "onnxruntime":
        from models.engine.onnx import OnnxStage

        return OnnxStage.load_synthetic(files.graph, spec, seed)
    stage: StageEngine = _torch_stage().load_synthetic(files.graph, spec, seed, _torch_device(name))
    return stage


def _standard(files: StageFiles) -> Path:
    if files.standard is None:
        raise EngineFailed("the order has no graph of standard operators", try_="the same edgelam version everywhere")
    return files.standard


def _torch_device(name: EngineName) -> str:
    return "cuda" if name == "torch-cuda" else "cpu"


def _torch_stage() -> Any:
    try:
        from models.engine.torch import TorchStage
    except (ImportError, OSError) as error:
        raise EngineFailed(f"torch can't be imported: {error}") from error
    return TorchStage
