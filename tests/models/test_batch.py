"""One row of each of several requests in one step: what each gets does not depend on its company."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine.base import ContextFull, EngineFailed, StageEngine
from models.engine.onnx import OnnxStage
from models.engine.places import Places
from tests.models.stages import load_stage, packed_tiny, spec_of, stage_files

SLOTS = 8
LENGTHS = [5, 40, 17, 2, 33, 8, 24, 21]
NEXT = np.array([7, 100, 3, 250, 9, 77, 31, 5], np.int64)


class Stages:
    """A model in stages with eight requests, each after a prompt of its own length."""

    def __init__(self, stages: list[StageEngine]) -> None:
        self.stages = stages
        self.slots = [[stage.open() for stage in stages] for _ in LENGTHS]
        self.rows = list(LENGTHS)
        generator = np.random.default_rng(5)
        for request, length in enumerate(LENGTHS):
            given: Any = generator.integers(0, 300, length)
            for stage, slot in zip(stages, self.slots[request], strict=True):
                given = stage.step(slot, given, 0)

    @classmethod
    def of(cls, folder: Path, family: Any, precision: str, cuts: tuple[int, ...], wire: str = "") -> Stages:
        packed = packed_tiny(folder, family, precision, wire)
        bounds = (0, *cuts, packed.graph.blocks)
        return cls([load_stage(packed, folder, spec_of(packed, a, b, slots=SLOTS)) for a, b in pairwise(bounds)])

    def step(self, requests: list[int], tokens: Any = NEXT) -> dict[int, Any]:
        """Each request's logits after its next token; the row may be run again."""
        given: Any = tokens[requests]
        for number, stage in enumerate(self.stages):
            slots = [self.slots[request][number] for request in requests]
            given, failed = stage.step_many(slots, given, [self.rows[request] for request in requests])
            assert not failed
        return {request: given[index].copy() for index, request in enumerate(requests)}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("precision", ["f32", "int8", "int4"])
@pytest.mark.parametrize("cuts", [(), (1, 3)])
def test_a_row_in_a_batch_does_not_depend_on_size_order_or_company(
    family: Any, precision: str, cuts: tuple[int, ...], tmp_path: Path
) -> None:
    ring = Stages.of(tmp_path, family, precision, cuts)
    wanted = ring.step(list(range(8)))
    assert len({logits.tobytes() for logits in wanted.values()}) == 8
    for requests in ([0, 1], [1, 0], [6, 7], [5, 2], [0, 2, 4], [7, 3, 5, 1], [6, 0, 1, 7, 2], [3, 1, 4, 0, 5, 2, 6]):
        for request, logits in ring.step(requests).items():
            np.testing.assert_array_equal(logits, wanted[request], err_msg=str(requests))
    assert ring.step(list(range(8))).keys() == wanted.keys()
    for request, logits in ring.step([7, 6, 5, 4, 3, 2, 1, 0]).items():
        np.testing.assert_array_equal(logits, wanted[request])


@pytest.mark.parametrize("precision", ["f32", "int4"])
def test_a_request_beside_a_dummy_gets_what_it_gets_beside_another(precision: str, tmp_path: Path) -> None:
    ring = Stages.of(tmp_path, "llama", precision, (2,))
    wanted = ring.step([4, 6])[4]
    for number, stage in enumerate(ring.stages):
        stage.close(ring.slots[0][number])
        ring.slots[0][number] = stage.open()
    ring.rows[0] = 0  # a dummy: one row of nothing, at its beginning
    np.testing.assert_array_equal(ring.step([4, 0], np.where(np.arange(8) == 0, 0, NEXT))[4], wanted)


def test_one_row_given_as_a_batch_is_a_step(tmp_path: Path) -> None:
    ring = Stages.of(tmp_path, "llama", "int4", ())
    [stage] = ring.stages
    wanted = stage.step(ring.slots[1][0], NEXT[1:2], LENGTHS[1]).copy()
    np.testing.assert_array_equal(ring.step([1])[1], wanted)


@pytest.mark.parametrize("wire", ["f16", "bf16"])
def test_groups_that_change_at_every_step_give_what_one_batch_gives(wire: str, tmp_path: Path) -> None:
    """Keys and values that one group wrote are where the next looks for them, moved or not."""
    tokens = np.random.default_rng(8).integers(0, 300, (6, 8))

    def run(plan: list[list[list[int]]]) -> dict[int, Any]:
        ring = Stages.of(tmp_path, "llama", "f32", (2,), wire)
        results: dict[int, Any] = {}
        for turn, groups in enumerate(plan):
            for group in groups:
                results |= ring.step(group, tokens[turn])
            ring.rows = [rows + 1 for rows in ring.rows]
        return results

    together = run([[[0, 1, 2, 3, 4, 5, 6, 7]]] * 6)
    apart = run([[[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 7], [1, 6], [2, 5], [3, 4]]] * 3)
    for request in range(8):
        np.testing.assert_array_equal(apart[request], together[request])


def test_what_travels_in_bare_steps_follows_a_slot_that_moves(tmp_path: Path) -> None:
    ring = Stages.of(tmp_path, "llama", "int4", ())
    [stage] = ring.stages
    slot, at = ring.slots[7][0], LENGTHS[7]
    wanted = stage.step(slot, NEXT[7:8], at).copy()
    row = stage.row(slot)
    assert row is not None
    ring.step([7, 0])
    ring.step([1, 6])
    stage.step(ring.slots[7][0], NEXT[7:8], at)
    assert row.fill(memoryview(NEXT[7:8].astype(np.int32).tobytes()))
    row.run(at)
    row.settle(at)
    np.testing.assert_array_equal(row.result, wanted)


@pytest.fixture(params=["onnx", "torch"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> StageEngine:
    """A whole model with four slots and room for 64 tokens."""
    packed = packed_tiny(tmp_path, "llama", "int4")
    spec = spec_of(packed, 0, 4, slots=4)
    path, weights = stage_files(packed, tmp_path, spec)
    if request.param == "onnx":
        return OnnxStage.load(path, weights, spec)
    pytest.importorskip("torch")
    from models.engine.torch import TorchStage

    return TorchStage.load(path, weights, spec)


def test_a_row_that_can_not_be_run_fails_alone(engine: StageEngine) -> None:
    slots = [engine.open() for _ in range(4)]
    for slot in slots:
        engine.step(slot, np.arange(5), 0)
    engine.step(slots[2], np.arange(59), 5)
    wanted, failed = engine.step_many([slots[0], slots[3]], np.array([9, 9]), [5, 5])
    wanted = wanted.copy()
    assert not failed
    cases = {1: ([9, -1, 9, 9], [5, 5, 5, 5]), 2: ([9, 9, 9, 9], [5, 5, 64, 5]), 0: ([9, 9, 9, 9], [40, 5, 5, 5])}
    for at, (tokens, positions) in cases.items():
        results, failed = engine.step_many([slots[0], slots[1], slots[2], slots[3]], np.array(tokens), positions)
        assert list(failed) == [at] and isinstance(failed[at], (EngineFailed, ContextFull))
        assert results.shape[0] == 4
        np.testing.assert_array_equal(results[3], wanted[1])
    results, failed = engine.step_many([slots[0], slots[1]], np.array([-5, 900]), [5, 5])
    assert sorted(failed) == [0, 1] and len(results) == 2
    results, failed = engine.step_many([slots[0], slots[3]], np.array([9, 9]), [5, 5])
    assert not failed
    np.testing.assert_array_equal(results, wanted)


@pytest.mark.parametrize(("first", "end"), [(1, 3), (3, 4), (4, 4)])
def test_a_row_that_is_no_number_fails_alone(first: int, end: int, tmp_path: Path) -> None:
    packed = packed_tiny(tmp_path, "llama", "int4")
    spec = spec_of(packed, first, end, slots=4, embedding=False)
    stage = load_stage(packed, tmp_path, spec)
    slots = [stage.open() for _ in range(3)]
    given = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float16)
    wanted = stage.step_many(slots, given, [0, 0, 0])[0].copy()
    broken = given.copy()
    broken[1, 7] = np.nan
    results, failed = stage.step_many([slots[2], slots[1], slots[0]], broken[::-1].copy(), [0, 0, 0])
    assert list(failed) == [1] and "left the range" in str(failed[1])
    np.testing.assert_array_equal(results[0], wanted[2])
    np.testing.assert_array_equal(results[2], wanted[0])
    later, failed = stage.step_many(slots, given, [1, 1, 1])
    assert list(failed) == [1], "its row does not count"
    assert np.isfinite(later[[0, 2]].astype(np.float32)).all()


def test_rows_of_another_form_and_doubled_slots_are_refused(engine: StageEngine) -> None:
    first, second = engine.open(), engine.open()
    if isinstance(engine, OnnxStage):
        for slots, given in (([first, first], [1, 1]), ([first, second], [1, 1, 1]), ([first, second], [0.5, 0.5])):
            with pytest.raises(EngineFailed):
                engine.step_many(slots, np.array(given), [0, 0])
    engine.close(second)
    try:
        _, failed = engine.step_many([first, second], np.array([1, 1]), [0, 0])
    except EngineFailed as error:
        assert "not open" in str(error)
    else:
        assert "not open" in str(failed[1])


class _Whole:
    """What Places should hold: the rows of each slot, told apart by their numbers."""

    def __init__(self, folder: Path, slots: int) -> None:
        manifest = load_stage(packed_tiny(folder), folder, spec_of(packed_tiny(folder), 1, 2)).manifest
        self.places = Places(manifest, 16, slots)
        self.open: dict[int, Any] = {}
        self.mark = 0.0

    def check(self) -> None:
        for slot, value in self.open.values():
            for _, view in self.places.views(slot.place, 1):
                assert (view[0, :, : slot.rows] == value).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("places")


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(0, 16)),
        st.tuples(st.just("close"), st.integers(0, 7)),
        st.tuples(st.just("gather"), st.sets(st.integers(0, 7), min_size=2)),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(ACTIONS)
def test_moves_lose_nothing_and_teams_that_step_by_turns_come_to_rest(folder: Path, actions: list[Any]) -> None:
    whole = _Whole(folder, 8)
    places, teams = whole.places, []
    for action, what in actions:
        if action == "open" and len(whole.open) < 8:
            slot = places.open()
            slot.rows, whole.mark = what, whole.mark + 1
            for _, view in places.views(slot.place, 1):
                view[0, :, : slot.rows] = whole.mark
            whole.open[slot.number] = (slot, whole.mark)
        elif action == "close" and what in whole.open:
            places.close(whole.open.pop(what)[0])
            teams = [team for team in teams if what not in {slot.number for slot in team}]
        elif action == "gather" and len(what & whole.open.keys()) > 1:
            team = [whole.open[number][0] for number in sorted(what & whole.open.keys())]
            teams = [team, *(old for old in teams if not set(map(id, old)) & set(map(id, team)))]
            first = places.gather(team, teams[1:])
            assert sorted(slot.place for slot in team) == list(range(first, first + len(team)))
        whole.check()
    for _ in range(2):
        for team in teams:
            places.gather(team, [other for other in teams if other is not team])
    before = [slot.place for slot, _ in whole.open.values()]
    for team in teams:
        places.gather(team, [other for other in teams if other is not team])
    assert [slot.place for slot, _ in whole.open.values()] == before
    whole.check()


def test_a_closed_slot_gives_its_memory_back(folder: Path) -> None:
    def resident_kb() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return int(lines["RssAnon"].split()[0])

    manifest = load_stage(packed_tiny(folder), folder, spec_of(packed_tiny(folder), 0, 4)).manifest
    places = Places(manifest, 8192, 4)
    before = resident_kb()
    slots = [places.open() for _ in range(4)]
    for slot in slots:
        for _, view in places.views(slot.place, 1):
            view[...] = 1
    assert places.used_bytes == 4 * places.slot_bytes
    assert resident_kb() - before > 0.9 * places.used_bytes / 1024
    for slot in slots:
        places.close(slot)
    assert resident_kb() - before < 0.1 * 4 * places.slot_bytes / 1024
