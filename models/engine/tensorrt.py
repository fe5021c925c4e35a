"""Stages on TensorRT: built on the board from the stage's standard graph, kept there, and run through `StandardStage`.

TensorRT comes with the system (on a Jetson as JetPack's python3-libnvinfer), never from us: it is imported if it is
there. The network is strongly typed, so that norms, softmax and sums are float32 where the graph says so. Written
against the interface of TensorRT 10; whatever it refuses is an EngineFailed with its own words, and the stage goes on
on the next engine.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from models.engine.base import EngineFailed, StageSpec
from models.engine.built import BuiltEngines, BuiltFrom
from models.engine.device import At, Limits, Memory
from models.engine.expand import offsets_bytes, standard_arrays, standard_weights
from models.engine.manifest import WEIGHTS_LOCATION, StageManifest, load_graph
from models.engine.memory import Weights, made_weights, map_weights
from models.engine.shapes import Range, Way, inputs_of, ways_of
from models.engine.standard import StandardStage, limits_of

LOG = logging.getLogger("edgelam.tensorrt")

OLDEST: Final = 10
"""Major version: earlier ones have another interface, and no strongly typed networks that we know of to work."""

WORKSPACE_SHARE: Final = 0.5
"""Of the memory that is free on the device, for kernels that are tried while building: a Jetson has no other."""

MAX_SAID_LETTERS: Final = 400


class GpuMemory(Memory, Protocol):
    """models.engine.cuda.CudaMemory, as far as it is needed."""

    @property
    def stream(self) -> int: ...

    @property
    def device_name(self) -> str: ...

    @property
    def free_bytes(self) -> int: ...


def import_tensorrt() -> Any:
    """The module; raises EngineFailed if it is not there, can't be loaded, or is too old."""
    try:
        module = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        raise EngineFailed(f"tensorrt can't be imported: {error}") from error
    major = str(module.__version__).partition(".")[0]
    if not major.isdigit() or int(major) < OLDEST:
        raise EngineFailed(f"tensorrt {module.__version__} is too old, {OLDEST} is needed")
    return module


def load_stage(
    graph_path: Path,
    weight_paths: Sequence[Path],
    spec: StageSpec,
    built: BuiltEngines,
    open_memory: Callable[[], GpuMemory],
    say: Callable[[str], None] = lambda _: None,
) -> StandardStage:
    """Load a stage, building its engine where none is kept; `say` hears that this takes its time.

    Raises EngineFailed, CorruptData and Refused like OnnxStage.load.
    """
    trt = import_tensorrt()
    graph, manifest = load_graph(graph_path, spec, "standard")
    manifest.config.check_context(spec.context_tokens)
    return start(
        trt, graph, manifest, map_weights(manifest.weights, weight_paths), weight_paths, spec, built, open_memory(), say
    )


def load_synthetic(
    graph_path: Path, spec: StageSpec, seed: int, built: BuiltEngines, open_memory: Callable[[], GpuMemory]
) -> StandardStage:
    """With weights made up here, for measuring."""
    trt = import_tensorrt()
    graph, manifest = load_graph(graph_path, spec, "standard")
    weights = made_weights(manifest.weights, graph_path.parent, seed)
    return start(trt, graph, manifest, weights, [Path(f"made-up-{seed}")], spec, built, open_memory(), lambda _: None)


def start(
    trt: Any,
    graph: bytes,
    manifest: StageManifest,
    weights: Weights,
    sources: Sequence[Path],
    spec: StageSpec,
    built: BuiltEngines,
    memory: GpuMemory,
    say: Callable[[str], None],
) -> StandardStage:
    """As `load_stage`, with all that it reads. `sources`: files named by their content, as a board's store has them."""
    limits = limits_of(spec)
    ways = ways_of(limits)
    logger = _logger(trt)
    of = BuiltFrom(
        board=memory.device_name,
        builder=f"tensorrt {trt.__version__}",
        graph=hashlib.sha256(graph).hexdigest(),
        weights=tuple(sorted(path.name for path in sources)),
        shapes=repr((limits, ways)),
    )
    runtime = trt.Runtime(logger)
    plan = built.get(of)
    engine = _loaded(runtime, logger, plan)
    if plan is None or engine is None:
        with built.turn(say):
            # Whoever had the turn before may have built the same.
            plan = built.get(of)
            engine = _loaded(runtime, logger, plan)
            if plan is None or engine is None:
                say(f"builds an engine with tensorrt {trt.__version__}: this takes minutes, once")
                with built.workshop() as folder:
                    plan = build(trt, logger, graph, manifest, weights, limits, ways, memory.free_bytes, folder)
                engine = _loaded(runtime, logger, plan)
                if engine is None:
                    raise EngineFailed(f"tensorrt {trt.__version__} can't load what it built{logger.said()}")
                built.put(of, plan)
    weights.forget_pages()
    name = f"tensorrt {trt.__version__} on {memory.device_name}"
    return StandardStage(_Contexts(name, (runtime, logger), engine, len(plan), ways, memory), manifest, spec)


def build(
    trt: Any,
    logger: Any,
    graph: bytes,
    manifest: StageManifest,
    weights: Weights,
    limits: Limits,
    ways: Sequence[Way],
    free_bytes: int,
    folder: Path,
) -> bytes:
    """Give the serialised engine of a graph, with files in a folder. Raises EngineFailed with what TensorRT says."""
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    try:
        _write_weights(folder / WEIGHTS_LOCATION, manifest, weights)
        (folder / "stage.onnx").write_bytes(graph)
    except OSError as error:
        raise EngineFailed(f"no room to build in {folder}: {error.strerror}") from error
    if not parser.parse_from_file(str(folder / "stage.onnx")):
        said = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
        raise EngineFailed(f"tensorrt {trt.__version__} can't read the graph: {said[:MAX_SAID_LETTERS]}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(free_bytes * WORKSPACE_SHARE))
    if manifest.precision == "f32":
        config.clear_flag(trt.BuilderFlag.TF32)
    for way in ways:
        profile = builder.create_optimization_profile()
        for name, shapes in inputs_of(manifest, limits, way).items():
            _set_shape(profile, name, shapes)
        if config.add_optimization_profile(profile) < 0:
            raise EngineFailed(f"tensorrt {trt.__version__} refuses the shapes of {way}{logger.said()}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineFailed(f"tensorrt {trt.__version__} can't build the stage{logger.said()}")
    return bytes(plan)


class _Contexts:
    """An engine and a context for each way to run it: see models.engine.device.Executor."""

    def __init__(
        self, name: str, owners: tuple[Any, Any], engine: Any, plan_bytes: int, ways: Sequence[Way], memory: GpuMemory
    ) -> None:
        """`owners`: runtime and logger, which must live as long as the engine."""
        self.memory: Memory = memory
        self.name = name
        self._owners = owners
        self._logger = owners[1]
        self._engine = engine
        self._plan_bytes = plan_bytes
        self._stream = memory.stream
        if engine.num_optimization_profiles != len(ways):
            raise EngineFailed(f"an engine for {engine.num_optimization_profiles} ways to run it, not {len(ways)}")
        self._ways = [(way, self._context(index), _Set()) for index, way in enumerate(ways)]
        memory.wait()

    @property
    def held_bytes(self) -> int:
        """Weights as they lie in the engine's file, and what each context computes in."""
        scratch = getattr(self._engine, "device_memory_size_v2", 0) or getattr(self._engine, "device_memory_size", 0)
        return int(scratch) * len(self._ways) + self._plan_bytes

    def run(self, given: Mapping[str, At], results: Mapping[str, At]) -> None:
        first = given["tokens"] if "tokens" in given else given["hidden"]
        logits = given["logits_rows"].shape[0] if "logits_rows" in given else 1
        requests, rows = first.shape[:2]
        found = [found for found in self._ways if found[0].fits(requests, rows, logits)]
        if not found:
            raise EngineFailed(f"{self.name}: built for no step of {requests} x {rows} rows and {logits} of logits")
        _, context, known = found[0]
        for name, at in given.items():
            if known.shapes.get(name) != at.shape:
                self._check(context.set_input_shape(name, at.shape), f"refuses {name} {list(at.shape)}")
                known.shapes[name] = at.shape
        for name, at in (*given.items(), *results.items()):
            if known.addresses.get(name) != at.address:
                self._check(context.set_tensor_address(name, at.address), f"refuses the address of {name}")
                known.addresses[name] = at.address
        self._check(context.execute_async_v3(self._stream), "failed")

    def _context(self, way: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineFailed(f"{self.name}: no memory to run in{self._logger.said()}")
        self._check(context.set_optimization_profile_async(way, self._stream), f"refuses way {way}")
        return context

    def _check(self, fine: bool, what: str) -> None:
        if not fine:
            raise EngineFailed(f"{self.name}: {what}{self._logger.said()}")


class _Set:
    """What a context was told: telling it again costs time."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}


def _loaded(runtime: Any, logger: Any, plan: bytes | None) -> Any:
    """The engine; None if there is none, or TensorRT does not take it."""
    if plan is None:
        return None
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        LOG.warning("tensorrt does not take the kept engine%s", logger.said())
    return engine


def _write_weights(path: Path, manifest: StageManifest, weights: Weights) -> None:
    """Lay the weights where the graph says that they are in a file."""
    places = dict(zip(standard_weights(manifest), offsets_bytes(standard_weights(manifest)), strict=True))
    with path.open("wb") as stream:
        for info, array in standard_arrays(manifest, weights.tensors):
            stream.seek(places[info])
            stream.write(array.data)


def _set_shape(profile: Any, name: str, shapes: Range) -> None:
    try:
        profile.set_shape(name, *shapes)
    except ValueError as error:
        raise EngineFailed(f"tensorrt refuses the shapes {shapes} of {name}: {error}") from error


def _logger(trt: Any) -> Any:
    """TensorRT's own logger writes to the standard output, which belongs to the supervisor."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self._last = message[:MAX_SAID_LETTERS]
                LOG.error("%s", message)
            elif severity == trt.ILogger.Severity.WARNING:
                LOG.info("%s", message)

        def said(self) -> str:
            """The last error, to be put behind another sentence."""
            return f": {self._last}" if self._last else ""

    return Logger()
