"""A stage in standard operators computes what the same stage in fused ones does, and keeps the same promises."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from models.build.pack import Packed
from models.build.standard import build_standard_graph
from models.engine.base import ContextFull, EngineFailed, NoSlot, StageEngine, StageSpec
from models.engine.device import HostMemory
from models.engine.expand import standard_arrays
from models.engine.manifest import load_graph
from models.engine.memory import map_weights
from models.engine.session import PROVIDER, ProviderSession
from models.engine.standard import MOST_ROWS, StandardStage
from models.families.config import Family
from tests.models.stages import Ring, load_stage, packed_tiny, spec_of, stage_files
from tests.models.tiny import tiny_config

PROMPT = np.array([5, 77, 301, 8, 8, 150, 222], np.int64)

CASES: list[tuple[Family, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"as_gguf": True}),
    ("llama", {"tied_embeddings": False, "rope_factors": (1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0)}),
    ("llama", {"hidden": 80, "ffn": 112}),
    ("mistral", {"sliding_window": 128}),
    ("qwen2", {}),
    ("qwen3", {}),
]


def standard_files(packed: Packed, folder: Path, spec: StageSpec) -> tuple[Path, list[Path]]:
    _, weights = stage_files(packed, folder, spec)
    path = folder / f"standard-{spec.first_block}-{spec.end_block}.onnx"
    data = build_standard_graph(
        packed.config, packed.graph.precision, packed.graph.wire_dtype, first_block=spec.first_block,
        end_block=spec.end_block, embedding=spec.embedding, head=spec.head,
    )  # fmt: skip
    path.write_bytes(data)
    return path, weights


def standard_stage(packed: Packed, folder: Path, spec: StageSpec) -> StandardStage:
    path, files = standard_files(packed, folder, spec)
    graph, manifest = load_graph(path, spec, "standard")
    stored = map_weights(manifest.weights, files).tensors
    arrays = {info.name: array for info, array in standard_arrays(manifest, stored)}
    session = ProviderSession(graph, arrays, 1, PROVIDER, {}, HostMemory(), "test")
    return StandardStage(session, manifest, spec)


def standard_ring(packed: Packed, folder: Path, cuts: tuple[int, ...]) -> Ring:
    bounds = pairwise((0, *cuts, packed.graph.blocks))
    return Ring([standard_stage(packed, folder, spec_of(packed, first, end)) for first, end in bounds])


@pytest.mark.parametrize(("family", "options"), CASES, ids=lambda value: str(value)[:30])
def test_float32_logits_and_words_are_those_of_the_fused_graph(
    family: Family, options: dict[str, Any], tmp_path: Path
) -> None:
    packed = packed_tiny(tmp_path, family, "f32", **options)
    wanted_tokens, wanted = Ring.of(packed, tmp_path, (1,)).generate(PROMPT, 8)
    tokens, logits = standard_ring(packed, tmp_path, (1, 3)).generate(PROMPT, 8)
    assert np.abs(np.array(logits) - np.array(wanted)).max() < 1e-3
    assert tokens == wanted_tokens


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.05), ("int4", 0.2)])
@pytest.mark.parametrize("wire", ["f16", "bf16"])
def test_expanded_weights_are_those_of_the_codes(precision: str, most: float, wire: str, tmp_path: Path) -> None:
    """The fused graph rounds activations to 8 bit blockwise: so not equal, but near, relative to the logits' spread."""
    packed = packed_tiny(tmp_path, "llama", precision, wire)
    wanted = Ring.of(packed, tmp_path, ()).step(PROMPT, 0).copy()
    logits = standard_ring(packed, tmp_path, (2,)).step(PROMPT, 0)
    assert 0 < np.abs(logits - wanted).max() < most * wanted.std()


def test_only_operators_of_onnx_are_used_and_every_weight_has_a_place_in_a_file() -> None:
    for family in ("llama", "qwen2", "qwen3"):
        data = build_standard_graph(
            tiny_config(family), "int4", "f16", first_block=0, end_block=4, embedding=True, head=True  # type: ignore[arg-type]
        )  # fmt: skip
        model = onnx.load_from_string(data)
        assert {node.domain for node in model.graph.node} == {""}
        onnx.checker.check_model(_without_external(model))
        places = []
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                said = {entry.key: entry.value for entry in tensor.external_data}
                places.append((int(said["offset"]), int(said["length"])))
        places.sort()
        assert len(places) == 1 + 1 + 4 * (2 + 5) + {"qwen2": 4, "qwen3": 8}.get(family, 0)
        assert all(start + length <= after for (start, length), (after, _) in pairwise(places))


def _without_external(model: onnx.ModelProto) -> onnx.ModelProto:
    """The checker wants the files to exist: say the weights are inputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.initializer[:]
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            copy.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            copy.graph.initializer.append(tensor)
    return copy


def test_a_graph_of_the_other_operators_is_refused(tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, "llama", "int4")
    spec = spec_of(packed, 0, 4)
    fused, _ = stage_files(packed, tmp_path, spec)
    standard, _ = standard_files(packed, tmp_path, spec)
    with pytest.raises(EngineFailed, match="fused operators, this engine reads standard"):
        load_graph(fused, spec, "standard")
    with pytest.raises(EngineFailed, match="standard operators, this engine reads fused"):
        load_graph(standard, spec)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packed_tiny(tmp_path_factory.mktemp("packed"), "llama", "int4")


@pytest.fixture
def engine(packed: Packed, tmp_path: Path) -> StageEngine:
    return standard_stage(packed, tmp_path, spec_of(packed, 0, 4, slots=3))


def test_rows_of_several_requests_are_as_each_alone_and_others_are_left_alone(
    packed: Packed, tmp_path: Path, engine: StageEngine
) -> None:
    one, two, three = engine.open(), engine.open(), engine.open()
    for slot, prompt in ((one, PROMPT), (two, PROMPT[:3]), (three, PROMPT[::-1].copy())):
        engine.step(slot, prompt, 0)
    alone = [engine.step(slot, PROMPT[:1], at).copy() for slot, at in ((one, 7), (three, 7))]
    untouched = engine.step(two, PROMPT[:1], 3).copy()
    made, failed = engine.step_many([three, one], np.array([5, 5]), [7, 7])
    assert not failed
    for row, wanted in zip(made, (alone[1], alone[0]), strict=True):
        assert np.abs(row - wanted).max() < 0.02 * wanted.std()
    np.testing.assert_array_equal(engine.step(two, PROMPT[:1], 3), untouched)


def test_a_row_that_can_not_be_run_leaves_the_others(engine: StageEngine) -> None:
    one, two = engine.open(), engine.open()
    engine.step(one, PROMPT, 0)
    engine.step(two, PROMPT, 0)
    wanted = engine.step(one, PROMPT[:1], 7).copy()
    made, failed = engine.step_many([one, two], np.array([5, 320]), [7, 7])
    assert list(failed) == [1] and "320" in str(failed[1])
    assert np.abs(made[0] - wanted).max() < 0.02 * wanted.std()
    _, failed = engine.step_many([one, two], np.array([5, 5]), [9, 64])
    assert isinstance(failed[1], ContextFull) and isinstance(failed[0], EngineFailed)
    with pytest.raises(EngineFailed, match="different"):
        engine.step_many([one, one], np.array([5, 5]), [7, 7])


def test_slots_rewind_and_limits_are_kept(engine: StageEngine) -> None:
    slots = [engine.open() for _ in range(3)]
    with pytest.raises(NoSlot):
        engine.open()
    wanted = engine.step(slots[0], PROMPT, 0).copy()
    engine.step(slots[0], PROMPT[::-1].copy(), 3)
    np.testing.assert_array_equal(engine.step(slots[0], PROMPT, 0), wanted)
    with pytest.raises(EngineFailed, match="at position 9"):
        engine.step(slots[0], PROMPT, 9)
    with pytest.raises(ContextFull):
        engine.step(slots[0], np.zeros(60, np.int64), 7)
    engine.close(slots[0])
    with pytest.raises(EngineFailed, match="not open"):
        engine.step(slots[0], PROMPT, 0)
    assert engine.open() == slots[0]
    with pytest.raises(EngineFailed, match="after 0 rows"):
        engine.step(slots[0], PROMPT, 1)
    with pytest.raises(EngineFailed, match="vocabulary of 320"):
        engine.step(slots[0], np.array([320]), 0)


def test_long_steps_are_made_in_pieces_and_logits_of_several_rows_are_those_of_each(
    packed: Packed, tmp_path: Path
) -> None:
    tokens = np.arange(2 * MOST_ROWS + 17) % 320
    changes = {"context_tokens": 256 + 64, "slots": 1}
    engine = standard_stage(packed, tmp_path, spec_of(packed, 0, 4, **{**changes, "context_tokens": 256}))
    with pytest.raises(ContextFull):
        engine.step(engine.open(), tokens, 0)
    whole = tokens[:200]
    logits = engine.step(0, whole, 0, 3).copy()
    assert logits.shape == (3, 320)
    by_rows = [engine.step(0, whole[at : at + 1], at).copy() for at in (197, 198, 199)]
    assert np.abs(logits - np.array(by_rows)).max() < 0.05 * logits.std()
    first = standard_stage(packed, tmp_path, spec_of(packed, 0, 1, **{**changes, "context_tokens": 256}))
    assert first.step(first.open(), whole, 0).shape == (200, 64)


def test_what_is_no_number_fails_the_step_and_harms_no_later_one(packed: Packed, tmp_path: Path) -> None:
    engine = standard_stage(packed, tmp_path, spec_of(packed, 1, 3))
    slot = engine.open()
    rows = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float16)
    wanted = engine.step(slot, rows, 0).copy()
    broken = rows.copy()
    broken[2, 5] = np.inf
    with pytest.raises(EngineFailed, match="left the range of f16"):
        engine.step(slot, broken, 0)
    with pytest.raises(EngineFailed, match="expected float16"):
        engine.step(slot, rows.astype(np.float32), 0)
    np.testing.assert_array_equal(engine.step(slot, rows, 0), wanted)


def test_stages_of_both_graphs_can_stand_in_one_ring(packed: Packed, tmp_path: Path) -> None:
    first, second = (spec_of(packed, *bounds) for bounds in ((0, 2), (2, 4)))
    mixed = Ring([load_stage(packed, tmp_path, first), standard_stage(packed, tmp_path, second)])
    wanted = Ring.of(packed, tmp_path, (2,)).step(PROMPT, 0).copy()
    assert np.abs(mixed.step(PROMPT, 0) - wanted).max() < 0.2 * wanted.std()
