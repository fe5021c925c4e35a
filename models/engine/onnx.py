"""Stages on onnxruntime: weights mapped once, KV cache in place, one call per step.

A step must cost what the operators cost, so everything a step needs is bound beforehand: a slot keeps one binding for
single rows (decode) and one for the last other number of rows (prefill), and a step writes the rows and two numbers
into buffers that are bound already. The graph is run as it is written, without graph optimisations: a fusion across
the boundary of two blocks would change bits with the cut (models.build.stage), and fused operators are in it already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _binding

from models.engine.base import Array, ContextFull, EngineFailed, NoSlot, RowStep, StageSpec
from models.engine.manifest import StageManifest, load_graph
from models.engine.memory import Weights, kv_buffers, make_weights, map_weights, rope_tables

PROVIDER: Final = "CPUExecutionProvider"

WEIGHTS_FOLDER: Final = Path(__file__).resolve().parent
"""Holds an empty file of the name models.engine.manifest.WEIGHTS_LOCATION, which is part of the package."""

TOKEN_BYTES: Final = 4
"""Of a token id as it travels, int32."""

_BFLOAT16: Final = 16
"""TensorProto.BFLOAT16; numpy has no such dtype, the bits travel as uint16."""

_FAILURES: Final = (
    *(getattr(_binding, name) for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile")),
    *(getattr(_binding, name) for name in ("NotImplemented", "RuntimeException", "EPFail", "NoModel", "ModelLoaded")),
    RuntimeError,
    MemoryError,
)

MAX_SAID_LETTERS: Final = 400
"""Of an onnxruntime error, which begins with pages of C++ types."""

_WIRE_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
}

_SPECIAL_BITS: Final[Mapping[str, np.unsignedinteger[Any]]] = {
    "f32": np.uint32(0x7F80_0000),
    "f16": np.uint16(0x7C00),
    "bf16": np.uint16(0x7F80),
}
"""As which integers to look at hidden states, and the exponent bits that are all set in infinities and NaNs only."""


class OnnxStage:
    """A stage loaded into one onnxruntime session. See `models.engine.base.StageEngine`."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        manifest: StageManifest,
        weights: Weights,
        values: dict[str, Any],
        spec: StageSpec,
    ) -> None:
        self._session = session
        self._manifest = manifest
        self._weights = weights
        self._values = values
        self._spec = spec
        self._tables = [_value(table) for table in _tables(manifest, spec)]
        self._slots: list[_Slot | None] = [None] * spec.slots
        self._rows: dict[int, _Rows] = {}
        self._name = f"onnxruntime {onnxruntime.__version__} {session.get_providers()[0]}"

    @classmethod
    def load(cls, graph_path: Path, weight_paths: Iterable[Path], spec: StageSpec) -> OnnxStage:
        """Load a graph and the files that hold its weights; more tensors than the stage needs do no harm.

        Raises EngineFailed (not our graph, another stage than ordered, weights missing or of the wrong shape, or what
        onnxruntime says), CorruptData (a damaged file), Refused (a context the model can't do).
        """
        graph, manifest = load_graph(graph_path, spec)
        manifest.config.check_context(spec.context_tokens)
        return cls._start(graph, manifest, map_weights(manifest, weight_paths), spec, graph_path)

    @classmethod
    def load_synthetic(cls, graph_path: Path, spec: StageSpec, seed: int) -> OnnxStage:
        """Load a graph with weights made up here, for measuring: time does not depend on their values."""
        graph, manifest = load_graph(graph_path, spec)
        try:
            weights = make_weights(manifest, graph_path.parent, seed)
        except OSError as error:
            raise EngineFailed(
                f"no room for weights to measure with in {graph_path.parent}: {error.strerror}"
            ) from error
        return cls._start(graph, manifest, weights, spec, graph_path)

    @classmethod
    def _start(
        cls, graph: bytes, manifest: StageManifest, weights: Weights, spec: StageSpec, graph_path: Path
    ) -> OnnxStage:
        options = _options(spec.threads)
        # Shared initialisers are used where they lie; external ones (add_external_initializers) would be copied. The
        # session keeps bare pointers to them: they must live as long as it does.
        values = {name: _value(tensor) for name, tensor in weights.tensors.items()}
        for name, value in values.items():
            options.add_initializer(name, value)
        try:
            session = _session(graph, options)
        except _FAILURES as error:
            raise EngineFailed(f"onnxruntime {onnxruntime.__version__}: {graph_path.name}: {_said(error)}") from error
        if session.get_providers() != [PROVIDER]:
            raise EngineFailed(f"onnxruntime chose {session.get_providers()}, asked for {PROVIDER}")
        weights.forget_pages()
        return cls(session, manifest, weights, values, spec)

    @property
    def name(self) -> str:
        return self._name

    @property
    def vocabulary(self) -> int:
        return self._spec.vocabulary

    @property
    def manifest(self) -> StageManifest:
        return self._manifest

    @property
    def held_bytes(self) -> int:
        """Weights, rope tables, KV buffers of the slots in use (in full), buffers of rows."""
        slots = sum(slot.size_bytes for slot in self._slots if slot is not None)
        rows = sum(rows.size_bytes for rows in self._rows.values())
        tables = sum(int(np.prod(table.shape())) * 4 for table in self._tables)
        return self._weights.size_bytes + slots + rows + tables

    def open(self) -> int:
        for number, slot in enumerate(self._slots):
            if slot is None:
                try:
                    self._slots[number] = _Slot(self._manifest, self._spec.context_tokens)
                except (OSError, MemoryError) as error:
                    raise EngineFailed(
                        f"no memory for the keys and values of {self._spec.context_tokens} tokens: {error}",
                        try_="deploy with a smaller context",
                    ) from error
                return number
        raise NoSlot(f"all {self._spec.slots} slots are taken", try_="try again when a request has ended")

    def close(self, slot: int) -> None:
        self._opened(slot)
        self._slots[slot] = None

    def step(self, slot: int, given: Array, position: int) -> Array:
        opened = self._opened(slot)
        count = given.shape[0] if given.ndim else 0
        end = position + count
        if end > self._spec.context_tokens:
            raise ContextFull(f"{end} tokens in a context of {self._spec.context_tokens}")
        if not 0 <= position <= opened.rows or count == 0:
            raise EngineFailed(f"step of {count} rows at position {position} after {opened.rows} rows")
        rows = self._rows.get(count) or self._new_rows(count)
        binding = opened.bindings.get(count) or self._bind(opened, rows)
        into = rows.given_rows
        if given.shape != into.shape or not (given.dtype == into.dtype or _fits(given.dtype, into.dtype)):
            raise EngineFailed(f"given {given.dtype} {list(given.shape)}, expected {into.dtype} {list(into.shape)}")
        into[...] = given
        rows.last_row.fill(end - 1)
        rows.end.fill(end)
        self._check_given(rows)
        # What lies behind `position` is overwritten from here on; if the step fails the slot ends there.
        opened.rows = position
        try:
            self._session.run_with_iobinding(binding)
        except _FAILURES as error:
            raise EngineFailed(f"{self._name}: {_said(error)}") from error
        self.settle(opened, rows, end)
        return rows.logits if rows.logits is not None else rows.output

    def row(self, slot: int) -> RowStep | None:
        opened = self._opened(slot)
        if 1 not in opened.bindings:
            return None
        return _OneRow(self, self._session, opened, opened.bindings[1], self._rows[1])

    def settle(self, opened: _Slot, rows: _Rows, end: int) -> None:
        """Count the rows of a step, unless it gave what is no number. A stage of a head alone has no hidden states of
        its own to look at, and its product may hide a NaN: there it is what was given. Raises EngineFailed."""
        if rows.hidden is not None:
            if _has_special(rows.hidden_bits, rows.scratch, self._spec.wire_dtype):
                raise self._overflow("the stage's output")
        elif _has_special(rows.given_bits, rows.scratch, self._spec.wire_dtype):
            raise self._overflow("the hidden states given")
        opened.rows = end

    def bare_run(self, slot: int, count: int) -> Callable[[Array, int], Array]:
        """Give onnxruntime's own call for steps of `count` rows, inputs written and nothing checked: what a benchmark
        compares `step` with. A step of so many rows must have been made in the slot."""
        binding, rows = self._opened(slot).bindings[count], self._rows[count]

        def run(given: Array, position: int) -> Array:
            rows.given_rows[...] = given
            rows.last_row.fill(position + count - 1)
            rows.end.fill(position + count)
            self._session.run_with_iobinding(binding)
            return rows.logits if rows.logits is not None else rows.output

        return run

    def _opened(self, slot: int) -> _Slot:
        found = self._slots[slot] if 0 <= slot < len(self._slots) else None
        if found is None:
            raise EngineFailed(f"slot {slot} is not open")
        return found

    def _check_given(self, rows: _Rows) -> None:
        if self._manifest.embedding:
            vocabulary = self._spec.vocabulary
            least, most = int(rows.given.min()), int(rows.given.max())
            if least < 0 or most >= vocabulary:
                raise EngineFailed(f"token ids {least} to {most} in a vocabulary of {vocabulary}")

    def _overflow(self, what: str) -> EngineFailed:
        return EngineFailed(
            f"{what} left the range of {self._spec.wire_dtype}",
            try_="deploy with wire dtype bf16" if self._spec.wire_dtype == "f16" else "check the checkpoint",
        )

    def _new_rows(self, count: int) -> _Rows:
        """Keep buffers for single rows and for one other number: chunks of a prompt but the last are of one size."""
        for other in [kept for kept in self._rows if kept not in (1, count)] if count != 1 else []:
            del self._rows[other]
            for slot in self._slots:
                if slot is not None:
                    slot.bindings.pop(other, None)
        self._rows[count] = _Rows(self._manifest, count)
        return self._rows[count]

    def _bind(self, slot: _Slot, rows: _Rows) -> Any:
        binding = self._session.io_binding()
        given = "tokens" if self._manifest.embedding else "hidden"
        binding.bind_ortvalue_input(given, _value(rows.given, self._wire_of(rows.given)))
        if self._manifest.blocks:
            binding.bind_ortvalue_input("last_row", _value(rows.last_row))
            binding.bind_ortvalue_input("rows", _value(rows.end))
            for name, table in zip(("rope.cos", "rope.sin"), self._tables, strict=True):
                binding.bind_ortvalue_input(name, table)
        if rows.hidden is not None:
            binding.bind_ortvalue_output("hidden.out", _value(rows.hidden, self._wire_of(rows.hidden)))
        if rows.logits is not None:
            binding.bind_ortvalue_output("logits", _value(rows.logits[None]))
        for name, buffer in slot.buffers.items():
            value = _value(buffer)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"{name}.out", value)
        slot.bindings[rows.count] = binding
        return binding

    def _wire_of(self, array: Array) -> str:
        return "bf16" if array.dtype == np.uint16 else ""


class _OneRow:
    """See `models.engine.base.RowStep`. All that is looked up was looked up before: a step that has run through the
    caches finds this code cold, and cold code costs by its length."""

    def __init__(
        self, stage: OnnxStage, session: onnxruntime.InferenceSession, slot: _Slot, binding: Any, rows: _Rows
    ) -> None:
        self._stage = stage
        self._session = session
        self._slot = slot
        self._binding = binding
        self._rows = rows
        self._tokens = rows.given if rows.given.dtype == np.int64 else None
        self._given = rows.given.view(np.uint8).reshape(-1).data
        self._vocabulary = stage.vocabulary
        self.output = None if rows.logits is not None else rows.output.view(np.uint8).reshape(-1).data
        self.result: Array = rows.output if rows.logits is None else rows.logits

    def fill(self, given: memoryview) -> bool:
        if self._tokens is None:
            if len(given) != len(self._given):
                return False
            self._given[:] = given
            return True
        token = int.from_bytes(given, "little", signed=True)
        if len(given) != TOKEN_BYTES or not 0 <= token < self._vocabulary:
            return False
        self._tokens.fill(token)
        return True

    def run(self, position: int) -> None:
        rows = self._rows
        rows.last_row.fill(position)
        rows.end.fill(position + 1)
        self._slot.rows = position
        try:
            self._session.run_with_iobinding(self._binding)
        except _FAILURES as error:
            raise EngineFailed(f"{self._stage.name}: {_said(error)}") from error

    def settle(self, position: int) -> None:
        self._stage.settle(self._slot, self._rows, position + 1)


class _Rows:
    """Buffers for steps of one number of rows, shared by all slots: a result is valid until the next step."""

    def __init__(self, manifest: StageManifest, count: int) -> None:
        wire, hidden = manifest.wire_dtype, manifest.config.hidden
        bits = _SPECIAL_BITS[wire].dtype
        self.count = count
        self.given: Array = (
            np.zeros((1, count), np.int64) if manifest.embedding else np.zeros((1, count, hidden), _WIRE_DTYPES[wire])
        )
        self.given_rows: Array = self.given[0]
        if not manifest.embedding:
            self.given_bits = self.given.view(bits)
        self.scratch = np.zeros((1, count, hidden), bits)
        self.last_row = np.zeros(1, np.int32)
        self.end = np.zeros((), np.int32)
        self.hidden: Array | None = None
        if manifest.embedding or manifest.blocks:
            self.hidden = np.zeros((1, count, hidden), _WIRE_DTYPES[wire])
            self.hidden_bits = self.hidden.view(bits)
            self.output: Array = self.hidden[0]
        self.logits = np.zeros(manifest.config.vocabulary, np.float32) if manifest.head else None

    @property
    def size_bytes(self) -> int:
        arrays = (self.given, self.hidden, self.logits, self.scratch)
        return sum(array.nbytes for array in arrays if array is not None)


class _Slot:
    """One request's KV buffers and the bindings to them."""

    def __init__(self, manifest: StageManifest, context_tokens: int) -> None:
        config = manifest.config
        names = [f"kv.{index}.{part}" for index in manifest.blocks for part in ("key", "value")]
        shape = (1, config.kv_heads, context_tokens, config.head_dim)
        self.buffers = dict(zip(names, kv_buffers(len(names), shape), strict=True))
        self.bindings: dict[int, Any] = {}
        self.rows = 0

    @property
    def size_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers.values())


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    # A pool that spins between steps takes the core from the transport, and a ring waits most of the time.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _session(graph: bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    """Open a graph; nothing is written, so that nothing stays behind when the process is killed.

    onnxruntime checks that a file exists of the name under which the graph declares its weights, and then takes the
    initialisers in `options` instead. An empty one lies beside this module.
    """
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(WEIGHTS_FOLDER))
    return onnxruntime.InferenceSession(graph, options, providers=[PROVIDER])


def _fits(given: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Token ids may come in any integer type that int64 holds; hidden states come as they are wanted."""
    return wanted == np.int64 and given.kind in "iu" and given != np.uint64


def _said(error: BaseException) -> str:
    """Give what onnxruntime says at the end of its message, where the cause stands, short enough for a screen."""
    return str(error).strip()[-MAX_SAID_LETTERS:]


def _tables(manifest: StageManifest, spec: StageSpec) -> tuple[npt.NDArray[np.float32], ...]:
    return rope_tables(manifest.config, spec.context_tokens) if manifest.blocks else ()


def _value(array: Array, wire: str = "") -> Any:
    """Give an onnxruntime value that shares the array's memory."""
    if wire == "bf16":
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _has_special(bits: npt.NDArray[Any], scratch: npt.NDArray[Any], wire_dtype: str) -> bool:
    """Is there an infinity or a NaN, whose exponent is all ones?"""
    exponent = _SPECIAL_BITS[wire_dtype]
    np.bitwise_and(bits, exponent, out=scratch)
    return bool(np.maximum.reduce(scratch, axis=None) == exponent)
