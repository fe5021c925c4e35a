"""onnxruntime itself: sessions over a stage's graph and weights, values that share an array's memory, its failures.

The graph is run as it is written, without graph optimisations: a fusion across the boundary of two blocks would change
bits with the cut (models.build.stage), and fused operators are in it already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _binding

from models.engine.base import Array, EngineFailed
from models.engine.device import At, Memory

PROVIDER: Final = "CPUExecutionProvider"

WEIGHTS_FOLDER: Final = Path(__file__).resolve().parent
"""Holds an empty file of the name models.engine.manifest.WEIGHTS_LOCATION, which is part of the package."""

_BFLOAT16: Final = 16
"""TensorProto.BFLOAT16; numpy has no such dtype, the bits travel as uint16."""

_ELEMENTS: Final[Mapping[str, Any]] = {"f32": np.float32, "f16": np.float16, "i32": np.int32, "bf16": _BFLOAT16}

_FAILURES: Final = (
    *(getattr(_binding, name) for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile")),
    *(getattr(_binding, name) for name in ("NotImplemented", "RuntimeException", "EPFail", "NoModel", "ModelLoaded")),
    RuntimeError,
    MemoryError,
)

MAX_SAID_LETTERS: Final = 400
"""Of an onnxruntime error, which begins with pages of C++ types."""


class Session:
    """One graph, loaded with its weights. Raises EngineFailed.

    Shared initialisers are used where they lie; external ones (add_external_initializers) would be copied. onnxruntime
    keeps bare pointers to them: they must live as long as it does.
    """

    def __init__(
        self,
        graph: bytes,
        weights: Mapping[str, Array],
        threads: int,
        what: str,
        *,
        together: bool = True,
        kept: bool = False,
    ) -> None:
        """`together`: the tensors of a run may lie in one piece of memory. Where they are large that takes up to half
        as much again, each time another amount, and saves no time.

        `kept`: what the first run took is kept for those that follow, in onnxruntime's own arena. It suits runs of
        one size: the C library would take up to three times as much for large tensors, another amount in each process,
        and 2.5 times as long where it gives them back to the kernel behind every one.
        """
        options = _options(threads)
        options.enable_mem_pattern = together
        options.enable_cpu_mem_arena = kept
        self._values = {name: value(tensor) for name, tensor in weights.items()}
        for name, initialiser in self._values.items():
            options.add_initializer(name, initialiser)
        try:
            self._session = _session(graph, options)
        except _FAILURES as error:
            raise EngineFailed(f"onnxruntime {onnxruntime.__version__}: {what}: {_said(error)}") from error
        if self._session.get_providers() != [PROVIDER]:
            raise EngineFailed(f"onnxruntime chose {self._session.get_providers()}, asked for {PROVIDER}")
        self.name = f"onnxruntime {onnxruntime.__version__} {PROVIDER}"

    def binding(self) -> Any:
        """An empty set of bound inputs and outputs."""
        return self._session.io_binding()

    def run(self, binding: Any) -> None:
        """Call onnxruntime; raise EngineFailed with its words."""
        try:
            self._session.run_with_iobinding(binding)
        except _FAILURES as error:
            raise EngineFailed(f"{self.name}: {_said(error)}") from error

    def bare_run(self, binding: Any) -> None:
        """Its own call and nothing else."""
        self._session.run_with_iobinding(binding)


class ProviderSession:
    """A graph of standard operators on one of onnxruntime's providers, on whose device `memory` is: see
    models.engine.device.Executor. What the provider has no kernel for runs on the processor."""

    def __init__(
        self,
        graph: bytes,
        weights: Mapping[str, Array],
        threads: int,
        provider: str,
        options: Mapping[str, str],
        memory: Memory,
        what: str,
    ) -> None:
        self.memory = memory
        self._device = "cpu" if provider == PROVIDER else "cuda"
        settings = _options(threads)
        # Unlike shared ones, these are copied to wherever the provider wants them.
        settings.add_external_initializers(list(weights), [value(array) for array in weights.values()])
        providers: list[Any] = (
            [(provider, dict(options))] if provider == PROVIDER else [(provider, dict(options)), PROVIDER]
        )
        try:
            self._session = _session(graph, settings, providers)
        except _FAILURES as error:
            raise EngineFailed(f"onnxruntime {onnxruntime.__version__}: {what}: {_said(error)}") from error
        found = self._session.get_providers()
        if found[:1] != [provider]:
            raise EngineFailed(f"onnxruntime fell back to {', '.join(found)}, asked for {provider}")
        self._weight_bytes = sum(array.nbytes for array in weights.values())
        self.name = f"onnxruntime {onnxruntime.__version__} {provider}"

    @property
    def held_bytes(self) -> int:
        return self._weight_bytes

    def run(self, given: Mapping[str, At], results: Mapping[str, At]) -> None:
        binding = self._session.io_binding()
        # What was queued for the device is not known to onnxruntime's own stream.
        self.memory.wait()
        try:
            for name, at in given.items():
                binding.bind_input(name, self._device, 0, _ELEMENTS[at.dtype], at.shape, at.address)
            for name, at in results.items():
                binding.bind_output(name, self._device, 0, _ELEMENTS[at.dtype], at.shape, at.address)
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except _FAILURES as error:
            raise EngineFailed(f"{self.name}: {_said(error)}") from error


def available_providers() -> tuple[str, ...]:
    """What this onnxruntime was built with; it may not work here."""
    return tuple(onnxruntime.get_available_providers())


def value(array: Array, wire: str = "") -> Any:
    """Give an onnxruntime value that shares the array's memory."""
    if wire == "bf16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    # What a large step took goes back to the C library, and with it to the kernel (agent.workers.memory).
    options.enable_cpu_mem_arena = False
    # A pool that spins between steps takes the core from the transport, and a ring waits most of the time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _session(
    graph: bytes, options: onnxruntime.SessionOptions, providers: Sequence[Any] = (PROVIDER,)
) -> onnxruntime.InferenceSession:
    """Open a graph; nothing is written, so that nothing stays behind when the process is killed.

    onnxruntime checks that a file exists of the name under which the graph declares its weights, and then takes the
    initialisers in `options` instead. An empty one lies beside this module.
    """
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(WEIGHTS_FOLDER))
    return onnxruntime.InferenceSession(graph, options, providers=list(providers))


def _said(error: BaseException) -> str:
    """Give what onnxruntime says at the end of its message, where the cause stands, short enough for a screen."""
    return str(error).strip()[-MAX_SAID_LETTERS:]
