"""A task module alone: its gradient, its rounds, what it takes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from models.families.features import FeatureConfig
from models.lora.adapter import HEAD, AdapterSpec, initial, shapes
from models.training.features import numbered
from models.training.heads import TrainedHead
from models.training.memory import head_peak_bytes
from models.training.rounds import Round
from models.training.samples import IGNORED, Split, batch_of
from wire.messages import InboxAddress, RoundMeta, TrainingTask

pytestmark = pytest.mark.torch

LABELS = ("a", "b", "c")


def task(**more: object) -> TrainingTask:
    wanted = {
        "data": "d", "tokenizer": None, "rank": 1, "alpha": 1.0, "matrices": ("q",), "row_tokens": 2, "batch_rows": 8,
        "steps": 30, "learning_rate": 0.05, "most_norm": 1.0, "held_out": 0.0, "seed": 1, "labels": LABELS,
    }  # fmt: skip
    return TrainingTask(**{**wanted, **more})  # type: ignore[arg-type]


def asked(train: bool = True) -> RoundMeta:
    return RoundMeta(reply=InboxAddress(topic="t"), round=0, parts=("c",), train=train)


def told(count: int = 60, hidden: int = 5) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, len(LABELS), count)
    return rng.standard_normal((count, hidden)).astype(np.float32) + 3 * np.eye(3, hidden, dtype=np.float32)[labels], (
        labels.tolist()
    )


def test_the_task_module_is_all_that_there_is_of_a_model_on_features() -> None:
    shaped = shapes(FeatureConfig(hidden=5), AdapterSpec(rank=8, alpha=1.0, labels=3))
    assert shaped == {HEAD: (3, 6)}
    assert not initial(FeatureConfig(hidden=5), AdapterSpec(rank=8, alpha=1.0, labels=3))[HEAD].any()


def test_loss_and_gradient_are_those_of_cross_entropy() -> None:
    features, labels = told()
    labels[2] = IGNORED
    rng = np.random.default_rng(2)
    head = rng.standard_normal((3, 6)).astype(np.float32)
    stage = TrainedHead(features, head)
    rows = numbered(labels)
    chosen = [7, 2, 0, 30]
    batch = batch_of([rows[place] for place in chosen])
    loss = stage.loss_of(batch)
    loss.backward()
    expected, gradient, right = 0.0, np.zeros((3, 6)), 0
    for place in (7, 0, 30):
        seen = np.append(features[place].astype(np.float64), 1.0)
        scores = head.astype(np.float64) @ seen
        shares = np.exp(scores) / np.exp(scores).sum()
        expected -= np.log(shares[labels[place]]) / 3
        gradient += np.outer(shares - np.eye(3)[labels[place]], seen) / 3
        right += int(scores.argmax() == labels[place])
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(stage.factors[HEAD].grad.numpy(), gradient, atol=1e-5)
    judged = stage.judged(batch)
    assert (judged.counted, judged.right) == (3, right) and judged.loss == pytest.approx(expected, rel=1e-5)


def test_a_round_teaches_it_and_comes_to_the_same_bits() -> None:
    features, labels = told()
    rows = numbered(labels)
    parts = Split(tuple(rows[:50]), tuple(rows[50:]))
    shaped = {HEAD: (3, 6)}
    found = []
    for at_once in (4096, 4096, 3):
        made = Round(TrainedHead(features, np.zeros((3, 6))), shaped, parts, task(rows_at_once=at_once), 5, asked(),
                     np.zeros(18, np.float32))  # fmt: skip
        while made.step():
            pass
        found.append(made.vector())
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], atol=1e-3)
    last = Round(TrainedHead(features, np.zeros((3, 6))), shaped, parts, task(), 5, asked(train=False), found[0])
    while last.step():
        pass
    assert last.held_out_count == 10 and (last.held_out_right or 0) >= 9


MEASURE = """
import json, sys
import numpy as np
from agent.workers import training
from models.families.features import FeatureConfig
from models.lora.adapter import HEAD, AdapterSpec, initial, shapes
from models.training.features import numbered
from models.training.heads import TrainedHead
from models.training.kernels import Kernels
from models.training.rounds import Round
from models.training.samples import Split
from tests.training.test_heads import asked, task
hidden, kept, rows, labels = map(int, sys.argv[1:])
import torch
torch.set_num_threads(1)
names = tuple(f"label {n}" for n in range(labels))
config, spec = FeatureConfig(hidden=hidden), AdapterSpec(rank=1, alpha=1.0, labels=labels)
kernels, rng = Kernels(6, 100, hidden, 1), np.random.default_rng(1)
table = np.empty((kept, hidden), np.float32)
for start in range(0, kept, 64):
    size = min(64, kept - start)
    table[start:start + size] = kernels.features(rng.standard_normal((size, 100, 6), dtype=np.float32))
numbers = numbered(rng.integers(0, labels, kept).tolist())
stage = TrainedHead(table, initial(config, spec)[HEAD])
shaped = shapes(config, spec)
training.fingerprint_of(numbers, 1, [], table)
made = Round(stage, shaped, Split(tuple(numbers), ()), task(labels=names, batch_rows=rows, steps=3), 1, asked(),
             np.zeros(labels * (hidden + 1), np.float32))
while made.step():
    pass
made.vector()
# Not getrusage: to it a process took what its parent took when it was begun.
status = open("/proc/self/status").read()
print(json.dumps(1024 * int(status.split("VmHWM:")[1].split()[0])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(512, 2000, 16, 7), (512, 60_000, 16, 7), (16_384, 500, 64, 100)])
def test_what_it_takes_is_foretold(sizes: tuple[int, int, int, int]) -> None:
    from models.training.kernels import WORKING_BYTES, working_bytes

    hidden, kept, rows, labels = sizes
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, sizes)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    spec = AdapterSpec(rank=1, alpha=1.0, labels=labels)
    working = 64 * 4 * 600 + max(WORKING_BYTES, working_bytes(6, 100, hidden))
    foretold = head_peak_bytes(FeatureConfig(hidden=hidden), spec, rows, kept, working)
    print(sizes, measured / 1e6, foretold / 1e6)
    assert measured <= foretold <= 1.5 * measured
