"""A device's private steps of a split model: clipped sample by sample, noised once, and the same bits again."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from models.lora.adapter import AdapterSpec, flat, named  # noqa: E402
from models.privacy.noise import Stream  # noqa: E402
from models.privacy.plan import Measure, most_drawn  # noqa: E402
from models.training.lowrank import trunk_kind  # noqa: E402
from models.training.private import Guard  # noqa: E402
from models.training.privateends import PrivateEnds  # noqa: E402
from models.training.samples import NOTHING, Row, Split, batch_of  # noqa: E402
from models.training.split import Question  # noqa: E402
from models.training.trunk import Place  # noqa: E402
from tests.training.split_models import Halves, asked, rows_of, task_of  # noqa: E402
from tests.training.test_lowrank import SPEC, factors, halves_of  # noqa: E402
from wire.messages import RoundMeta  # noqa: E402
from wire.privacy import Privacy  # noqa: E402

pytestmark = pytest.mark.torch

STEPS = 4
ALL = Measure(noise=1.0, share=1.0, releases=STEPS, deviation=0.0)
"""Everybody takes part, and there is no noise."""


class Paid:
    """Who gives numbers for nothing, and keeps what steps they were for."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.steps: list[int] = []

    def draws(self, step: int) -> Stream:
        return Stream(bytes(32), f"who/{step}")

    def paid(self, step: int, came: Any) -> Stream:
        self.steps.append(step)
        return Stream(bytes(32), f"noise/{step}/{hashlib.sha256(came.tobytes()).hexdigest()}")


class Pair:
    """A device and a trunk."""

    def __init__(
        self, folder: Path, measure: Measure = ALL, rows: int = 5, spec: AdapterSpec = SPEC, **privacy: Any
    ) -> None:
        self.halves: Halves = halves_of("f32", folder, (), spec)
        rng = np.random.default_rng(5)
        vocabulary = self.halves.config.vocabulary
        self.rows = rows_of(rng, rows, vocabulary, 0)
        self.task = task_of(
            spec, STEPS, uplink_grad="lowrank", privacy=Privacy(**{"epsilon": 4.0, "clip": 1e6, **privacy})
        )
        self.held_out = rows_of(rng, 2, vocabulary, 0)
        self.begin(measure)

    def begin(self, measure: Measure, meta: RoundMeta | None = None, **changes: Any) -> None:
        halves, meta = self.halves, meta or asked(("b",))
        task = msgspec.structs.replace(self.task, **changes)
        place = Place()
        start = flat(factors(halves.config, halves.spec), halves.shaped)
        self.trunk = trunk_kind(task, place)(halves.trunk, halves.shaped, task, meta, start, ("a",), place)
        self.paid = Paid(measure)
        rows = Split(self.rows, self.held_out)
        self.end = PrivateEnds(halves.ends["a"], halves.shaped, rows, task, 1, meta, self.paid)

    def ask(self) -> tuple[Question, Any]:
        question = self.end.question()
        assert question is not None and not question.judged
        came = self.trunk.forwards("a", question, len(self.rows))
        assert came is not None
        return question, came

    def step(self) -> Any:
        question, came = self.ask()
        found = self.end.answered(came)
        assert found is not None and self.trunk.take("a", question.step, found)
        self.trunk.backwards()
        self.trunk.make_step(self.trunk.square(0.0))
        return found

    def by_sample(self, row: Row) -> Any:
        """[d r] its gradient by B, of the whole model, by autograd."""
        stage, shaped = self.halves.whole, self.halves.shaped
        stage.take(named(flat(factors(self.halves.config, self.halves.spec), shaped), shaped))
        stage.train_only(("b",))
        [leaf] = [leaf for name, leaf in stage.factors.items() if name[-1] == "b"]
        leaf.grad = None
        stage.loss_of(batch_of([row])).backward()
        return leaf.grad.numpy().reshape(-1).astype(float)


def test_a_sample_s_gradient_is_that_of_the_whole_model(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    _, came = pair.ask()
    found = pair.end.answered(came)
    one_by_one = [pair.by_sample(row) for row in pair.rows]
    assert min(np.abs(one).max() for one in one_by_one) > 1e-4
    np.testing.assert_allclose(found, np.mean(one_by_one, axis=0), atol=1e-6)
    alone = Pair(tmp_path / "alone", rows=1)
    _, came = alone.ask()
    np.testing.assert_allclose(alone.end.answered(came), alone.by_sample(alone.rows[0]), atol=1e-6)


def test_each_sample_is_clipped_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(tmp_path)
    one_by_one = [pair.by_sample(row) for row in pair.rows]
    lengths = sorted(float(np.linalg.norm(one)) for one in one_by_one)
    clip = (lengths[1] + lengths[2]) / 2  # some are clipped, others are not
    seen: list[float] = []
    real = Guard.clipped

    def watched(self: Guard, vector: Any, *shape: Any) -> Any:
        found = real(self, vector, *shape)
        seen.append(float(np.linalg.norm(found.astype(float))))
        return found

    monkeypatch.setattr(Guard, "clipped", watched)
    pair.begin(ALL, privacy=Privacy(epsilon=4.0, clip=clip))
    _, came = pair.ask()
    found = pair.end.answered(came)
    assert len(seen) == len(pair.rows) and max(seen) <= clip * (1 + 1e-6)
    assert [length < clip * 0.999 for length in sorted(seen)] == [True, True, False, False, False]
    expected = sum(one * min(1.0, clip / np.linalg.norm(one)) for one in one_by_one) / len(pair.rows)
    np.testing.assert_allclose(found, expected, atol=1e-6 * clip + 1e-7)


def test_noise_has_its_deviation_over_a_hundred_thousand_draws(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, rank=32)
    noisy = Measure(noise=3.0, share=0.5, releases=1, deviation=0.25)
    pair = Pair(tmp_path, noisy._replace(deviation=0.0), rows=4, spec=spec, clip=0.125)

    def sums(count: int) -> Any:
        """What goes out of so many steps with the same samples, as a sum."""
        pair.paid.draws = lambda _: Stream(bytes(32), "who")  # type: ignore[method-assign]
        question, came = pair.ask()
        assert len(question.states) > 1
        found = [pair.end.answered(came)]
        while len(found) < count:
            pair.end._done = len(found)
            found.append(pair.end.answered(came))
        return np.stack(found) * noisy.share * len(pair.rows)

    [quiet] = sums(1)
    pair.begin(noisy)
    noise = sums(1 + 100_000 // len(quiet)) - quiet
    assert noise.size >= 100_000 and np.abs(quiet).max() > 1e-3
    assert noise.std() == pytest.approx(noisy.deviation, rel=0.02)
    assert abs(noise.mean()) < 4 * noisy.deviation / np.sqrt(noise.size)
    assert len({one.tobytes() for one in noise}) == len(noise), "each step has noise of its own"


def test_a_step_made_again_is_the_same_bits_and_of_other_features_is_not(tmp_path: Path) -> None:
    noisy = Measure(noise=1.0, share=0.5, releases=STEPS, deviation=0.5)
    pair = Pair(tmp_path, noisy)
    first = [pair.step() for _ in range(STEPS)]
    pair.begin(noisy)
    again = [pair.step() for _ in range(STEPS)]
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert pair.end.question() is None and pair.paid.steps == list(range(STEPS))
    pair.begin(noisy)
    _, came = pair.ask()
    quiet, moved = first[0], came + np.float32(1e-6)
    found = pair.end.answered(moved)
    assert found is not None and np.abs(found - quiet).max() > 0.05, "other noise, or their difference would tell"


def test_who_takes_part_is_drawn_by_chance_and_nobody_is_an_empty_row(tmp_path: Path) -> None:
    pair = Pair(tmp_path, Measure(noise=1.0, share=0.4, releases=STEPS, deviation=0.0))
    counts = []
    for step in range(40):
        pair.end._done = step % STEPS
        pair.paid.draws = lambda _, at=step: Stream(bytes(32), f"{at}")  # type: ignore[method-assign]
        batch = pair.end._next_batch()
        expected = Stream(bytes(32), f"{step}").sampled(len(pair.rows), 0.4)
        assert [list(row.ids) for row in pair.end._taken] == [list(pair.rows[number].ids) for number in expected]
        assert len(batch.ids) == max(1, len(expected))
        counts.append(len(expected))
    assert min(counts) == 0 and 0.3 < np.mean(counts) / len(pair.rows) < 0.5
    pair.begin(Measure(noise=1.0, share=1e-9, releases=STEPS, deviation=0.25))
    question, came = pair.ask()
    assert question.states.shape[:2] == (1, 1)
    found = pair.end.answered(came)
    assert found is not None and np.abs(found).max() > 0, "noise alone"


def test_rows_that_teach_nothing_are_counted_and_no_more_are_drawn_than_messages_hold(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.rows = (*pair.rows, NOTHING)
    pair.begin(ALL)
    _, came = pair.ask()
    one_by_one = [pair.by_sample(row) for row in pair.rows[:-1]]
    np.testing.assert_allclose(pair.end.answered(came), np.sum(one_by_one, axis=0) / 6, atol=1e-6)
    pair.rows = rows_of(np.random.default_rng(1), 60, pair.halves.config.vocabulary, 0)
    pair.begin(ALL, batch_rows=2)
    question, _ = pair.ask()
    assert len(question.states) == most_drawn(2) < 60


def test_no_loss_is_told_unless_the_job_says_so(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.step()
    assert pair.end.loss is None and pair.end.held_out_loss is None and pair.end.held_out_count == 0
    pair.begin(ALL, privacy=Privacy(epsilon=4.0, losses=True))
    question = pair.end.question()
    assert question is not None and question.judged
    assert pair.end.answered(pair.trunk.judged("a", question)) is None and pair.end.held_out_loss is not None
    pair.step()
    assert pair.end.loss is None


def test_a_gradient_that_is_no_number_is_nothing_and_is_not_told(tmp_path: Path) -> None:
    pair = Pair(tmp_path, ALL._replace(deviation=1e-3))
    _, came = pair.ask()
    pair.end._stage = type("Odd", (), {"loss_at": lambda _, features, __: features.sum() * np.nan})()
    found = pair.end.answered(came)
    assert found is not None and np.isfinite(found).all() and 0 < np.abs(found).max() < 0.01


@pytest.mark.parametrize(
    ("parts", "changes"),
    [
        (("a",), {}),
        (("a", "b"), {}),
        (("b",), {"uplink_grad": "cut"}),
        (("b",), {"privacy": Privacy(epsilon=4.0, unit="device")}),
        (("b",), {"privacy": None}),
    ],
)
def test_what_no_noise_covers_is_not_begun(parts: Any, changes: Any, tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    with pytest.raises(ValueError, match="that no noise covers"):
        pair.begin(ALL, asked(parts), **changes)
