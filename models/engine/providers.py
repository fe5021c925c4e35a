"""Stages on onnxruntime's providers for NVIDIA GPUs: the standard graph, with keys and values in the GPU's memory.

The fused graph would run its attention on the processor there, for onnxruntime's GPU kernel of it knows half precision
only. Needs an onnxruntime that was built with CUDA (onnxruntime-gpu), which is installed in place of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from models.engine.base import EngineFailed, StageSpec
from models.engine.cuda import CudaMemory
from models.engine.device import Memory
from models.engine.expand import standard_arrays
from models.engine.manifest import StageManifest, load_graph
from models.engine.memory import Weights, made_weights, map_weights
from models.engine.session import ProviderSession, available_providers
from models.engine.standard import StandardStage

CUDA: Final = "CUDAExecutionProvider"

OPTIONS: Final = {"device_id": "0", "arena_extend_strategy": "kSameAsRequested"}
"""The default doubles what is taken each time: on a board that shares its memory that takes what others need."""


def load_stage(
    graph_path: Path,
    weight_paths: Iterable[Path],
    spec: StageSpec,
    provider: str = CUDA,
    open_memory: Callable[[], Memory] = CudaMemory.open,
) -> StandardStage:
    """Load a stage on a provider, in whose memory it is. Raises EngineFailed, CorruptData and Refused."""
    check_offered(provider)
    graph, manifest = load_graph(graph_path, spec, "standard")
    manifest.config.check_context(spec.context_tokens)
    return _start(graph, manifest, map_weights(manifest.weights, weight_paths), spec, provider, open_memory)


def load_synthetic(
    graph_path: Path,
    spec: StageSpec,
    seed: int,
    provider: str = CUDA,
    open_memory: Callable[[], Memory] = CudaMemory.open,
) -> StandardStage:
    """With weights made up here, for measuring."""
    check_offered(provider)
    graph, manifest = load_graph(graph_path, spec, "standard")
    return _start(graph, manifest, made_weights(manifest.weights, graph_path.parent, seed), spec, provider, open_memory)


def check_offered(provider: str) -> None:
    """Raise EngineFailed if the installed onnxruntime was built without a provider."""
    offered = available_providers()
    if provider not in offered:
        raise EngineFailed(f"the installed onnxruntime has no {provider}, but {', '.join(offered)}")


def _start(
    graph: bytes,
    manifest: StageManifest,
    weights: Weights,
    spec: StageSpec,
    provider: str,
    open_memory: Callable[[], Memory],
) -> StandardStage:
    memory = open_memory()
    arrays = {info.name: array for info, array in standard_arrays(manifest, weights.tensors)}
    options = OPTIONS | {"use_tf32": "0" if manifest.precision == "f32" else "1"} if provider == CUDA else {}
    what = f"blocks {manifest.first_block} to {manifest.end_block}"
    session = ProviderSession(graph, arrays, spec.threads, provider, options, memory, what)
    weights.forget_pages()
    return StandardStage(session, manifest, spec)
