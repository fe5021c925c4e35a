"""What an engine promises to the worker that owns it, and how it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from models.build.kit import build_kit
from models.build.pack import Packed, pack
from models.build.stage import build_stage_graph
from models.engine.base import ContextFull, EngineFailed, NoSlot, StageEngine, StageSpec
from models.engine.manifest import WEIGHTS_LOCATION, read_manifest
from models.engine.onnx import OnnxStage
from models.engine.session import WEIGHTS_FOLDER
from models.formats import safetensors
from tests.models.stages import Ring, load_stage, packed_tiny, spec_of, stage_files, tiny_checkpoint
from wire.errors import CorruptData, EdgelamError, Refused

PROMPT = np.array([5, 77, 301, 8, 8, 150, 222], np.int64)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packed_tiny(tmp_path_factory.mktemp("packed"), "llama", "int4")


@pytest.fixture(params=["onnx", "torch"])
def engine(request: pytest.FixtureRequest, packed: Packed, tmp_path: Path) -> StageEngine:
    """A whole model with two slots and room for 64 tokens."""
    spec = spec_of(packed, 0, 4)
    path, weights = stage_files(packed, tmp_path, spec)
    if request.param == "onnx":
        return OnnxStage.load(path, weights, spec)
    pytest.importorskip("torch")
    from models.engine.torch import TorchStage

    return TorchStage.load(path, weights, spec)


KILLED_WHILE_LOADING = """
import os, signal, sys
from pathlib import Path
import msgspec, onnxruntime
from models.engine.base import StageSpec
from models.engine.onnx import OnnxStage
onnxruntime.InferenceSession = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
graph, spec, *weights = sys.argv[1:]
OnnxStage.load(Path(graph), [Path(path) for path in weights], msgspec.json.decode(spec, type=StageSpec))
"""


def test_a_worker_that_is_killed_while_it_loads_leaves_nothing_behind(packed: Packed, tmp_path: Path) -> None:
    spec = spec_of(packed, 0, 4)
    path, weights = stage_files(packed, tmp_path, spec)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_LOADING, str(path), msgspec.json.encode(spec).decode(), *map(str, weights)],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path.name for path in temporary.iterdir() if path.name != ".ses"]  # onnxruntime 1.31 makes that at import
    assert left == []
    assert {file.name for file in tmp_path.glob("*.onnx")} == {path.name}


def test_the_file_that_stands_for_weights_is_part_of_the_package() -> None:
    assert (WEIGHTS_FOLDER / WEIGHTS_LOCATION).read_bytes() == b""
    pyproject = (WEIGHTS_FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    packaged = pyproject.partition("[tool.setuptools.package-data]")[2].partition("[tool.ruff]")[0]
    assert f'"{WEIGHTS_LOCATION}"' in packaged


def test_slots_are_taken_and_given_back(engine: StageEngine) -> None:
    first, second = engine.open(), engine.open()
    assert first != second
    with pytest.raises(NoSlot):
        engine.open()
    engine.close(first)
    assert engine.open() == first
    engine.close(second)
    with pytest.raises(EngineFailed, match="not open"):
        engine.close(second)
    with pytest.raises(EngineFailed, match="not open"):
        engine.step(second, PROMPT, 0)


def test_going_back_forgets_the_tail(engine: StageEngine) -> None:
    slot = engine.open()
    wanted = engine.step(slot, PROMPT, 0).copy()
    engine.step(slot, PROMPT[::-1].copy(), 3)
    engine.step(slot, PROMPT, 0)
    np.testing.assert_array_equal(engine.step(slot, PROMPT, 0), wanted)


def test_a_reused_slot_remembers_nothing(engine: StageEngine) -> None:
    slot = engine.open()
    wanted = engine.step(slot, PROMPT, 0).copy()
    engine.close(slot)
    assert engine.open() == slot
    with pytest.raises(EngineFailed, match="after 0 rows"):
        engine.step(slot, PROMPT, len(PROMPT))
    np.testing.assert_array_equal(engine.step(slot, PROMPT, 0), wanted)


def test_a_gap_and_a_full_context_are_refused_and_harm_nothing(engine: StageEngine) -> None:
    slot = engine.open()
    engine.step(slot, PROMPT, 0)
    for position in (8, 9, -1):
        with pytest.raises(EngineFailed, match="at position"):
            engine.step(slot, PROMPT, position)
    with pytest.raises(ContextFull, match="64"):
        engine.step(slot, np.zeros(60, np.int64), 7)
    after = engine.step(slot, PROMPT[:2], 7).copy()
    other = engine.open()
    engine.step(other, PROMPT, 0)
    np.testing.assert_array_equal(engine.step(other, PROMPT[:2], 7), after)


def test_the_last_place_of_the_context_can_be_used(engine: StageEngine) -> None:
    slot = engine.open()
    engine.step(slot, np.arange(63), 0)
    assert np.isfinite(engine.step(slot, PROMPT[:1], 63)).all()
    with pytest.raises(ContextFull):
        engine.step(slot, PROMPT[:1], 64)


@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
def test_a_row_where_it_lies_gives_what_a_step_gives(precision: str, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, "qwen3", precision)
    for first, end in ((0, 2), (2, 3), (3, 4)):
        spec = spec_of(packed, first, end)
        engine = load_stage(packed, tmp_path, spec)
        slot = engine.open()
        assert engine.row(slot) is None, "nothing is bound yet"
        generator = np.random.default_rng(3)

        def rows(count: int, spec: StageSpec = spec, generator: np.random.Generator = generator) -> Any:
            if spec.embedding:
                return generator.integers(0, spec.vocabulary, count, dtype=np.int64)
            values = generator.standard_normal((count, spec.hidden), dtype=np.float32)
            return values if spec.wire_dtype == "f32" else values.astype(np.float16)

        engine.step(slot, rows(5), 0)
        given = [rows(1) for _ in range(6)]
        wanted = [engine.step(slot, one, 5 + at).copy() for at, one in enumerate(given)]
        row = engine.row(slot)
        assert row is not None and (row.output is None) == spec.head
        for at, one in enumerate(given):
            travelling = one.astype(np.int32) if spec.embedding else one
            assert row.fill(travelling.tobytes() if at % 2 else memoryview(travelling.tobytes()))
            row.run(5 + at)
            row.settle(5 + at)
            assert np.array_equal(row.result, wanted[at])
            if row.output is not None:
                assert bytes(row.output) == wanted[at].tobytes()
        last = rows(1)
        after = engine.step(slot, last, 11).copy()
        assert np.array_equal(engine.step(slot, last, 11), after), "both ways go on from each other"
        assert not row.fill(memoryview(b"123"))
        if spec.embedding:
            assert not row.fill(memoryview(spec.vocabulary.to_bytes(4, "little")))
            assert not row.fill(memoryview(b"\xff\xff\xff\xff"))
        else:
            assert row.fill(memoryview(np.full(spec.hidden, np.nan, given[0].dtype).tobytes()))
            row.run(12)
            with pytest.raises(EngineFailed, match="left the range"):
                row.settle(12)
            with pytest.raises(EngineFailed):
                engine.step(slot, last, 13)


@pytest.mark.parametrize("ids", [[-1], [320], [5, 2**40]])
def test_token_ids_outside_the_vocabulary_are_refused(engine: StageEngine, ids: list[int]) -> None:
    with pytest.raises(EngineFailed, match="token ids"):
        engine.step(engine.open(), np.array(ids, np.int64), 0)


@pytest.mark.parametrize("bad", [np.zeros(0, np.int64), np.zeros((), np.int64), np.zeros((1, 64), np.float16)])
def test_rows_of_another_form_are_refused(packed: Packed, tmp_path: Path, bad: Any) -> None:
    whole, later = (
        load_stage(packed, tmp_path, spec_of(packed, 0, 4)),
        load_stage(packed, tmp_path, spec_of(packed, 2, 4)),
    )
    with pytest.raises(EngineFailed):
        whole.step(whole.open(), bad, 0)
    with pytest.raises(EngineFailed):
        later.step(later.open(), bad.astype(np.float64), 0)


def test_token_ids_may_come_as_they_travel(packed: Packed, tmp_path: Path) -> None:
    whole = load_stage(packed, tmp_path, spec_of(packed, 0, 4))
    slot = whole.open()
    wanted = whole.step(slot, PROMPT, 0).copy()
    np.testing.assert_array_equal(whole.step(slot, PROMPT.astype(np.int32), 0), wanted)


def test_the_name_is_what_was_loaded_and_bytes_grow_with_slots(packed: Packed, tmp_path: Path) -> None:
    stage = load_stage(packed, tmp_path, spec_of(packed, 1, 3))
    assert stage.name.startswith("onnxruntime 1.") and stage.name.endswith("CPUExecutionProvider")
    before = stage.held_bytes
    assert before >= sum(packed.graph.module(f"block.{index}").weight_bytes for index in (1, 2))
    slot = stage.open()
    assert stage.held_bytes - before == 2 * 64 * packed.graph.module("block.1").kv_bytes_per_token
    stage.close(slot)
    assert stage.held_bytes == before


@pytest.mark.parametrize(("wire", "fails"), [("f16", True), ("bf16", False), ("f32", False)])
@pytest.mark.parametrize("cuts", [(), (2,)])
def test_leaving_the_range_of_f16_is_said_with_the_remedy(
    wire: str, fails: bool, cuts: tuple[int, ...], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint(tmp_path)
    loud = _Loud(checkpoint)
    packed = pack(loud, "int8", wire, tmp_path / "loud")
    ring = Ring.of(packed, tmp_path, cuts)
    if fails:
        with pytest.raises(EngineFailed) as caught:
            ring.step(PROMPT, 0)
        assert "f16" in str(caught.value) and "bf16" in caught.value.try_
    else:
        assert np.isfinite(ring.step(PROMPT, 0)).all()


class _Loud:
    """A checkpoint whose first block adds more than f16 can hold."""

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def tensor(self, name: str) -> Any:
        tensor = self._checkpoint.tensor(name)
        return tensor * np.float32(1e6) if name == "block.0.down" else tensor


def test_a_head_alone_refuses_hidden_states_that_are_no_numbers(packed: Packed, tmp_path: Path) -> None:
    head = load_stage(packed, tmp_path, spec_of(packed, 4, 4, embedding=False))
    hidden = np.zeros((1, 64), np.float16)
    hidden[0, 5] = np.inf
    with pytest.raises(EngineFailed, match="f16"):
        head.step(head.open(), hidden, 0)


def test_a_stage_that_was_not_ordered_is_not_loaded(packed: Packed, tmp_path: Path) -> None:
    spec = spec_of(packed, 1, 3)
    path, weights = stage_files(packed, tmp_path, spec)
    for field, value in (("head", True), ("first_block", 2), ("hidden", 65), ("wire_dtype", "f32")):
        with pytest.raises(EngineFailed, match="the order says"):
            OnnxStage.load(path, weights, structs.replace(spec, **{field: value}))


def test_missing_and_misshapen_weights_are_named(packed: Packed, tmp_path: Path) -> None:
    spec = spec_of(packed, 1, 3)
    path, weights = stage_files(packed, tmp_path, spec)
    with pytest.raises(EngineFailed, match=r"block\.2\."):
        OnnxStage.load(path, weights[:1], spec)
    tensors = {name: np.array(tensor) for name, tensor in safetensors.read(weights[1]).items()}
    tensors["block.2.ffn_norm"] = np.ones(63, np.float32)
    wrong = tmp_path / "wrong.safetensors"
    safetensors.write(wrong, tensors)
    with pytest.raises(EngineFailed, match=r"block\.2\.ffn_norm"):
        OnnxStage.load(path, [weights[0], wrong], spec)
    wrong.write_bytes(weights[1].read_bytes()[:-7])
    with pytest.raises(CorruptData):
        OnnxStage.load(path, [weights[0], wrong], spec)


def test_a_context_beyond_the_sliding_window_is_refused(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, "mistral", sliding_window=32)
    with pytest.raises(Refused, match="32"):
        load_stage(packed, tmp_path, spec_of(packed, 0, 4, context_tokens=33))


@given(cut=st.integers(0, 10**6), flip=st.integers(0, 255), data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_graph_is_an_engine_failure_and_nothing_else(
    packed: Packed, tmp_path: Path, cut: int, flip: int, data: st.DataObject
) -> None:
    spec = spec_of(packed, 1, 2)
    path, _ = stage_files(packed, tmp_path, spec)
    graph = bytearray(path.read_bytes())
    tail = data.draw(st.integers(0, len(graph) - 1))
    graph[tail] ^= flip
    damaged = bytes(graph[: cut % len(graph)] if cut % 2 else graph)
    try:
        read_manifest(damaged, "damaged")
    except EdgelamError as error:
        assert "damaged" in str(error)
    for garbage in (b"", b"not a graph", bytes(1000), b"\xff" * 1000):
        with pytest.raises(EngineFailed):
            read_manifest(garbage, "garbage")


@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
def test_every_module_of_the_kit_runs_on_weights_made_here(precision: str, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, "llama", precision)
    kit = build_kit(packed.config, precision, packed.graph.wire_dtype)
    assert {entry.key for entry in kit} == {module.profile_key for module in packed.graph.modules}
    for entry in kit:
        for stack, graph in entry.graphs.items():
            path = tmp_path / f"{entry.kind}-{stack}.onnx"
            path.write_bytes(graph)
            is_block = entry.kind == "block"
            spec = spec_of(
                packed, 0, stack if is_block else 0, embedding=entry.kind == "embedding", head=entry.kind == "head"
            )
            stage = OnnxStage.load_synthetic(path, spec, 0)
            slot = stage.open()
            given = (
                PROMPT
                if entry.kind == "embedding"
                else np.random.default_rng(0).standard_normal((7, 64)).astype(np.dtype(_NUMPY[spec.wire_dtype]))
            )
            result = stage.step(slot, given, 0).astype(np.float32)
            assert np.isfinite(result).all() and np.abs(result).max() > 1e-6
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".onnx", "") and path.is_file()]


_NUMPY = {"f16": "float16", "f32": "float32"}

_GROWTH = """
import os, sys
from pathlib import Path
from models.engine.base import StageSpec
from models.engine.onnx import OnnxStage
import msgspec

def anonymous():
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024

spec = msgspec.json.decode(sys.argv[2], type=StageSpec)
before = anonymous()
stage = OnnxStage.load_synthetic(Path(sys.argv[1]), spec, 0)
print(anonymous() - before, stage.held_bytes)
"""


@pytest.mark.parametrize(("precision", "most"), [("f32", 1.15), ("int8", 1.35), ("int4", 1.45)])
def test_weights_are_in_memory_once(precision: str, most: float, tmp_path: Path) -> None:
    """onnxruntime rearranges them for its kernels, with block sums beside the scales; the mapped file is let go."""
    packed = packed_tiny(tmp_path, "llama", precision, blocks=1)
    config = structs.replace(packed.config, blocks=6, hidden=768, ffn=2048, heads=12, kv_heads=4, head_dim=64)
    path = tmp_path / "large.onnx"
    wire = packed.graph.wire_dtype
    path.write_bytes(
        build_stage_graph(config, precision, wire, first_block=0, end_block=6, embedding=False, head=False)
    )
    spec = structs.replace(spec_of(packed, 0, 1), embedding=False, head=False, end_block=6, hidden=768)
    command = [sys.executable, "-c", _GROWTH, str(path), msgspec.json.encode(spec).decode()]
    grown, held = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    few = 8 * 2**20  # the session itself
    assert grown < most * held + few


def test_onnxruntime_reports_to_nobody_and_writes_nothing_for_it(tmp_path: Path) -> None:
    # CI and its own setting hold it back anyway; as on a board there is neither.
    environment = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    program = "import os, models.engine.onnx; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-B", "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
    assert list(tmp_path.rglob("*")) == []
