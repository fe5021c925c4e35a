"""TensorRT's Python interface as its documentation has it, computing with onnxruntime in this machine's memory.

It refuses what TensorRT refuses: operators outside ONNX, inputs without shapes, shapes outside of the profile,
addresses that are not aligned, engines of another version. `faults` names what shall go wrong. An engine it builds
holds the whole model with its weights, so what is read back from a file is what was written there.
"""

from __future__ import annotations

import ctypes
import types
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime

from models.engine.device import ALIGNMENT_BYTES, HostMemory

STREAM = 4711
TYPES = {1: np.float32, 10: np.float16, 6: np.int32, 7: np.int64}


class GpuLikeMemory(HostMemory):
    """This machine's memory under the names of a GPU's."""

    stream = STREAM
    free_bytes = 1 << 30

    def __init__(self, device_name: str = "Fake, compute capability 8.7, 8 multiprocessors") -> None:
        super().__init__()
        self.device_name = device_name


def fake_tensorrt(version: str = "10.3.0", faults: tuple[str, ...] = ()) -> Any:
    """A module to be put into sys.modules; `module.builds` counts."""
    module: Any = types.ModuleType("tensorrt")
    module.__version__ = version
    module.builds = 0
    module.log = []

    class Severity:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        pass

    ILogger.Severity = Severity  # type: ignore[attr-defined]

    class Network:
        model: Any = None

    class ParserError:
        def desc(self) -> str:
            return "no importer registered for op"

    class OnnxParser:
        num_errors = 1

        def __init__(self, network: Any, logger: Any) -> None:
            self._network = network

        def parse_from_file(self, path: str) -> bool:
            model = onnx.load(path)  # with the weights, from the file beside it
            unknown = [node.op_type for node in model.graph.node if node.domain]
            if unknown or "parse" in faults:
                return False
            self._network.model = model
            assert Path(path).is_absolute()
            return True

        def get_error(self, index: int) -> ParserError:
            return ParserError()

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
            if not all(1 <= a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
                raise ValueError(f"{name}: {least} {usual} {most}")
            self.shapes[name] = (tuple(least), tuple(usual), tuple(most))

    class Config:
        def __init__(self) -> None:
            self.profiles: list[Profile] = []
            self.cleared: list[str] = []

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            assert pool == "workspace" and size > 0

        def clear_flag(self, flag: str) -> None:
            self.cleared.append(flag)

        def add_optimization_profile(self, profile: Profile) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

    class Builder:
        def __init__(self, logger: Any) -> None:
            assert isinstance(logger, ILogger), "the own one would write to the standard output"
            self._logger = logger

        def create_network(self, flags: int) -> Network:
            assert flags == 1 << 1, "strongly typed"
            return Network()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Network, config: Config) -> Any:
            module.builds += 1
            module.last_config = config
            if "build" in faults:
                self._logger.log(Severity.ERROR, "out of memory while trying kernels")
                return None
            for profile in config.profiles:
                for given in network.model.graph.input:
                    dims = [dim.dim_value or -1 for dim in given.type.tensor_type.shape.dim]
                    for wanted in profile.shapes[given.name]:
                        assert all(a in (-1, b) for a, b in zip(dims, wanted, strict=True)), given.name
                assert len(profile.shapes) == len(network.model.graph.input)
            shapes = [profile.shapes for profile in config.profiles]
            return msgspec.msgpack.encode((version, network.model.SerializeToString(), shapes))

    class Engine:
        def __init__(self, model: bytes, profiles: list[dict[str, Any]]) -> None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            self.profiles = profiles
            self.num_optimization_profiles = len(profiles)
            self.device_memory_size_v2 = 4096
            graph = onnx.load_from_string(model).graph
            self.types = {one.name: one.type.tensor_type.elem_type for one in (*graph.input, *graph.output)}

        def create_execution_context(self) -> Context | None:
            return None if "context" in faults else Context(self)

    class Context:
        def __init__(self, engine: Engine) -> None:
            self._engine = engine
            self._profile: dict[str, Any] = {}
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            assert stream == STREAM
            self._profile = self._engine.profiles[index]
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            least, _, most = self._profile[name]
            if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
                return False
            self._shapes[name] = shape
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            self._addresses[name] = address
            return address % ALIGNMENT_BYTES == 0 and name in self._engine.types

        def execute_async_v3(self, stream: int) -> bool:
            assert stream == STREAM
            if "run" in faults:
                return False
            session = self._engine.session
            given = {one.name: self._array(one.name, self._shapes[one.name]) for one in session.get_inputs()}
            names = [one.name for one in session.get_outputs()]
            for name, made in zip(names, session.run(names, given), strict=True):
                ctypes.memmove(self._addresses[name], np.ascontiguousarray(made).ctypes.data, made.nbytes)
            return True

        def _array(self, name: str, shape: tuple[int, ...]) -> Any:
            dtype = np.dtype(TYPES[self._engine.types[name]])
            size = int(np.prod(shape)) * dtype.itemsize
            data = (ctypes.c_char * size).from_address(self._addresses[name])
            return np.frombuffer(data, dtype).reshape(shape).copy()

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self._logger = logger

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            built_by, model, profiles = msgspec.msgpack.decode(plan)
            if built_by != version or "load" in faults:
                self._logger.log(Severity.ERROR, f"version tag does not match: {built_by}, {version}")
                return None
            return Engine(model, profiles)

    module.ILogger = ILogger
    module.OnnxParser = OnnxParser
    module.Builder = Builder
    module.Runtime = Runtime
    module.NetworkDefinitionCreationFlag = types.SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)
    module.MemoryPoolType = types.SimpleNamespace(WORKSPACE="workspace")
    module.BuilderFlag = types.SimpleNamespace(TF32="tf32")
    return module
