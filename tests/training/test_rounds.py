"""A device's round: the same bits each time, less loss than before, and the mean of two devices as by one of both."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.lora.adapter import AdapterSpec, flat, initial, named, shapes  # noqa: E402
from models.training.rounds import Diverged, Round  # noqa: E402
from models.training.samples import Row, Split  # noqa: E402
from tests.models.stages import packed_tiny  # noqa: E402
from tests.training.test_llama import stage  # noqa: E402
from wire.messages import ArtifactRef, InboxAddress, RoundMeta, TrainingTask  # noqa: E402

pytestmark = pytest.mark.torch

SPEC = AdapterSpec(rank=2, alpha=4.0, matrices=("q", "v"), seed=3)
TASK = TrainingTask(
    data="d", tokenizer=ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), rank=2, alpha=4.0, matrices=("q", "v"),
    row_tokens=12, batch_rows=2, steps=4, learning_rate=0.02, most_norm=1.0, held_out=0.2, seed=3,
)  # fmt: skip


def made(folder: Path, task: TrainingTask = TASK, count: int = 6, **changes):
    packed = packed_tiny(folder)
    shaped = shapes(packed.config, SPEC)
    start = flat(initial(packed.config, SPEC), shaped)
    rng = np.random.default_rng(5)
    rows = tuple(Row(rng.integers(0, packed.graph.vocabulary, 4 + number), 1) for number in range(count))
    trained = stage(packed, folder, 0, packed.graph.blocks, initial(packed.config, SPEC), SPEC)
    start_now, guard = changes.pop("start", start), changes.pop("guard", None)
    asked = RoundMeta(**{"reply": InboxAddress(topic="t"), "round": 0, "parts": ("a", "b"), **changes})
    return Round(trained, shaped, Split(rows[1:], rows[:1]), task, 11, asked, start_now, guard), shaped, start


def through(made_round: Round):
    while made_round.step():
        pass
    return made_round.vector()


def test_the_same_round_gives_the_same_bits(tmp_path: Path) -> None:
    first, _, start = made(tmp_path)
    again, _, _ = made(tmp_path)
    one, other = through(first), through(again)
    assert (one == other).all() and not (one == start).all()
    assert first.loss == again.loss and first.held_out_loss == again.held_out_loss
    another, _, _ = made(tmp_path, round=1)
    assert not (through(another) == one).all()


def test_training_learns_what_it_is_shown(tmp_path: Path) -> None:
    task = msgspec.structs.replace(TASK, steps=30)
    first, _, _ = made(tmp_path, task)
    after = through(first)
    second, _, _ = made(tmp_path, task, start=after)
    through(second)
    assert second.loss is not None and first.loss is not None and second.loss < first.loss - 0.05


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_gradients_of_fewer_rows_add_up_to_those_of_all(tmp_path: Path, at_once: int) -> None:
    """Rows of unequal length: each counts by its tokens, not as a piece."""
    task = msgspec.structs.replace(TASK, batch_rows=5, steps=1)
    whole, _, _ = made(tmp_path, task)
    pieces, _, _ = made(tmp_path, msgspec.structs.replace(task, rows_at_once=at_once))
    through(whole), through(pieces)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-5)
    assert pieces.held_out_loss == pytest.approx(whole.held_out_loss, rel=1e-5)
    compared = 0
    for name, leaf in whole._leaves.items():
        one, other = leaf.grad.numpy(), pieces._leaves[name].grad.numpy()
        assert np.abs(one - other).max() <= 1e-5 * max(1e-3, np.abs(one).max()), name
        compared += int(np.abs(one).max() > 1e-4)
    assert compared >= 4


def test_what_is_not_trained_stays_and_is_not_sent(tmp_path: Path) -> None:
    made_round, shaped, start = made(tmp_path, parts=("b",))
    found = named(through(made_round), shaped, ("b",))
    assert set(found) == {name for name in shaped if name.endswith("b")}
    before = named(start, shaped)
    stage_factors = made_round._stage.factors
    for name in shaped:
        same = np.array_equal(stage_factors[name].detach().numpy(), before[name])
        assert same == name.endswith("a"), name


def test_to_judge_is_not_to_train(tmp_path: Path) -> None:
    made_round, _, start = made(tmp_path, train=False)
    assert (through(made_round) == start).all()
    assert made_round.loss is None and made_round.held_out_loss is not None
    assert made_round.held_out_count == 3


def test_factors_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the factors have"):
        made(tmp_path, start=np.zeros(3, np.float32))


def test_what_diverges_says_so(tmp_path: Path) -> None:
    made_round, _, _ = made(tmp_path)
    made_round._stage.factors["block.0.q.a"].data[0, 0] = float("nan")
    with pytest.raises(Diverged, match="learning_rate"):
        try:
            through(made_round)
        except Diverged as error:
            raise Diverged(f"{error.message}; {error.try_}") from None
