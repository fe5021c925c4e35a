"""A stage of an item model on onnxruntime: the tensors of one cut in, those of the next out, nothing kept between."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.engine.base import EngineFailed
from models.engine.manifest import MAX_GRAPH_BYTES
from models.engine.memory import Weights, made_weights, map_weights
from models.engine.session import Session, value
from models.items.manifest import (
    DTYPES,
    ItemManifest,
    bundle,
    bundle_bytes,
    check_size,
    read_item_manifest,
    views,
)
from wire.errors import MalformedFrame

Bytes = npt.NDArray[np.uint8]


class ItemStage:
    """Not thread-safe: one worker thread owns it."""

    def __init__(self, session: Session, manifest: ItemManifest, weights: Weights) -> None:
        self.manifest = manifest
        self._session = session
        self._weights = weights
        ours = {port.name for port in manifest.inputs}
        self._made = [port.name for port in manifest.outputs if port.name not in ours]
        self._passed = [port.name for port in manifest.outputs if port.name in ours]

    @classmethod
    def load(cls, graph_path: Path, weight_paths: Iterable[Path], threads: int) -> ItemStage:
        """Load a graph and the files that hold its weights. Raises EngineFailed, CorruptData (a damaged file)."""
        graph, manifest = _graph(graph_path)
        return cls._start(graph, manifest, map_weights(manifest.weights, weight_paths), threads, graph_path.name)

    @classmethod
    def of(cls, graph: bytes, weight_paths: Iterable[Path], threads: int, what: str) -> ItemStage:
        """Of a graph that is here. Raises as `load`."""
        manifest = read_item_manifest(graph, what)
        return cls._start(graph, manifest, map_weights(manifest.weights, weight_paths), threads, what)

    @classmethod
    def load_synthetic(cls, graph_path: Path, threads: int, seed: int) -> ItemStage:
        """Load a graph with weights made up here, for measuring: time does not depend on their values."""
        graph, manifest = _graph(graph_path)
        weights = made_weights(manifest.weights, graph_path.parent, seed)
        return cls._start(graph, manifest, weights, threads, graph_path.name)

    @classmethod
    def _start(cls, graph: bytes, manifest: ItemManifest, weights: Weights, threads: int, what: str) -> ItemStage:
        session = Session(graph, weights.tensors, threads, what, together=False, kept=not manifest.has_rows)
        weights.forget_pages()
        return cls(session, manifest, weights)

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def held_bytes(self) -> int:
        """Weights; what an item needs meanwhile is onnxruntime's own."""
        return self._weights.size_bytes

    def problem_with(self, size_bytes: int, rows: int) -> str:
        """Why what came can't be an item of so many rows; '' if it can. Nothing is allocated for it."""
        manifest = self.manifest
        if not 1 <= rows <= manifest.most_rows:
            return f"{rows} rows, the model takes 1 to {manifest.most_rows}"
        wanted = bundle_bytes(manifest.inputs, rows)
        if size_bytes != wanted:
            return f"{size_bytes} bytes came for an item of {rows} rows, {wanted} are due"
        try:
            check_size(manifest.outputs, rows, "what the stage gives")
        except MalformedFrame as error:
            return error.message
        return ""

    def run(self, given: Bytes, rows: int) -> Bytes:
        """Give what crosses the next cut. What was given must have no `problem_with`. Raises EngineFailed."""
        manifest = self.manifest
        inputs = views(manifest.inputs, rows, given)
        result = np.empty(bundle_bytes(manifest.outputs, rows), np.uint8)
        outputs = views(manifest.outputs, rows, result)
        if self._made:
            binding = self._session.binding()
            for name in manifest.fed:
                binding.bind_ortvalue_input(name, value(inputs[name]))
            for name in self._made:
                binding.bind_ortvalue_output(name, value(outputs[name]))
            self._session.run(binding)
        for name in self._passed:
            outputs[name][...] = inputs[name]
        return result

    def sample(self, rows: int) -> Bytes:
        """An item of so many rows, made up: numbers of unit size, ones where they count something."""
        generator = np.random.default_rng(1)
        made = {
            port.name: generator.standard_normal(port.dims(rows)).astype(DTYPES[port.dtype])
            if port.dtype in ("f32", "f16")
            else np.ones(port.dims(rows), DTYPES[port.dtype])
            for port in self.manifest.inputs
        }
        return bundle(self.manifest.inputs, rows, made)


def _graph(path: Path) -> tuple[bytes, ItemManifest]:
    try:
        if path.stat().st_size > MAX_GRAPH_BYTES:
            raise EngineFailed(f"{path}: {path.stat().st_size} bytes are too many for a graph without weights")
        graph = path.read_bytes()
    except OSError as error:
        raise EngineFailed(f"{path}: {error.strerror}") from error
    return graph, read_item_manifest(graph, path.name)
