"""What a privacy budget leaves of learning: one factor or both, in two regimes, and whether members can be told.

One layer h = x + s B A x (64 wide, rank 8) before a frozen head: the head knows MiniLM's vectors of package
descriptions (the sections of benchmarks/parts/sections), the layer sees them turned by a fixed rotation, and is to undo
that. All samples take part in each step; each one's gradient is clipped and noise goes on the sum, by the project's own
accountant. Gradients of a sample are outer products, so their lengths are known without forming them; the rule is that
of models.training.private, vectorised.

    matched    A and B clipped each, 600 steps, one learning rate for all: what FFA-LoRA's argument is about. It is no
               law: with a rotation three times as far, or half the steps, B alone wins by less or not at all
    tuned      clipped together, 100 steps, each way with the learning rate that suits it best: no claim, a curve

Members: the area under the curve of telling samples of the training set from others by their loss alone (0.5: they
can't be told). `--plot FILE.html` draws all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from benchmarks.parts.sections import vectors_of
from benchmarks.report import Figure, at_least
from hwprofiles.report.page import page
from hwprofiles.report.plots import Plot, Point, Series
from hwprofiles.report.render import Part
from models.privacy.accountant import noise_for

Doubles = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

WIDTH: Final = 64
RANK: Final = 8
SCALE: Final = 1.0
TRAINED: Final = 1400
DELTA: Final = 1e-5
EPSILONS: Final = (np.inf, 8.0, 2.0, 1.0, 0.5, 0.25)
SEEDS: Final = (1, 2, 3)
MATCHED_RATE: Final = 1.0
RATES: Final = (0.3, 1.0, 3.0, 10.0, 30.0)
TURNED: Final = 0.5
"""Half the tangent of the largest angle is so much: far enough that the head is lost without the layer."""
NAMES: Final = {"both": "both", "b": "B alone", "a": "A alone", "alternate": "in turn"}


class Regime(NamedTuple):
    name: str
    steps: int
    clip: float
    joint: bool


MATCHED: Final = Regime("matched", 600, 0.5, False)
TUNED: Final = Regime("tuned", 100, 1.0, True)


class Task(NamedTuple):
    """Turned vectors [n, WIDTH] and labels [n] to train on and to judge by, and the frozen head [labels, WIDTH + 1]."""

    trained: tuple[Doubles, Labels]
    judged: tuple[Doubles, Labels]
    head: Doubles


class Came(NamedTuple):
    right: float
    loss: float
    members: float


def task_of(vectors: npt.NDArray[np.float32], labels: Labels, seed: int) -> Task:
    rng = np.random.default_rng(seed)
    centred = vectors - vectors.mean(axis=0)
    _, sizes, ways = np.linalg.svd(centred, full_matrices=False)
    small = (centred @ ways[:WIDTH].T) / (sizes[:WIDTH] / np.sqrt(len(vectors)))
    order = rng.permutation(len(small))
    known, trained, judged = order[: len(order) // 2], *np.split(order[len(order) // 2 :], [TRAINED])
    head = _head(small[known], labels[known])
    skew = np.random.default_rng(7).standard_normal((WIDTH, WIDTH))
    skew = TURNED * (skew - skew.T) / np.linalg.norm(skew - skew.T, 2)
    turn = np.linalg.solve(np.eye(WIDTH) + skew, np.eye(WIDTH) - skew)  # Cayley: orthogonal
    return Task((small[trained] @ turn, labels[trained]), (small[judged] @ turn, labels[judged]), head)


def _head(vectors: Doubles, labels: Labels) -> Doubles:
    head = np.zeros((int(labels.max()) + 1, WIDTH + 1))
    for _ in range(300):
        off = np.exp(_log_shares(vectors, head))
        off[np.arange(len(labels)), labels] -= 1
        head[:, :-1] -= 0.3 * off.T @ vectors / len(labels)
        head[:, -1] -= 0.3 * off.mean(axis=0)
    return head


def _log_shares(states: Doubles, head: Doubles) -> Doubles:
    raw = states @ head[:, :-1].T + head[:, -1]
    raw = raw - raw.max(axis=1, keepdims=True)
    found: Doubles = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
    return found


def learnt(task: Task, way: str, regime: Regime, epsilon: float, rate: float, seed: int) -> Came:
    """What one way of training comes to."""
    rng = np.random.default_rng([seed, 5])
    a = rng.standard_normal((RANK, WIDTH)) / np.sqrt(RANK)
    b = np.zeros((WIDTH, RANK))
    if way == "a":  # A learns nothing where B is nothing
        b, a = np.linalg.qr(rng.standard_normal((WIDTH, RANK)))[0], np.zeros((RANK, WIDTH))
    vectors, labels = task.trained
    noise = 0.0 if epsilon == np.inf else noise_for(epsilon, DELTA, regime.steps)
    for step in range(regime.steps):
        parts = {"both": "ab", "b": "b", "a": "a", "alternate": "ba"[step % 2]}[way]
        given = vectors @ a.T
        off = np.exp(_log_shares(vectors + SCALE * given @ b.T, task.head))
        off[np.arange(len(labels)), labels] -= 1
        back = off @ task.head[:, :-1]  # d loss / d h of each sample
        onto = back @ b
        # Of each sample the gradients are the outer products s back given^T and s onto x^T.
        sizes = {
            "b": SCALE * np.linalg.norm(back, axis=1) * np.linalg.norm(given, axis=1),
            "a": SCALE * np.linalg.norm(onto, axis=1) * np.linalg.norm(vectors, axis=1),
        }
        kept = _kept(sizes, parts, regime)
        deviation = noise * regime.clip * (1.0 if regime.joint else np.sqrt(len(parts)))
        found = {
            "b": SCALE * (back * kept["b"][:, None]).T @ given,
            "a": SCALE * (onto * kept["a"][:, None]).T @ vectors,
        }
        for part in parts:
            total = found[part] + deviation * rng.standard_normal(found[part].shape)
            if part == "b":
                b = b - rate * total / len(labels)
            else:
                a = a - rate * total / len(labels)
    return _judged(task, a, b)


def _kept(sizes: dict[str, Doubles], parts: str, regime: Regime) -> dict[str, Doubles]:
    """[n] what each sample's gradient is shortened by, for each factor."""
    if regime.joint:
        together = np.sqrt(sum(sizes[part] ** 2 for part in parts))
        sizes = dict.fromkeys("ab", np.asarray(together))
    return {part: np.minimum(1.0, regime.clip / np.maximum(size, 1e-12)) for part, size in sizes.items()}


def _judged(task: Task, a: Doubles, b: Doubles) -> Came:
    def losses(vectors: Doubles, labels: Labels) -> tuple[Doubles, float]:
        shares = _log_shares(vectors + SCALE * (vectors @ a.T) @ b.T, task.head)
        right = float((shares.argmax(axis=1) == labels).mean())
        return -shares[np.arange(len(labels)), labels], right

    inside, _ = losses(*task.trained)
    outside, right = losses(*task.judged)
    loss = float(outside.mean())
    if not np.isfinite(loss):
        return Came(right, np.inf, 0.5)
    ranks = np.argsort(np.argsort(np.concatenate([inside, outside]))) + 1
    less = len(inside) * len(outside) + len(inside) * (len(inside) + 1) / 2 - ranks[: len(inside)].sum()
    return Came(right, loss, float(less / (len(inside) * len(outside))))


def _mean(tasks: Sequence[Task], way: str, regime: Regime, epsilon: float, rate: float) -> Came:
    with np.errstate(over="ignore", invalid="ignore"):
        found = [learnt(task, way, regime, epsilon, rate, seed) for task, seed in zip(tasks, SEEDS, strict=True)]
    return Came(*(mean(part) for part in zip(*found, strict=True)))


def _said(epsilon: float) -> str:
    return "no noise" if epsilon == np.inf else f"epsilon {epsilon:g}"


def measure(plot: Path | None = None) -> list[Figure]:
    vectors, labels = vectors_of()
    tasks = [task_of(vectors, labels, seed) for seed in SEEDS]
    figures: list[Figure] = []
    curves: dict[tuple[str, str], list[tuple[float, Came]]] = {}
    untouched = mean(_judged(task, np.zeros((RANK, WIDTH)), np.zeros((WIDTH, RANK))).right for task in tasks)
    figures.append(Figure("right before", untouched, "of labels"))
    for epsilon in EPSILONS:
        found = {way: _mean(tasks, way, MATCHED, epsilon, MATCHED_RATE) for way in ("both", "b")}
        for way, came in found.items():
            curves.setdefault(("matched", way), []).append((epsilon, came))
            figures.append(Figure(f"matched, {_said(epsilon)}, {way}: right", came.right, "of labels"))
        gain = found["b"].right - found["both"].right
        if epsilon == np.inf:
            figures.append(at_least("matched, no noise: both less B alone", -gain, "of labels", 0.0))
        elif epsilon <= 1 and epsilon >= 0.5:
            figures.append(at_least(f"matched, {_said(epsilon)}: B alone less both", gain, "of labels", 0.1))
        for way in NAMES:
            best = max((_mean(tasks, way, TUNED, epsilon, rate) for rate in RATES), key=lambda came: came.right)
            curves.setdefault(("tuned", way), []).append((epsilon, best))
            figures.append(Figure(f"tuned, {_said(epsilon)}, {way}: right", best.right, "of labels"))
            figures.append(Figure(f"tuned, {_said(epsilon)}, {way}: members told", best.members, "AUC"))
        print(f"... {_said(epsilon)}", file=sys.stderr)
    if plot is not None:
        part = Part(
            title="One factor or both under a budget", notes=tuple((__doc__ or "").split("\n\n")[1:3]), tables=()
        )
        plot.write_text(page([part], [plots_of(curves)]), encoding="utf-8")
    return figures


def plots_of(curves: dict[tuple[str, str], list[tuple[float, Came]]]) -> list[Plot]:
    found = []
    for regime, said in (
        ("matched", "A and B clipped each, 600 steps, one rate"),
        ("tuned", "clipped together, 100 steps, best rates"),
    ):
        series = tuple(
            Series(name=NAMES[way], points=_points(curve, "right"))
            for (of, way), curve in curves.items()
            if of == regime
        )
        text = "; ".join(f"{one.name}: {one.points[0].y:.2f} to {one.points[-1].y:.2f}" for one in series)
        found.append(
            Plot(title=said, alt=text, x_label="epsilon", y_label="labels told right", series=series, log_x=True)
        )
    series = tuple(
        Series(name=NAMES[way], points=_points(curve, "members"))
        for (of, way), curve in curves.items()
        if of == "tuned"
    )
    text = "; ".join(f"{one.name}: {one.points[0].y:.3f} to {one.points[-1].y:.3f}" for one in series)
    label = "AUC of telling members"
    found.append(
        Plot(
            title="Telling members by their loss", alt=text, x_label="epsilon", y_label=label, series=series, log_x=True
        )
    )
    return found


def _points(curve: Sequence[tuple[float, Came]], name: str) -> tuple[Point, ...]:
    return tuple(
        Point(epsilon, getattr(came, name))
        for epsilon, came in sorted(curve, key=lambda one: one[0])
        if epsilon < np.inf
    )
