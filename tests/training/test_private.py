"""Rounds that tell no more than they may: clipped sample by sample, noised once, and the same bits again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from agent.workers.training import fingerprint_of  # noqa: E402
from models.lora.adapter import flat, named  # noqa: E402
from models.privacy.accountant import cost, epsilon  # noqa: E402
from models.privacy.noise import Stream  # noqa: E402
from models.privacy.plan import Measure, measure_of  # noqa: E402
from models.training.private import Guard  # noqa: E402
from models.training.rounds import Round  # noqa: E402
from models.training.samples import NOTHING, Row, batch_of  # noqa: E402
from tests.training.test_rounds import TASK, made  # noqa: E402
from wire.messages import ArtifactRef, Privacy  # noqa: E402
from wire.radio import Channel  # noqa: E402

pytestmark = pytest.mark.torch

KEY = bytes(32)
PARTS = ("a", "b")


def private(**fields: Any) -> Any:
    return msgspec.structs.replace(TASK, rounds=10, privacy=Privacy(**{"epsilon": 4.0, **fields}))


def guarded(folder: Path, task: Any, measure: Measure | None = None, label: str = "x", **changes: Any) -> Any:
    measure = measure or measure_of(task, 5, 2, 11, 0)
    return made(folder, task, guard=Guard(task.privacy, measure, Stream(KEY, label)), **changes)


def through(made_round: Round) -> Any:
    while made_round.step():
        pass
    return made_round.vector()


def test_the_same_release_is_the_same_bits_and_another_is_not(tmp_path: Path) -> None:
    for unit in ("sample", "device"):
        task = private(unit=unit)
        first, again, other = (through(guarded(tmp_path, task, label=label)[0]) for label in ("x", "x", "y"))
        assert (first == again).all() and not (first == other).all()


def test_a_private_round_tells_no_loss_unless_the_job_says_so(tmp_path: Path) -> None:
    for unit in ("sample", "device"):
        silent = guarded(tmp_path, private(unit=unit))[0]
        through(silent)
        assert silent.loss is None and silent.held_out_loss is None and silent.held_out_count == 0
        telling = guarded(tmp_path, private(unit=unit, losses=True))[0]
        through(telling)
        assert telling.held_out_loss is not None


@pytest.mark.parametrize("by", ["joint", "per-factor"])
def test_no_sample_moves_the_sum_by_more_than_the_clip(
    by: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = 0.01
    task = private(clip=clip, by=by)
    quiet = Measure(noise=1.0, share=1.0, releases=4, deviation=0.0)
    seen: list[Any] = []
    real = Guard.clipped

    def watched(self: Guard, vector: Any, shaped: Any, parts: Any) -> Any:
        found = real(self, vector, shaped, parts)
        seen.append((vector, found, shaped))
        return found

    monkeypatch.setattr(Guard, "clipped", watched)
    made_round, shaped, _ = guarded(tmp_path, task, quiet)
    through(made_round)
    assert len(seen) == 4 * 5, "each of five samples in each of four steps"
    for before, after, _ in seen:
        pieces = [named(after, shaped, PARTS)]
        lengths = (
            [np.linalg.norm(flat(pieces[0], shaped, (part,)).astype(float)) for part in PARTS]
            if by == "per-factor" else [np.linalg.norm(after.astype(float))]
        )  # fmt: skip
        assert max(lengths) <= clip * (1 + 1e-6)
        assert np.linalg.norm(before.astype(float)) > clip, "or nothing was to be clipped"


def test_the_gradient_is_the_mean_of_the_clipped_ones_and_noise_of_its_deviation(tmp_path: Path) -> None:
    task = private(clip=1e6)  # nothing is clipped
    deviation = 3.0
    measure = Measure(noise=1.0, share=1.0, releases=1, deviation=deviation)
    made_round, shaped, _ = guarded(tmp_path, task, measure)
    guard, leaves, rows = made_round._guard, made_round._leaves, made_round._rows.trained
    one_by_one = np.zeros(sum(leaf.numel() for leaf in leaves.values()))
    for row in rows:
        for leaf in leaves.values():
            leaf.grad = None
        made_round._loss_of(batch_of([row])).backward()
        one_by_one += flat({name: leaf.grad.numpy() for name, leaf in leaves.items()}, shaped, PARTS)
    guard.gradient(rows, made_round._loss_of, leaves, shaped, PARTS)
    found = flat({name: leaf.grad.numpy() for name, leaf in leaves.items()}, shaped, PARTS)
    noise = found * len(rows) - one_by_one
    assert noise.std() == pytest.approx(deviation, rel=4 / math.sqrt(2 * len(noise)))
    assert abs(noise.mean()) < 4 * deviation / math.sqrt(len(noise))


def test_a_device_s_change_is_clipped_and_noised_once(tmp_path: Path) -> None:
    task = private(unit="device", clip=0.05)
    measure = Measure(noise=1.0, share=1.0, releases=1, deviation=0.0)
    made_round, _, start = guarded(tmp_path, task, measure)
    changed = through(made_round) - start
    assert np.linalg.norm(changed.astype(float)) == pytest.approx(0.05, rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_steps_and_is_not_told(tmp_path: Path) -> None:
    for unit in ("sample", "device"):
        made_round, _, start = guarded(tmp_path, private(unit=unit, clip=1e-3))
        leaves = list(made_round._leaves.values())
        made_round._loss_of = lambda _, all_=leaves: sum(leaf.sum() for leaf in all_) * math.nan
        found = through(made_round)
        assert np.isfinite(found).all() and (found != start).any(), "noise alone"


def test_a_row_without_anything_to_learn_changes_nothing(tmp_path: Path) -> None:
    measure = Measure(noise=1.0, share=1.0, releases=1, deviation=0.0)
    made_round, shaped, _ = guarded(tmp_path, private(), measure)
    guard, leaves, rows = made_round._guard, made_round._leaves, made_round._rows.trained
    found = []
    for taken in (rows, (*rows, NOTHING)):
        guard.gradient(taken, made_round._loss_of, leaves, shaped, PARTS)
        mean = flat({name: leaf.grad.numpy() for name, leaf in leaves.items()}, shaped, PARTS)
        found.append(mean * np.float32(len(taken)))
    assert np.allclose(found[0], found[1], rtol=1e-5)


def test_what_a_round_comes_from_has_a_name() -> None:
    weights = [ArtifactRef(digest=f"sha256:{number:064x}", size_bytes=1) for number in range(2)]
    rows = [NOTHING, Row(np.arange(4), 1)]
    names = {
        fingerprint_of(rows, 1, weights),
        fingerprint_of(rows, 2, weights),
        fingerprint_of(rows[1:], 1, weights),
        fingerprint_of(rows, 1, weights[1:]),
    }
    assert len(names) == 4 and fingerprint_of(list(rows), 1, list(weights)) in names


def test_a_job_s_rounds_stay_within_its_budget() -> None:
    for unit, samples in (("sample", 500), ("sample", 1), ("device", 500)):
        task = private(unit=unit)
        spent = sum((measure_of(task, samples, 2, 11, number).cost for number in range(10)), np.zeros(1))
        assert 3.9 < epsilon(spent, task.privacy.delta) <= 4.0, (unit, samples)


def test_the_noise_is_that_of_its_unit() -> None:
    by_sample = measure_of(private(clip=0.5), 20, 2, 11, 0)
    assert by_sample.share == 0.1 and by_sample.releases == 4
    assert by_sample.deviation == pytest.approx(by_sample.noise * 0.5)
    per_factor = measure_of(private(clip=0.5, by="per-factor"), 20, 2, 11, 0)
    assert per_factor.deviation == pytest.approx(per_factor.noise * 0.5 * math.sqrt(2))
    assert measure_of(private(clip=0.5, by="per-factor"), 20, 1, 11, 0).deviation == by_sample.deviation
    by_device = measure_of(private(unit="device", clip=0.5), 20, 2, 11, 0)
    assert (by_device.share, by_device.releases) == (1.0, 1)
    assert by_device.deviation == pytest.approx(by_device.noise * 2 * 0.5), "its data become others: twice the clip"


def test_over_a_bad_channel_a_device_spends_less_and_over_none_more() -> None:
    plain = measure_of(private(), 20, 2, 11, 0)
    for sigma in (1e-3, 1.0, 30.0, 1e4):
        task = private(channel=Channel(sigma=sigma))
        rounds_of = [measure_of(task, 20, 2, 11, number) for number in range(30)]
        assert all(one.noise >= plain.noise for one in rounds_of)
        assert sum((one.cost for one in rounds_of[:10]), np.zeros(1)).max() <= (10 * plain.cost).max() * (1 + 1e-9)
        if sigma == 1e-3:
            assert all(one.noise == plain.noise for one in rounds_of), "sent as weakly as the budget asks for"
        if sigma == 1e4:
            assert all(one.noise > plain.noise for one in rounds_of), "free"
    assert cost(plain.noise, plain.share)[0] > 0
