"""A job on windows of readings, on real processes: what comes of it is what comes of the same rounds by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

from agent.workers.roundwork import device_seed
from coordinator.rounds.adapters import aggregate, parts_of, spec_of
from coordinator.rounds.job import Job, Rounds
from coordinator.rounds.orders import task_of
from models.families.features import FeatureConfig
from models.formats import safetensors
from models.lora.adapter import HEAD, flat, initial, named, shapes
from models.training.features import series_features
from models.training.heads import TrainedHead
from models.training.rounds import Round
from testbed import commands
from testbed.boards import BoardSpec, with_data
from testbed.site import CoordinatorProcess
from tests.e2e.site import Site, prefer_own_ports
from tests.e2e.tuning import follow
from wire.errors import EdgelamError
from wire.messages import InboxAddress, RoundMeta, UpdateMeta
from wire.privacy import Privacy
from wire.samples import Series

pytestmark = pytest.mark.torch

LABELS = ("still", "slow", "fast")
TURNS = {"still": 0.0, "slow": 0.1, "fast": 0.4}
"""Radians from a row to the next."""
BOARDS = ("board1", "board2", "other")
TRAINED = BOARDS[:2]
SCHEMA = Series(columns=("ax", "ay"), label="activity", window=40, stride=20, kernels=64)


def recording(label: str, rows: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    turned = TURNS[label] * (rng.uniform(0, 60) + np.arange(rows))
    noise = rng.normal(0, 0.2, (rows, 2))
    return [f"{np.sin(at) + x:.5f},{np.cos(at) + y:.5f},{label}" for at, (x, y) in zip(turned, noise, strict=True)]


@pytest.fixture(scope="module")
def watch_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two boards with readings, and a third whose file has other columns."""
    folder = tmp_path_factory.mktemp("watch")
    data = folder / "watch"
    data.mkdir()
    for number, board in enumerate(TRAINED):
        rows = ["ax,ay,activity"]
        for place in range(15 + 3 * number):
            rows += recording(LABELS[place % 3], 150, 100 * number + place)
        rows.insert(40, "1.0,none,slow")
        (data / f"{board}.csv").write_text("\n".join(rows), encoding="utf-8")
    (data / "other.csv").write_text("x,y,activity\n1,2,slow\n", encoding="utf-8")
    name = f"watch-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    prefer_own_ports(folder)
    coordinator = CoordinatorProcess(folder, name)
    site = Site(folder, coordinator, coordinator.start())
    try:
        specs = with_data(tuple(BoardSpec(name=board, memory_bytes=2 << 30) for board in BOARDS), "watch", data)
        site.testbed = commands.up(commands.UpOptions(site=name, boards=specs, state_dir=folder / "testbed"))
        site.testbed.await_connected(print)
        site.await_states(dict.fromkeys(BOARDS, "online"))
        yield site
    except BaseException:
        print(coordinator.log_end(60))
        raise
    finally:
        if site.testbed is not None:
            site.testbed.down()
        coordinator.stop()


def job(name: str, **rounds: Any) -> Job:
    wanted = {"count": 4, "steps": 40, "batch_rows": 8, "learning_rate": 0.02, "held_out": 0.3, "timeout_s": 60.0}
    return Job(name=name, model="series", data="watch", labels=LABELS, seed=5, series=SCHEMA,
               rounds=Rounds(**{**wanted, **rounds}))  # fmt: skip


def by_hand(wanted: Job, data: Path) -> tuple[dict[str, Any], list[float]]:
    """The task module that a job comes to, and the share that is right before each round."""
    config, spec = FeatureConfig(hidden=SCHEMA.kernels), spec_of(wanted)
    shaped, task = shapes(config, spec), task_of(wanted, None, None)
    made = {board: series_features(data / f"{board}.csv", SCHEMA, LABELS, wanted.seed) for board in TRAINED}
    factors, right = flat(initial(config, spec), shaped), []
    for number in range(wanted.rounds.count + 1):
        updates, told = [], []
        train = number < wanted.rounds.count
        for board, features in made.items():
            rows = features.split(task.held_out, task.seed)
            asked = RoundMeta(reply=InboxAddress(topic="t"), round=number, parts=parts_of(wanted, number), train=train)
            stage = TrainedHead(features.values, named(factors, shaped)[HEAD])
            mine = Round(stage, shaped, rows, task, device_seed(task.seed, board), asked, factors)
            while mine.step():
                pass
            updates.append((UpdateMeta(round=number, device=board, samples=len(rows.trained)), mine.vector()))
            told.append((mine.held_out_right or 0, mine.held_out_count))
        right.append(sum(one for one, _ in told) / sum(count for _, count in told))
        if train:
            factors = aggregate(config, wanted, number, factors, updates)
    return named(factors, shaped), right


@pytest.mark.slow
def test_activities_are_learnt_of_readings_that_stay_where_they_are(watch_site: Site, tmp_path: Path) -> None:
    site, rounds = watch_site, list[dict[str, Any]]()
    wanted = job("watch")
    end = follow(site, wanted, lambda event: rounds.append(event) if event["event"] == "round" else None)
    assert end["state"] == "done", end
    expected, right = by_hand(wanted, site.folder / "watch")
    assert [one["held_out_accuracy"] for one in rounds] == pytest.approx(right)
    assert right[-1] > 0.9 > right[0]
    refused = rounds[0]["devices"]["other"]["refused"]
    assert "other.csv has no column 'ax', 'ay' among its 3" in refused, "a board with other columns is named, and why"
    assert [rounds[0]["devices"][board]["bad_rows"] for board in TRAINED] == [1, 1]
    assert rounds[0]["up_bytes"] == 2 * 4 * len(LABELS) * (SCHEMA.kernels + 1)
    assert set(end["files"]) == {"head.safetensors", "provenance.json"}
    done = site.cli("tune", "adapter", "watch", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    head = safetensors.open_safetensors(tmp_path / "out" / "head.safetensors")
    np.testing.assert_allclose(head.view("weight"), expected[HEAD][:, :-1], atol=1e-4)
    assert msgspec.json.decode(head.metadata["labels"]) == list(LABELS)
    # Of each board's file as many are told right as the formulas say, by the job's name or the folder it left.
    for board in TRAINED:
        file = str(site.folder / "watch" / f"{board}.csv")
        found = site.cli("label", file, "--adapter", "watch", "--json")
        assert found.returncode == 0, found.stderr
        shown = json.loads(found.stdout)
        assert shown["bad_rows"] == 1
        assert found.stdout == site.cli("label", file, "--adapter", str(tmp_path / "out"), "--json").stdout
        by_rows = {one["last_row"]: one["label"] for one in shown["windows"]}
        features = series_features(site.folder / "watch" / f"{board}.csv", SCHEMA, LABELS, wanted.seed)
        scores = features.values @ expected[HEAD][:, :-1].T + expected[HEAD][:, -1]
        rows = (site.folder / "watch" / f"{board}.csv").read_text().splitlines()
        right = [rows[last - 1].endswith(label) for last, label in by_rows.items()]
        of_features = scores.argmax(axis=1) == [row.label for row in features.rows]
        assert np.mean(right) > 0.75 and np.mean(of_features) > 0.9
    new = tmp_path / "new.csv"
    new.write_text("\n".join(["ax,ay", *(row.rpartition(",")[0] for row in recording("fast", 90, 1000))]))
    told = site.cli("label", str(new), "--adapter", "watch")
    assert told.returncode == 0 and told.stdout.count("new.csv") == 3 and told.stdout.count("\nfast") == 3, told
    missing = site.cli("label", str(site.folder / "watch" / "other.csv"), "--adapter", "watch")
    assert missing.returncode == 1 and "other.csv has no column 'ax', 'ay' among its 3" in missing.stderr
    refused = site.cli("run", "series", "--prompt", "hello", "--adapter", "watch")
    assert refused.returncode != 0 and "Traceback" not in refused.stderr
    shown = site.cli("tune", "report", "watch")
    assert shown.returncode == 0 and "right" in shown.stdout and "other.csv has no column" in shown.stdout


@pytest.mark.slow
def test_all_boards_whose_columns_are_others_are_named(watch_site: Site) -> None:
    wanted = job("none")
    assert wanted.series is not None
    end = follow(watch_site, msgspec.structs.replace(wanted, series=Series(columns=("az",), label="activity")))
    assert end["state"] == "failed"
    for board in BOARDS:
        assert f"{board}.csv has no column 'az' among its 3" in end["because"], end
    strict = msgspec.structs.replace(job("strict"), bad_rows="refuse")
    end = follow(watch_site, strict)
    assert end["state"] == "failed" and "1 rows are no samples: board1.csv:41: 'ay' is no number" in end["because"]


@pytest.mark.slow
def test_readings_are_learnt_of_privately(watch_site: Site) -> None:
    rounds: list[dict[str, Any]] = []
    wanted = msgspec.structs.replace(job("private", count=2), privacy=Privacy(epsilon=3.0))
    end = follow(watch_site, wanted, lambda event: rounds.append(event) if event["event"] == "round" else None)
    assert end["state"] == "done" and 2.9 < end["epsilon"] <= 3.0, end
    for one in rounds:
        assert one["loss"] is None and one["held_out_loss"] is None
        assert all(one["devices"][board]["noise"] > 0 and not one["devices"][board]["bad_rows"] for board in TRAINED)


@pytest.mark.slow
def test_the_command_line_says_what_is_wrong_with_a_job_on_readings(watch_site: Site, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('model = "series"\ndata = "watch"\n[series]\ncolumns = []\nwindow = 3\n')
    done = watch_site.cli("tune", str(path))
    assert done.returncode == 2
    assert all(word in done.stderr for word in ("series.columns:", "series.window:")), done.stderr
    with pytest.raises(EdgelamError, match="has no data 'steps'"):
        follow(watch_site, msgspec.structs.replace(job("nobody"), data="steps"))
    good = tmp_path / "good.toml"
    good.write_text(
        'model = "series"\ndata = "watch"\nlabels = ["still", "slow", "fast"]\n[rounds]\ncount = 1\n'
        '[series]\ncolumns = ["ax", "ay"]\nlabel = "activity"\nwindow = 40\nkernels = 64\n'
    )
    done = watch_site.cli("tune", str(good), "--output", str(tmp_path / "out"), timeout_s=120)
    assert done.returncode == 0 and "job good done; 1 of 1 rounds" in done.stdout, done.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"head.safetensors", "provenance.json"}
    listed = watch_site.cli("tune", "status", "--json")
    assert "good" in {row["job"] for row in json.loads(listed.stdout)["jobs"]}
