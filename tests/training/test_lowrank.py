"""Gradients by what the last low-rank matrix makes are those by features, and fewer numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.formats.bert import read_bert_config  # noqa: E402
from models.lora.adapter import AdapterSpec, flat, named, shapes  # noqa: E402
from models.training.rounds import Round  # noqa: E402
from models.training.samples import Split  # noqa: E402
from tests.models.stages import packed_tiny  # noqa: E402
from tests.models.tiny_bert import write_bert  # noqa: E402
from tests.training.split_models import (  # noqa: E402
    Halves,
    InOnePlace,
    Together,
    asked,
    bert,
    llama,
    rows_of,
    task_of,
)
from wire.errors import PeerError  # noqa: E402
from wire.messages import TrainingTask  # noqa: E402

pytestmark = pytest.mark.torch

DEVICES = ("a", "b", "c")
STEPS = 20
RANK = 3
SPEC = AdapterSpec(rank=RANK, alpha=6.0, matrices=("down",), seed=4, last_only=True)
RULES: dict[str, tuple[str, ...]] = {"fedavg": ("a", "b"), "ffa": ("b",), "rolora's A": ("a",)}
CASES = [
    *(("f32", rule, remember, cuts) for rule in RULES for remember, cuts in ((True, ()), (False, (1, 3)))),
    ("int4", "fedavg", True, (2,)),
]


def factors(config: Any, spec: AdapterSpec = SPEC) -> dict[str, Any]:
    """Small, and none of them zeros."""
    rng = np.random.default_rng(1)
    return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes(config, spec).items()}


def halves_of(kind: str, folder: Path, cuts: tuple[int, ...] = (), spec: AdapterSpec = SPEC) -> Halves:
    folder.mkdir(exist_ok=True)
    if kind == "bert":
        write_bert(folder)
        return bert(folder, spec, DEVICES, factors(read_bert_config(folder), spec), cuts)
    packed = packed_tiny(folder, "llama", kind, "f32")
    return llama(packed, folder, spec, DEVICES, factors(packed.config, spec), cuts)


def rows_for(halves: Halves) -> dict[str, Split]:
    """Of unequal size, with rows held out."""
    rng = np.random.default_rng(5)
    vocabulary, labels = halves.config.vocabulary, halves.spec.labels
    return {
        device: Split(rows_of(rng, count, vocabulary, labels), rows_of(rng, 2, vocabulary, labels))
        for device, count in zip(DEVICES, (5, 9, 4), strict=True)
    }


def together(halves: Halves, task: TrainingTask, parts: tuple[str, ...]) -> Together:
    start = flat(factors(halves.config, halves.spec), halves.shaped)
    made = Together(halves, rows_for(halves), task, start, parts)
    made.judge()
    return made


def lowrank(**changes: Any) -> TrainingTask:
    return task_of(SPEC, STEPS, **{"uplink_grad": "lowrank", **changes})


@pytest.mark.parametrize(("kind", "rule", "remember", "cuts"), CASES)
def test_it_learns_as_by_features_and_as_in_one_place(
    kind: str, rule: str, remember: bool, cuts: tuple[int, ...], tmp_path: Path
) -> None:
    parts, task = RULES[rule], lowrank(remember=remember)
    halves = halves_of(kind, tmp_path / "lowrank", cuts)
    short = together(halves, task, parts)
    long = together(halves_of(kind, tmp_path / "cut", cuts), msgspec.structs.replace(task, uplink_grad="cut"), parts)
    start = flat(factors(halves.config), halves.shaped)
    one = InOnePlace(halves, rows_for(halves), task, start, parts)
    for step in range(STEPS):
        losses = [made.step() for made in (short, long, one)]
        assert losses == pytest.approx([losses[2]] * 3, rel=1e-5, abs=1e-5), step
        expected = one.gradients()
        assert short.gradients().keys() == long.gradients().keys() == expected.keys()
        for name, gradient in expected.items():
            assert np.abs(gradient).max() > 1e-4
            for made in (short, long):
                np.testing.assert_allclose(made.gradients()[name], gradient, atol=1e-5, err_msg=f"{step} {name}")
    assert all(segment.over for segment in short.segments)
    np.testing.assert_allclose(short.vector(), long.vector(), atol=1e-5)
    np.testing.assert_allclose(short.vector(), one.vector(), atol=1e-5)
    before = flat(named(start, halves.shaped), halves.shaped, parts)
    assert np.abs(short.vector() - before).max() > 0.01, "it has learnt something"
    for device, end in short.ends.items():
        assert end.held_out_loss == pytest.approx(long.ends[device].held_out_loss, rel=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_said_has_as_many_numbers_as_it_needs(rule: str, tmp_path: Path) -> None:
    halves, parts = halves_of("f32", tmp_path), RULES[rule]
    made, width = together(halves, lowrank(), parts), halves.config.hidden
    a, b = "a" in parts, "b" in parts
    for step in range(3):
        for device, end in made.ends.items():
            question = end.question()
            assert question is not None
            rows = question.lengths.size * question.states.shape[1]
            features = made.trunk.forwards(device, question, 5)
            assert features is not None
            of_b = width * RANK if a and (b or step == 0) else 0
            assert features.size == rows * width + of_b + (rows * RANK if b else 0)
            back = end.answered(features)
            assert back is not None and back.size == (rows * RANK if a else 0) + (width * RANK if b else 0)
            assert made.trunk.take(device, step, back)
        while made.trunk.addable:
            made.trunk.backwards()
        made.trunk.make_step(made.trunk.square(0.0))


@pytest.mark.parametrize("remember", [True, False])
def test_neither_a_cut_nor_the_order_of_devices_changes_a_bit(remember: bool, tmp_path: Path) -> None:
    found = []
    for number, (cuts, order) in enumerate((((), DEVICES), ((2,), ("c", "a", "b")), ((1, 2, 3), DEVICES))):
        made = together(halves_of("f32", tmp_path / str(number), cuts), lowrank(remember=remember), ("a", "b"))
        losses = [made.step(order) for _ in range(3)]
        found.append((made.vector(), losses))
    assert all(np.array_equal(vector, found[0][0]) and losses == found[0][1] for vector, losses in found)


@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize("kind", ["f32", "bert"])
def test_blocks_without_factors_keep_nothing_and_ask_for_no_gradient(kind: str, remember: bool, tmp_path: Path) -> None:
    """By features, with factors of several matrices in the last block."""
    labels = 3 if kind == "bert" else 0
    spec = AdapterSpec(rank=RANK, alpha=6.0, matrices=("q", "v", "down"), seed=4, last_only=True, labels=labels)
    halves, parts = halves_of(kind, tmp_path, (1, 2), spec), ("a", "b", *(("c",) if labels else ()))
    task = task_of(spec, STEPS, remember=remember)
    made = together(halves, task, parts)
    one = InOnePlace(halves, rows_for(halves), task, flat(factors(halves.config, spec), halves.shaped), parts)
    assert [len(segment._leaves) for segment in made.segments] == [0, 0, 6 + bool(labels)]
    for _ in range(STEPS):
        assert made.step() == pytest.approx(one.step(), rel=1e-5, abs=1e-5)
    assert [len(segment.vector()) for segment in made.segments[:-1]] == [0, 0]
    np.testing.assert_allclose(made.vector(), one.vector(), atol=1e-4)
    again = together(halves, task, parts)
    question = again.ends["a"].question()
    assert question is not None
    for segment in again.segments:
        states = segment.forwards("a", question, 5)
        assert states is not None
        question = question._replace(states=states)
    held = [sum(tensor.numel() for tensor in segment._asked["a"]) for segment in again.segments]
    assert held[:2] == [0, 0] and held[2] > 0


@pytest.mark.parametrize("kind", ["f32", "bert"])
def test_a_whole_model_with_factors_in_the_last_block_learns_alike_however_it_remembers(
    kind: str, tmp_path: Path
) -> None:
    labels = 3 if kind == "bert" else 0
    spec = msgspec.structs.replace(SPEC, matrices=("q", "down"), labels=labels)
    halves, found = halves_of(kind, tmp_path, (), spec), []
    rows, start = rows_for(halves)["a"], flat(factors(halves.config, spec), halves.shaped)
    parts: Any = ("a", "b", *(("c",) if labels else ()))
    for remember in (True, False):
        task = task_of(spec, 3, remember=remember)
        made = Round(halves.whole, halves.shaped, rows, task, 1, asked(parts), start)
        while made.step():
            pass
        found.append(made.vector())
    assert np.array_equal(*found) and np.abs(found[0] - start).max() > 0.01


def test_gradients_that_can_t_be_are_refused_and_change_nothing(tmp_path: Path) -> None:
    made = together(halves_of("f32", tmp_path), lowrank(), ("a", "b"))
    question = made.ends["a"].question()
    assert question is not None
    features = made.trunk.forwards("a", question, 5)
    assert features is not None
    back = made.ends["a"].answered(features)
    assert back is not None
    wrong = np.where(np.arange(len(back)) == 3, np.nan, back).astype(np.float32)
    for values, words in ((wrong, "are no numbers"), (back[:-1], "were due"), (features, "were due")):
        with pytest.raises(PeerError, match=words):
            made.trunk.take("a", 0, values)
    assert made.trunk.waits_for == DEVICES and made.trunk.take("a", 0, np.full_like(back, 3e38))
    for device in ("b", "c"):
        question = made.ends[device].question()
        assert question is not None
        found = made.trunk.forwards(device, question, 5)
        assert found is not None
        back = made.ends[device].answered(found)
        assert back is not None and made.trunk.take(device, 0, back)
    with pytest.raises(PeerError, match="too large to be added") as said:
        made.trunk.backwards()
    assert said.value.device == "a"  # type: ignore[attr-defined]
    assert made.trunk.step == 0


def test_features_that_can_t_be_are_refused(tmp_path: Path) -> None:
    made = together(halves_of("f32", tmp_path), lowrank(), ("a", "b"))
    end = made.ends["a"]
    question = end.question()
    assert question is not None
    features = made.trunk.forwards("a", question, 5)
    assert features is not None
    bad = features.copy()
    bad[-1] = np.inf
    for values in (features[:-1], features[: question.states.size], bad):
        with pytest.raises(ValueError, match="were due"):
            end.answered(values)
    assert end.answered(features) is not None


def test_other_factors_and_other_models_are_refused(tmp_path: Path) -> None:
    for number, changes in enumerate(({"matrices": ("down", "up")}, {"matrices": ("up",)}, {"last_only": False})):
        spec = msgspec.structs.replace(SPEC, **changes)
        halves = halves_of("f32", tmp_path / str(number), (), spec)
        with pytest.raises(ValueError, match="factors of one down are due"):
            together(halves, lowrank(), ("a", "b"))
    halves = halves_of("bert", tmp_path / "bert", (), msgspec.structs.replace(SPEC, labels=3))
    with pytest.raises(ValueError, match="of language models"):
        together(halves, lowrank(labels=("x", "y", "z")), ("a", "b", "c"))
