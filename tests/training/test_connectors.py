"""Connectors and a task module: gradients against plain numpy, and what a round leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")

from models.families.modalities import ModalitiesConfig  # noqa: E402
from models.lora.adapter import AdapterSpec, flat, initial, named, shapes  # noqa: E402
from models.training.connectors import TrainedConnectors, rows_of_modality  # noqa: E402
from models.training.features import numbered  # noqa: E402
from models.training.kernels import WORKING_BYTES, working_bytes  # noqa: E402
from models.training.memory import connectors_peak_bytes  # noqa: E402
from models.training.rounds import Round  # noqa: E402
from models.training.samples import IGNORED, Row, Split, batch_of  # noqa: E402
from tests.training.test_heads import task  # noqa: E402
from wire.messages import InboxAddress, RoundMeta  # noqa: E402
from wire.modalities import Objective  # noqa: E402

pytestmark = pytest.mark.torch

Floats = npt.NDArray[np.float32]

CONFIG = ModalitiesConfig(width=4, features={"photos": 3, "watch": 5})
SPEC = AdapterSpec(rank=1, alpha=1.0, labels=3, seed=3)
SHAPED = shapes(CONFIG, SPEC)
ALL = (Objective(modules=("connector.photos", "connector.watch", "head"), objective="task"),)
EPS = 1e-6


def tables(count: int = 30) -> tuple[dict[str, Floats], dict[str, list[int]]]:
    """Features of which the largest of the first three says the label, roughly."""
    rng, values, labels = np.random.default_rng(1), {}, {}
    for name, features in CONFIG.features.items():
        labels[name] = rng.integers(0, 3, count).tolist()
        noise = rng.standard_normal((count, features))
        values[name] = (noise + 3 * np.eye(3, features)[labels[name]]).astype(np.float32)
    return values, labels


def rows_of(labels: dict[str, list[int]]) -> list[Row]:
    return [row for place, name in enumerate(sorted(labels)) for row in rows_of_modality(place, numbered(labels[name]))]


def begun(seed: int = 2) -> dict[str, Floats]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPED.items()}


def by_numpy(
    values: dict[str, Floats], factors: dict[str, Floats], samples: list[tuple[str, int, int]]
) -> tuple[float, dict[str, npt.NDArray[np.float64]], int]:
    """Mean cross entropy over (modality, number, label), its gradients, and how many are right; by the chain rule."""
    loss, right, head = 0.0, 0, factors["head.c"].astype(np.float64)
    gradients = {name: np.zeros(shape) for name, shape in SHAPED.items()}
    for modality, number, label in samples:
        connector = factors[f"connector.{modality}.c"].astype(np.float64)
        seen = np.append(values[modality][number].astype(np.float64), 1.0)
        point = connector @ seen
        root = np.sqrt(np.square(point).mean() + EPS)
        unit = point / root
        scores = head @ np.append(unit, 1.0)
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        loss -= np.log(shares[label]) / len(samples)
        right += int(scores.argmax() == label)
        of_scores = (shares - np.eye(3)[label]) / len(samples)
        gradients["head.c"] += np.outer(of_scores, np.append(unit, 1.0))
        of_unit = head[:, :-1].T @ of_scores
        of_point = of_unit / root - point * (of_unit @ point) / (CONFIG.width * root**3)
        gradients[f"connector.{modality}.c"] += np.outer(of_point, seen)
    return float(loss), gradients, right


def test_loss_and_gradients_are_those_of_cross_entropy_behind_a_norm() -> None:
    (values, labels), factors = tables(), begun()
    model = TrainedConnectors(values, factors)
    model.aim(ALL)
    rows = rows_of(labels)
    chosen = [2, 31, 40, 7, 59]
    batch = batch_of([rows[place] for place in chosen])
    loss = model.loss_of(batch)
    loss.backward()
    samples = [(("photos", "watch")[place // 30], place % 30, rows[place].label or 0) for place in chosen]
    expected, gradients, right = by_numpy(values, factors, samples)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(model.factors[name].grad.numpy(), gradient, atol=1e-5, err_msg=name)
    judged = model.judged(batch)
    assert (judged.counted, judged.right) == (5, right) and judged.loss == pytest.approx(expected, rel=1e-5)
    assert {name: count for name, (count, _) in judged.by_modality.items()} == {"photos": 2, "watch": 3}
    assert sum(told for _, told in judged.by_modality.values()) == right


def test_a_module_without_an_objective_gets_no_gradient() -> None:
    (values, labels), factors = tables(), begun()
    model = TrainedConnectors(values, factors)
    model.aim((Objective(modules=("connector.watch",), objective="task"),))
    model.train_only(("connector.watch",))
    rows = rows_of(labels)
    batch = batch_of([rows[place] for place in (2, 31, 40)])
    model.loss_of(batch).backward()
    _, gradients, _ = by_numpy(values, factors, [("watch", 1, labels["watch"][1]), ("watch", 10, labels["watch"][10])])
    grown = model.factors["connector.watch.c"].grad.numpy()
    np.testing.assert_allclose(grown, 2 / 3 * gradients["connector.watch.c"], atol=1e-5)
    assert model.factors["head.c"].grad is None and model.factors["connector.photos.c"].grad is None
    for factor in model.factors.values():
        factor.grad = None
    model.loss_of(batch_of(rows[:3])).backward()
    assert not model.factors["connector.watch.c"].grad.any(), "of a batch without samples of its modality"


def test_what_is_aimed_at_must_be_here_and_once() -> None:
    values, _ = tables()
    model = TrainedConnectors({"watch": values["watch"]}, {"connector.watch.c": begun()["connector.watch.c"]})
    with pytest.raises(ValueError, match=r"no module connector\.photos, head here"):
        model.aim(ALL)
    watch = Objective(modules=("connector.watch",), objective="task")
    with pytest.raises(ValueError, match="two objectives"):
        model.aim((watch, watch))


def run(objectives: tuple[Objective, ...], start: Floats, at_once: int = 4096) -> Round:
    values, labels = tables()
    rows = rows_of({name: [*many[:-1], IGNORED] for name, many in labels.items()})
    asked = RoundMeta(reply=InboxAddress(topic="t"), round=0, parts=("c",), objectives=objectives)
    parts = Split(tuple(rows[:20] + rows[30:50]), tuple(rows[20:30] + rows[50:]))
    made = Round(
        TrainedConnectors(values, named(start, SHAPED)), SHAPED, parts, task(rows_at_once=at_once), 5, asked, start
    )
    made._stage.aim(objectives)  # type: ignore[attr-defined]
    while made.step():
        pass
    return made


def test_a_round_teaches_all_and_sends_back_what_it_trained() -> None:
    start = flat(initial(CONFIG, SPEC), SHAPED)
    first = named(start, SHAPED)
    assert not first["head.c"].any() and not first["connector.watch.c"][:, -1].any()
    assert first["connector.watch.c"][:, :-1].std() == pytest.approx(5**-0.5, rel=0.4)
    made = run(ALL, start)
    assert (run(ALL, start).vector() == made.vector()).all()
    np.testing.assert_allclose(run(ALL, start, 3).vector(), made.vector(), atol=2e-3)
    last = run(ALL, made.vector())
    assert last.held_out_count == 18 and (last.held_out_right or 0) >= 15
    assert {name: count for name, (count, _) in last.held_out_by.items()} == {"photos": 9, "watch": 9}
    alone = run((Objective(modules=("head",), objective="task"),), start).vector()
    assert len(alone) == 3 * 5 and alone.any()


def test_contrastive_is_cross_entropy_over_cosines_with_anchors() -> None:
    """InfoNCE, with its gradient by the chain rule; the task module is trained for its task in the same step."""
    (values, labels), factors = tables(), begun()
    drawn = np.random.default_rng(7).standard_normal((3, CONFIG.width))
    anchors = (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)
    model = TrainedConnectors(values, factors, anchors, 0.2)
    model.aim(
        (
            Objective(modules=("connector.photos", "connector.watch"), objective="contrastive"),
            Objective(modules=("head",), objective="task"),
        )
    )
    rows = rows_of(labels)
    chosen = [2, 31, 40]
    loss = model.loss_of(batch_of([rows[place] for place in chosen]))
    loss.backward()
    samples = [(("photos", "watch")[place // 30], place % 30, rows[place].label or 0) for place in chosen]
    expected, of_task, _ = by_numpy(values, factors, samples)
    gradients = {name: np.zeros(shape) for name, shape in SHAPED.items()}
    for modality, number, label in samples:
        seen = np.append(values[modality][number].astype(np.float64), 1.0)
        point = factors[f"connector.{modality}.c"].astype(np.float64) @ seen
        length = np.linalg.norm(point)
        unit = point / length
        scores = anchors.astype(np.float64) @ unit / 0.2
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        expected -= np.log(shares[label]) / 3
        of_unit = anchors.T.astype(np.float64) @ (shares - np.eye(3)[label]) / (0.2 * 3)
        of_point = (of_unit - unit * (of_unit @ unit)) / length
        gradients[f"connector.{modality}.c"] += np.outer(of_point, seen)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    for name in ("connector.photos.c", "connector.watch.c"):
        np.testing.assert_allclose(model.factors[name].grad.numpy(), gradients[name], atol=2e-5, err_msg=name)
    np.testing.assert_allclose(model.factors["head.c"].grad.numpy(), of_task["head.c"], atol=1e-5)


def test_a_contrastive_objective_wants_anchors_and_connectors() -> None:
    values, _ = tables()
    with pytest.raises(ValueError, match="without anchors"):
        TrainedConnectors(values, begun()).aim((Objective(modules=("connector.watch",), objective="contrastive"),))
    model = TrainedConnectors(values, begun(), np.eye(3, 4, dtype=np.float32))
    with pytest.raises(ValueError, match="for the task module"):
        model.aim((Objective(modules=("head",), objective="contrastive"),))


MEASURE = """
import json, sys
import numpy as np
from agent.workers import training
from models.families.modalities import ModalitiesConfig
from models.lora.adapter import AdapterSpec, flat, initial, shapes
from models.training.connectors import TrainedConnectors, rows_of_modality
from models.training.features import numbered
from models.training.kernels import Kernels
from models.training.rounds import Round
from models.training.samples import Split
from tests.training.test_heads import asked, task
from wire.modalities import Objective
import msgspec, torch
width, hidden, kept, rows, labels = map(int, sys.argv[1:])
torch.set_num_threads(1)
names = tuple(f"label {n}" for n in range(labels))
config, spec = ModalitiesConfig(width=width, features={"one": hidden, "two": hidden}), AdapterSpec(
    rank=1, alpha=1.0, labels=labels)
kernels, rng, tables = Kernels(6, 100, hidden, 1), np.random.default_rng(1), {}
for name in config.features:
    table = tables[name] = np.empty((kept, hidden), np.float32)
    for start in range(0, kept, 64):
        size = min(64, kept - start)
        table[start:start + size] = kernels.features(rng.standard_normal((size, 100, 6), dtype=np.float32))
numbers = {name: numbered(rng.integers(0, labels, kept).tolist()) for name in tables}
all_rows = [row for place, name in enumerate(sorted(tables)) for row in rows_of_modality(place, numbers[name])]
shaped = shapes(config, spec)
start = flat(initial(config, spec), shaped)
stage = TrainedConnectors(tables, initial(config, spec))
objectives = (Objective(modules=("connector.one", "connector.two", "head"), objective="task"),)
stage.aim(objectives)
made = Round(stage, shaped, Split(tuple(all_rows), ()), task(labels=names, batch_rows=rows, steps=3), 1,
             msgspec.structs.replace(asked(), objectives=objectives), start)
while made.step():
    pass
made.vector()
status = open("/proc/self/status").read()
print(json.dumps(1024 * int(status.split("VmHWM:")[1].split()[0])))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(64, 512, 2000, 16, 7), (64, 512, 10_000, 16, 7), (1024, 4096, 128, 64, 30), (4096, 512, 500, 512, 7)]
)
def test_what_it_takes_is_foretold(sizes: tuple[int, ...]) -> None:
    width, hidden, kept, rows, labels = sizes
    done = subprocess.run([sys.executable, "-c", MEASURE, *map(str, sizes)], capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    config = ModalitiesConfig(width=width, features={"one": hidden, "two": hidden})
    working = 64 * 4 * 600 + max(WORKING_BYTES, working_bytes(6, 100, hidden))
    spec = AdapterSpec(rank=1, alpha=1.0, labels=labels)
    foretold = connectors_peak_bytes(config, spec, rows, {"one": kept, "two": kept}, working)
    print(sizes, measured / 1e6, foretold / 1e6)
    assert measured <= foretold <= 1.5 * measured
