"""Labels of readings that nobody has labelled: those that the job's own evaluation gives to the same windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.rounds.adapters import files_of
from coordinator.rounds.job import Job
from coordinator.rounds.store import JobRecord
from models.families.features import FeatureConfig
from models.formats import safetensors
from models.lora.head import Head, read_head
from models.training.data import BadRow
from models.training.features import series_features
from models.training.told import Told, told
from wire.errors import CorruptData, Refused, UsageError
from wire.samples import Series

LABELS = ("still", "slow", "fast")
TURNS = {"still": 0.0, "slow": 0.1, "fast": 0.4}
SCHEMA = Series(columns=("ax", "ay"), label="activity", id="who", time="t", window=20, stride=10, kernels=32)
JOB = Job(name="watch", model="series", data="watch", labels=LABELS, seed=5, series=SCHEMA)


def head_file(folder: Path, job: Job = JOB, seed: int = 1) -> Path:
    """What a job leaves; scores are of numbers that chance drew."""
    assert job.series is not None
    numbers = np.random.default_rng(seed).standard_normal((len(job.labels), job.series.kernels + 1))
    files = files_of(
        FeatureConfig(hidden=job.series.kernels), JobRecord(job=job, state="done"),
        numbers.astype(np.float32).reshape(-1), [],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder / "head.safetensors"


def rows(label: str, count: int, seed: int, start: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    at = TURNS[label] * (rng.uniform(0, 60) + np.arange(count))
    return [
        f"{start + place},p{seed},{np.sin(x) + rng.normal(0, 0.2):.5f},{np.cos(x):.5f},{label}"
        for place, x in enumerate(at)
    ]


def recordings(path: Path, each: int = 70, label: bool = True) -> Path:
    """One for each label, twice; `label`: with that column."""
    lines = ["t,who,ax,ay,activity"]
    for number, name in enumerate(LABELS * 2):
        lines += rows(name, each, number)
    path.write_text("\n".join(line if label else line.rpartition(",")[0] for line in lines), encoding="utf-8")
    return path


def windows_of(path: Path, head: Head) -> list[Told]:
    return [found for found in told(path, head) if isinstance(found, Told)]


def test_windows_have_the_scores_of_plain_numpy_and_say_which_rows_they_are_of(tmp_path: Path) -> None:
    head = read_head(head_file(tmp_path / "out"))
    labelled = recordings(tmp_path / "a.csv")
    features = series_features(labelled, SCHEMA, LABELS, JOB.seed)
    scores = features.values.astype(np.float64) @ head.weight.T.astype(np.float64) + head.bias
    expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    for path in (labelled, recordings(tmp_path / "bare.csv", label=False)):
        found = windows_of(path, head)
        assert len(found) == 6 * 6
        np.testing.assert_allclose([one.shares for one in found], expected, rtol=1e-4)
        assert [(one.first.number, one.last.number) for one in found[:7]] == [
            (2, 21), (12, 31), (22, 41), (32, 51), (42, 61), (52, 71), (72, 91),
        ]  # fmt: skip
        assert [(one.first.time, one.last.time) for one in found[5:7]] == [(50, 69), (0, 19)]


@pytest.mark.torch
def test_those_are_right_that_the_jobs_own_evaluation_counts(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from models.training.heads import TrainedHead
    from models.training.samples import batch_of

    head = read_head(head_file(tmp_path / "out"))
    path = recordings(tmp_path / "a.csv")
    features = series_features(path, SCHEMA, LABELS, JOB.seed)
    stage = TrainedHead(features.values, np.concatenate([head.weight, head.bias[:, None]], axis=1))
    counted = [stage.judged(batch_of([row])).right for row in features.rows]
    found = [int(one.shares.argmax()) for one in windows_of(path, head)]
    assert [int(label == row.label) for label, row in zip(found, features.rows, strict=True)] == counted
    assert 0 < sum(counted) < len(counted)


def test_no_window_crosses_a_recording_a_gap_or_a_row_that_is_none(tmp_path: Path) -> None:
    schema = msgspec.structs.replace(SCHEMA, most_gap=5.0)
    head = read_head(head_file(tmp_path / "out", msgspec.structs.replace(JOB, series=schema)))
    path = tmp_path / "a.csv"
    some = rows("slow", 100, 1)
    lines = ["t,who,ax,ay", *(line.rpartition(",")[0] for line in some)]
    lines[30] = "29,p1,none,0.5"
    lines[61:] = [line.replace(line.split(",")[0], f"{int(line.split(',')[0]) + 100}", 1) for line in lines[61:]]
    path.write_text("\n".join(lines), encoding="utf-8")
    found = list(told(path, head))
    assert [str(one) for one in found if isinstance(one, BadRow)] == ["a.csv:31: 'ax' is no number"]
    assert [(one.first.number, one.last.number) for one in found if isinstance(one, Told)] == [
        (2, 21), (32, 51), (42, 61), (62, 81), (72, 91), (82, 101),
    ]  # fmt: skip


def test_a_parquet_file_is_told_as_its_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    head = read_head(head_file(tmp_path / "out"))
    text = recordings(tmp_path / "a.csv", label=False)
    lines = [line.split(",") for line in text.read_text().splitlines()]
    values = list(zip(*lines[1:], strict=True))
    columns = {name: [float(x) for x in values[place]] for place, name in enumerate(lines[0]) if name != "who"}
    parquet.write_table(pyarrow.table({**columns, "who": list(values[1])}), tmp_path / "a.parquet")
    one, other = windows_of(text, head), windows_of(tmp_path / "a.parquet", head)
    np.testing.assert_array_equal([found.shares for found in one], [found.shares for found in other])
    assert [found.first.number - 1 for found in one] == [found.first.number for found in other]


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    head = read_head(head_file(tmp_path / "out"))
    path = tmp_path / "a.csv"
    path.write_text("t,ax,activity\n1,2,slow\n")
    with pytest.raises(CorruptData, match=r"a\.csv has no column 'ay', 'who' among its 3"):
        list(told(path, head))


def changed(path: Path, metadata: dict[str, str], **tensors: Any) -> Path:
    file = safetensors.open_safetensors(path)
    parts = {name: np.array(file.view(name)) for name in file.tensors}
    other = path.with_name("changed.safetensors")
    kept = {name: value for name, value in {**parts, **tensors}.items() if value is not None}
    safetensors.write(other, kept, {**file.metadata, **metadata})
    return other


def test_a_file_that_is_no_task_module_is_refused(tmp_path: Path) -> None:
    good = head_file(tmp_path / "out")
    read = read_head(good)
    assert (read.labels, read.series, read.seed, read.images) == (LABELS, SCHEMA, JOB.seed, None)
    series = msgspec.to_builtins(SCHEMA)

    def schema(**more: Any) -> dict[str, str]:
        return {"series": msgspec.json.encode({**series, **more}).decode()}

    nan = np.full(len(LABELS), np.nan, np.float32)
    for metadata, tensors, kind, words in (
        ({"labels": '["one"]'}, {}, Refused, "1 labels"),
        ({"labels": '["a", "a", "b"]'}, {}, Refused, "3 labels"),
        ({"labels": "{"}, {}, CorruptData, "changed"),
        ({"kernels": "0"}, {}, Refused, "version 0"),
        ({"seed": "-1"}, {}, CorruptData, "seed"),
        (schema(kernels=64), {}, Refused, "64 kernels"),
        (schema(window=3), {}, CorruptData, "window"),
        (schema(scale=[1.0, 2.0, 3.0]), {}, CorruptData, "other columns"),
        ({}, {"weight": None}, CorruptData, "weight"),
        ({}, {"weight": np.zeros((4, 32), np.float32)}, Refused, r"\[4, 32\] for 3 labels"),
        ({}, {"bias": nan}, CorruptData, "no numbers"),
    ):
        with pytest.raises(kind, match=words):
            read_head(changed(good, metadata, **tensors))
    good.write_text("labels")
    with pytest.raises(CorruptData):
        read_head(good)
    with pytest.raises(UsageError):
        read_head(tmp_path / "none")
