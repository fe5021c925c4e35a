"""A sentence encoder under a task module: what it tells and how it learns, against the formulas in double precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.formats.bert import MATRICES, BertFile, read_bert_config  # noqa: E402
from models.lora.adapter import HEAD, AdapterSpec, flat, initial, named, shapes  # noqa: E402
from models.training.encoder import TrainedEncoder  # noqa: E402
from models.training.rounds import Round  # noqa: E402
from models.training.samples import IGNORED, Row, Split, batch_of  # noqa: E402
from tests.models.tiny_bert import mean_of, random_bert, write_bert  # noqa: E402
from wire.errors import CorruptData  # noqa: E402
from wire.messages import ArtifactRef, InboxAddress, RoundMeta, TrainingTask  # noqa: E402

pytestmark = pytest.mark.torch

LABELS = ("net", "games", "sound")
SPEC = AdapterSpec(rank=3, alpha=6.0, matrices=tuple(MATRICES), seed=4, labels=len(LABELS))  # type: ignore[arg-type]
TASK = TrainingTask(
    data="d", tokenizer=ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), rank=3, alpha=6.0,
    matrices=tuple(MATRICES), row_tokens=12, batch_rows=4, steps=4, learning_rate=0.01, most_norm=1.0, held_out=0.2,
    seed=3, labels=LABELS,
)  # fmt: skip
TEXTS = [[2, 4, 5, 3], [2, 7, 8, 9, 10, 11, 3], [2, 12, 3], [2, 13, 14, 15, 3]]


def factors_of(config: Any, seed: int = 1) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes(config, SPEC).items()}


def encoder(folder: Path, factors: dict[str, Any]) -> TrainedEncoder:
    write_bert(folder)
    file = BertFile.open(read_bert_config(folder), folder / "model.safetensors")
    return TrainedEncoder(file, SPEC, factors)


def rows() -> list[Row]:
    return [Row(np.array(ids, np.int64), 1, number % len(LABELS)) for number, ids in enumerate(TEXTS)]


def loss_by_formula(factors: dict[str, Any]) -> float:
    """With the factors' products put into the weights."""
    tensors = {name: values.astype(np.float64) for name, values in random_bert().items()}
    for name, a in factors.items():
        if name.endswith(".a"):
            _, block, matrix, _ = name.split(".")
            b = factors[f"{name[:-1]}b"]
            tensors[f"encoder.layer.{block}.{MATRICES[matrix]}.weight"] += SPEC.scale * b @ a
    head = factors[HEAD]
    total = 0.0
    for row in rows():
        scores = head[:, :-1] @ mean_of(row.ids.tolist(), tensors, 4) + head[:, -1]
        total += np.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[row.label]
    return float(total / len(TEXTS))


@pytest.mark.parametrize("remember", [True, False])
def test_loss_and_gradients_are_those_of_the_formulas(tmp_path: Path, remember: bool) -> None:
    """Texts of unequal length in one batch; gradients against the slope of the loss along random directions."""
    config = read_bert_config(write_bert(tmp_path))
    factors = factors_of(config)
    mine = encoder(tmp_path, factors)
    loss = mine.loss_of(batch_of(rows()), remember)
    doubles = {name: values.astype(np.float64) for name, values in factors.items()}
    assert float(loss.detach()) == pytest.approx(loss_by_formula(doubles), rel=1e-5)
    loss.backward()
    rng = np.random.default_rng(7)
    for part in ("a", "b", "c"):
        way = {
            name: rng.standard_normal(values.shape) if name.endswith(part) else np.zeros(values.shape)
            for name, values in doubles.items()
        }
        step = 1e-5
        ahead, behind = (
            loss_by_formula({name: values + sign * way[name] for name, values in doubles.items()})
            for sign in (step, -step)
        )
        slope = sum(float((leaf.grad.numpy() * way[name]).sum()) for name, leaf in mine.factors.items())
        assert slope == pytest.approx((ahead - behind) / (2 * step), rel=1e-3, abs=1e-6), part


def test_what_it_tells_right_is_counted_and_texts_without_a_label_are_not(tmp_path: Path) -> None:
    config = read_bert_config(write_bert(tmp_path))
    factors = factors_of(config)
    factors[HEAD][:] = 0
    factors[HEAD][1, -1] = 5.0  # all texts are 'games'
    mine = encoder(tmp_path, factors)
    found = mine.judged(batch_of([*rows(), Row(np.array([2, 4, 3]), 1, IGNORED)]))
    assert (found.counted, found.right) == (4, 1)
    assert found.loss == pytest.approx(float(mine.loss_of(batch_of(rows())).detach()), rel=1e-5)


def trained(folder: Path, task: TrainingTask, parts: tuple[Any, ...] = ("a", "b", "c")) -> tuple[Round, Any, Any]:
    config = read_bert_config(write_bert(folder))
    shaped = shapes(config, SPEC)
    start = flat(initial(config, SPEC), shaped)
    asked = RoundMeta(reply=InboxAddress(topic="t"), round=0, parts=parts)
    split = Split(tuple(rows()), tuple(rows()[:2]))
    made = Round(encoder(folder, initial(config, SPEC)), shaped, split, task, 11, asked, start)
    while made.step():
        pass
    return made, made.vector(), start


def test_a_round_learns_the_labels(tmp_path: Path) -> None:
    long = msgspec.structs.replace(TASK, steps=60)
    first, after, start = trained(tmp_path, long)
    assert first.held_out_loss == pytest.approx(np.log(3), rel=1e-5) and first.held_out_count == 2
    assert first.loss is not None and first.loss < 0.8
    assert len(after) == len(start)
    config = read_bert_config(tmp_path)
    judged = encoder(tmp_path, named(after, shapes(config, SPEC))).judged(batch_of(rows()))
    assert judged.right == len(TEXTS)


def test_without_a_part_it_stays_and_the_task_module_goes_along(tmp_path: Path) -> None:
    made, after, _ = trained(tmp_path, TASK, ("b", "c"))
    shaped = shapes(read_bert_config(tmp_path), SPEC)
    sent = named(after, shaped, ("b", "c"))
    assert HEAD in sent and not any(name.endswith(".a") for name in sent)
    before = initial(read_bert_config(tmp_path), SPEC)
    for name, factor in made._stage.factors.items():
        assert np.array_equal(factor.detach().numpy(), before[name]) == name.endswith(".a"), name


def test_pieces_of_a_batch_add_up(tmp_path: Path) -> None:
    _, whole, _ = trained(tmp_path, msgspec.structs.replace(TASK, steps=1, learning_rate=1e-6))
    _, pieces, _ = trained(tmp_path, msgspec.structs.replace(TASK, steps=1, learning_rate=1e-6, rows_at_once=3))
    np.testing.assert_allclose(pieces, whole, atol=1e-8)


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path: Path) -> None:
    config = read_bert_config(write_bert(tmp_path))
    wrong = msgspec.structs.replace(config, intermediate_size=48)
    with pytest.raises(CorruptData, match="is due"):
        TrainedEncoder(BertFile.open(wrong, tmp_path / "model.safetensors"), SPEC, {})
