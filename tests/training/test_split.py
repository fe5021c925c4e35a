"""A model that is split over devices and a trunk learns as in one place: gradients, losses, factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.cache import cache_dir  # noqa: E402
from models.catalog import find  # noqa: E402
from models.fetch import is_cached  # noqa: E402
from models.lora.adapter import HEAD, AdapterSpec, flat, initial, named, shapes  # noqa: E402
from models.lora.whole import weights_of  # noqa: E402
from models.training.samples import Split  # noqa: E402
from tests.models.stages import packed_tiny  # noqa: E402
from tests.models.tiny_bert import write_bert  # noqa: E402
from tests.training.split_models import InOnePlace, Together, bert, llama, rows_of, task_of  # noqa: E402
from wire.errors import PeerError  # noqa: E402

pytestmark = pytest.mark.torch

DEVICES = ("a", "b", "c")
STEPS = 20
SPEC = AdapterSpec(rank=3, alpha=6.0, matrices=("q", "v", "down"), seed=4)


def factors(config: Any, spec: AdapterSpec) -> dict[str, Any]:
    """Small, and none of them zeros."""
    rng = np.random.default_rng(1)
    return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes(config, spec).items()}


def begun(config: Any, spec: AdapterSpec) -> dict[str, Any]:
    """As a job begins, but for B, so that A has gradients, too."""
    rng = np.random.default_rng(2)
    return {
        name: values if name.endswith(".a") else (0.01 * rng.standard_normal(values.shape)).astype(np.float32)
        for name, values in initial(config, spec).items()
    }


def halves_of(kind: str, folder: Path, cuts: tuple[int, ...] = ()) -> Any:
    if kind in ("bert", "blocks"):
        write_bert(folder)
        from models.formats.bert import BertFile, read_bert_config

        spec = AdapterSpec(rank=3, alpha=6.0, matrices=("q", "v", "down"), seed=4, labels=3, blocks=kind == "blocks")
        if kind == "blocks":
            config = read_bert_config(folder)
            begun = {**factors(config, spec), **weights_of(BertFile.open(config, folder / "model.safetensors"))}
            return bert(folder, spec, DEVICES, begun, cuts)
        return bert(folder, spec, DEVICES, factors(read_bert_config(folder), spec), cuts)
    packed = packed_tiny(folder, "llama", kind, "f32")
    return llama(packed, folder, SPEC, DEVICES, factors(packed.config, SPEC), cuts)


def rows_for(halves: Any) -> dict[str, Split]:
    """Of unequal size, with rows held out."""
    rng = np.random.default_rng(5)
    vocabulary, labels = halves.config.vocabulary, halves.spec.labels
    sizes = zip(DEVICES, (5, 9, 4), strict=True)
    return {
        device: Split(rows_of(rng, count, vocabulary, labels), rows_of(rng, 2, vocabulary, labels))
        for device, count in sizes
    }


def start_of(halves: Any) -> Any:
    begun = {name: factor.detach().numpy() for name, factor in halves.whole.factors.items()}
    return flat(begun, halves.shaped)


def parts_of(halves: Any) -> tuple[str, ...]:
    if halves.spec.blocks:
        return ("w", "c")
    return ("a", "b", "c") if halves.spec.labels else ("a", "b")


@pytest.mark.parametrize("cuts", [(), (1,)])
@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize("kind", ["f32", "int4", "bert", "blocks"])
def test_gradients_losses_and_factors_are_those_of_training_in_one_place(
    kind: str, remember: bool, cuts: tuple[int, ...], tmp_path: Path
) -> None:
    halves = halves_of(kind, tmp_path, cuts)
    rows, task, start, parts = (
        rows_for(halves),
        task_of(halves.spec, STEPS, remember=remember),
        start_of(halves),
        parts_of(halves),
    )
    split = Together(halves, rows, task, start, parts)
    one = InOnePlace(halves, rows, task, start, parts)
    split.judge()
    for step in range(STEPS):
        loss, expected = split.step(), one.step()
        assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5), step
        found = split.gradients()
        assert found.keys() == one.gradients().keys()
        for name, gradient in one.gradients().items():
            assert np.abs(found[name] - gradient).max() < 1e-5, (step, name)
    assert all(segment.over for segment in split.segments)
    found, expected = (named(made.vector(), halves.shaped, parts) for made in (split, one))
    for name in found:
        if not name.endswith(".k.bias.w"):  # shifts all scores of a row alike: its gradient is zero, but for rounding
            assert np.abs(found[name] - expected[name]).max() < 1e-4, name
    assert np.abs(one.vector() - start[: len(one.vector())]).max() > 0.01, "it has learnt something"


def test_the_order_in_which_devices_are_heard_changes_no_bit(tmp_path: Path) -> None:
    made = []
    for number, order in enumerate((("a", "b", "c"), ("c", "a", "b"))):
        (tmp_path / str(number)).mkdir()
        halves = halves_of("f32", tmp_path / str(number))
        split = Together(halves, rows_for(halves), task_of(halves.spec, 3), start_of(halves), parts_of(halves))
        split.judge()
        for _ in range(3):
            split.step(order)
        made.append(split.trunk.vector())
    assert np.array_equal(*made)


@pytest.mark.parametrize("kind", ["f32", "bert"])
def test_what_is_held_out_is_judged_as_by_the_whole_model(kind: str, tmp_path: Path) -> None:
    from models.training.samples import batch_of

    halves = halves_of(kind, tmp_path)
    rows = rows_for(halves)
    split = Together(halves, rows, task_of(halves.spec, 1), start_of(halves), parts_of(halves))
    split.judge()
    for device, end in split.ends.items():
        found = halves.whole.judged(batch_of(rows[device].held_out))
        assert end.held_out_loss == pytest.approx(found.loss, rel=1e-4)
        assert (end.held_out_count, end.held_out_right) == (found.counted, found.right)


@pytest.mark.parametrize("kind", ["f32", "bert", "blocks"])
def test_where_the_trunk_is_cut_changes_no_bit(kind: str, tmp_path: Path) -> None:
    made = []
    for number, cuts in enumerate(((), (2,), (1, 2, 3))):
        (tmp_path / str(number)).mkdir()
        halves = halves_of(kind, tmp_path / str(number), cuts)
        split = Together(halves, rows_for(halves), task_of(halves.spec, 3), start_of(halves), parts_of(halves))
        split.judge()
        losses = [split.step() for _ in range(3)]
        made.append(np.concatenate([split.vector(), losses]))
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[2])


def test_only_the_parts_of_the_rule_are_trained(tmp_path: Path) -> None:
    halves = halves_of("bert", tmp_path)
    split = Together(halves, rows_for(halves), task_of(halves.spec, 1), start_of(halves), ("b", "c"))
    split.judge()
    split.step()
    before = factors(halves.config, halves.spec)
    for name, factor in halves.trunk.factors.items():
        moved = not np.array_equal(factor.detach().numpy(), before[name])
        assert moved == (name[-1] in "bc"), name


def question_of(split: Together) -> tuple[Any, Any]:
    """A step of one device, and its gradients."""
    split.judge()
    question = split.ends["a"].question()
    features = split.trunk.forwards("a", question, 5)
    return question, split.ends["a"].answered(features)


def test_gradients_that_can_t_be_are_refused_and_change_nothing(tmp_path: Path) -> None:
    halves = halves_of("bert", tmp_path)
    split = Together(halves, rows_for(halves), task_of(halves.spec, 1), start_of(halves), ("a", "b", "c"))
    question, gradients = question_of(split)
    wrong = {
        "are no numbers": np.where(np.arange(len(gradients)) == 3, np.nan, gradients).astype(np.float32),
        "were due": gradients[:-1],
        "features are": gradients * np.float32(1e6),
    }
    head = gradients.copy()
    head[-halves.shaped[HEAD][0] * halves.shaped[HEAD][1] :] *= 1e6
    wrong["the task module are"] = head
    for words, values in wrong.items():
        with pytest.raises(PeerError, match=words):
            split.trunk.take("a", question.step, values)
    assert split.trunk.waits_for == DEVICES
    assert split.trunk.take("a", question.step, gradients)
    assert split.trunk.waits_for == ("b", "c") and not split.trunk.addable
    assert not split.trunk.take("a", question.step, gradients), "what comes twice counts once"
    assert split.trunk.forwards("a", question, 5) is None
    assert split.trunk.step == 0


def test_features_that_can_t_be_are_refused(tmp_path: Path) -> None:
    halves = halves_of("f32", tmp_path)
    split = Together(halves, rows_for(halves), task_of(halves.spec, 1), start_of(halves), ("a", "b"))
    end = split.ends["b"]
    while (question := end.question()) is not None and question.judged:
        features = split.trunk.judged("b", question)
        for values in (features[:-1], np.full_like(features, np.inf)):
            with pytest.raises(ValueError, match="were due"):
                end.answered(values)
        end.answered(features)
    assert question is not None


@pytest.mark.timeout(400)
@pytest.mark.slow
@pytest.mark.parametrize(("model", "cuts"), [("smollm2", (2, 4)), ("minilm", ()), ("minilm", (2, 4))])
def test_real_models_learn_as_in_one_place(model: str, cuts: tuple[int, ...], tmp_path: Path) -> None:
    """Three devices, a trunk on one or three, twenty steps, SmolLM2 and MiniLM with float32 weights. Their words
    make no sense, so that gradients are large: a learning rate that suits them."""
    from models.build.pack import pack
    from models.formats.bert import read_bert_config
    from models.formats.checkpoint import open_checkpoint

    entry = find(model)
    assert entry is not None
    if not is_cached(entry, cache_dir()):
        pytest.skip(f"{entry.name} is not in the cache: edgelam model fetch {model}")
    if model == "minilm":
        folder = entry.path(cache_dir())
        folder = folder if folder.is_dir() else folder.parent
        spec = AdapterSpec(rank=8, alpha=16.0, matrices=("q", "v"), seed=4, labels=30)
        config = read_bert_config(folder)
        halves = bert(folder, spec, DEVICES, begun(config, spec), cuts)
    else:
        spec = AdapterSpec(rank=8, alpha=16.0, matrices=("q", "v"), seed=4)
        packed = pack(open_checkpoint(entry.path(cache_dir()), cache_dir()), "f32", "f32", cache_dir())
        halves = llama(packed, tmp_path, spec, DEVICES, begun(packed.config, spec), cuts)
    start = flat(begun(halves.config, halves.spec), halves.shaped)
    rng = np.random.default_rng(5)
    rows = {
        device: Split(rows_of(rng, count, 20_000, spec.labels, 24), ())
        for device, count in zip(DEVICES, (5, 9, 4), strict=True)
    }
    task = task_of(spec, STEPS, batch_rows=2, learning_rate=2e-4)
    split = Together(halves, rows, task, start, parts_of(halves))
    one = InOnePlace(halves, rows, task, start, parts_of(halves))
    losses = []
    for step in range(STEPS):
        loss, expected = split.step(), one.step()
        losses.append(loss)
        assert loss == pytest.approx(expected, rel=1e-4), step
        if step == 0:  # from then on factors differ in their last digits, and gradients by what that makes of them
            found = split.gradients()
            for name, gradient in one.gradients().items():
                assert np.abs(found[name] - gradient).max() < 1e-5, name
    assert losses[-1] < losses[0]
