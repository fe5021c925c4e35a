"""A job of two modalities, on real processes: readings on one board, pictures on another, both on a third."""

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
pytest.importorskip("PIL")

from PIL import Image

from coordinator.rounds.job import Job, Modality, Planned, Rounds, Space
from models.formats import safetensors
from models.training.features import kernels_of
from testbed import commands
from testbed.boards import BoardSpec, with_data
from testbed.site import CoordinatorProcess
from tests.e2e.site import Site, prefer_own_ports
from tests.e2e.tuning import follow, jobs, kill_the_coordinator_of, worker_of
from tests.models.tiny_bert import write_bert
from tests.models.tiny_vit import WIDTH, vit_model
from wire.errors import EdgelamError
from wire.samples import Images, Series

pytestmark = [pytest.mark.torch, pytest.mark.slow]

LABELS = ("sat", "cut", "world")
"""Words that the encoder of tests.models.tiny_bert knows."""
TURNS = {"sat": 0.0, "cut": 0.1, "world": 0.4}
"""Radians from a row to the next."""
COLOURS = {"sat": (220, 120, 60), "cut": (40, 150, 50), "world": (20, 20, 60)}
OWNS = {"both": ("photos", "watch"), "camera": ("photos",), "wrist": ("watch",), "idle": ()}
SCHEMA = Series(columns=("ax", "ay"), window=40, stride=20, kernels=64)
SPACE = 8
MODULE_BYTES = {
    "watch": 4 * SPACE * (SCHEMA.kernels + 1),
    "photos": 4 * SPACE * (WIDTH + 1),
    "head": 4 * len(LABELS) * (SPACE + 1),
}


def recording(label: str, rows: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    turned = TURNS[label] * (rng.uniform(0, 60) + np.arange(rows))
    noise = rng.normal(0, 0.2, (rows, 2))
    return [f"{np.sin(at) + x:.5f},{np.cos(at) + y:.5f},{label}" for at, (x, y) in zip(turned, noise, strict=True)]


def draw(path: Path, label: str, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.array(COLOURS[label]) + np.random.default_rng(seed).normal(0, 25, (24, 32, 3))
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def mixed_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "watch").mkdir()
    for number, (board, owned) in enumerate(OWNS.items()):
        if "watch" in owned:
            rows = ["ax,ay,label"]
            for place in range(15):
                rows += recording(LABELS[place % 3], 150, 100 * number + place)
            (folder / "watch" / f"{board}.csv").write_text("\n".join(rows), encoding="utf-8")
        for place in range(24 if "photos" in owned else 0):
            label = LABELS[place % 3]
            draw(folder / "photos" / board / label / f"{place}.png", label, 50 * number + place)
    name = f"mixed-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    prefer_own_ports(folder)
    coordinator = CoordinatorProcess(folder, name)
    site = Site(folder, coordinator, coordinator.start())
    try:
        boards = tuple(BoardSpec(name=board, memory_bytes=2 << 30) for board in OWNS)
        for data in ("watch", "photos"):
            boards = with_data(boards, data, folder / data)
        site.testbed = commands.up(commands.UpOptions(site=name, boards=boards, state_dir=folder / "testbed"))
        site.testbed.await_connected(print)
        site.await_states(dict.fromkeys(OWNS, "online"))
        (folder / "vit.onnx").write_bytes(vit_model())
        yield site
    except BaseException:
        print(coordinator.log_end(60))
        raise
    finally:
        if site.testbed is not None:
            site.testbed.down()
        coordinator.stop()


def job(site: Site, name: str, **rounds: Any) -> Job:
    wanted = {"count": 5, "steps": 40, "batch_rows": 8, "learning_rate": 0.02, "held_out": 0.25, "timeout_s": 60.0}
    net = str(site.folder / "vit.onnx")
    modalities = {
        "watch": Modality(data="watch", series=SCHEMA),
        "photos": Modality(data="photos", model=net, images=Images(features="pooled")),
    }
    return Job(name=name, labels=LABELS, seed=5, modalities=modalities, space=Space(width=SPACE),
               rounds=Rounds(**{**wanted, **rounds}))  # fmt: skip


def products(site: Site, name: str) -> dict[str, np.ndarray]:
    found = {}
    for file in ("connectors.safetensors", "head.safetensors"):
        with site.client() as there:
            (site.folder / file).write_bytes(there.file(f"/v1/jobs/{name}/{file}"))
        found.update({key: np.array(values) for key, values in safetensors.read(site.folder / file).items()})
    return found


def test_each_board_trains_the_modules_of_its_modalities(mixed_site: Site, tmp_path: Path) -> None:
    site, rounds = mixed_site, list[dict[str, Any]]()
    end = follow(site, job(site, "mixed"), lambda event: rounds.append(event) if event["event"] == "round" else None)
    assert end["state"] == "done", end
    assert set(rounds[0]["devices"]) == {"both", "camera", "wrist"}, "who has neither takes no part"
    for one in rounds:
        for board, told in one["devices"].items():
            assert set(told["by_modality"]) == set(OWNS[board])
            wanted = sum(MODULE_BYTES[name] for name in (*OWNS[board], "head"))
            assert told["sent_bytes"] == (wanted if one["trained"] else 0), "its own modules, and no more"
    assert rounds[0]["down_bytes"] == rounds[0]["up_bytes"]
    right = {name: sum(told["by_modality"][name]["held_out_right"] for told in rounds[-1]["devices"].values()
                       if name in told["by_modality"]) for name in ("watch", "photos")}  # fmt: skip
    counts = {name: sum(told["by_modality"][name]["held_out_count"] for told in rounds[-1]["devices"].values()
                        if name in told["by_modality"]) for name in ("watch", "photos")}  # fmt: skip
    assert all(right[name] > 0.9 * counts[name] for name in right), (right, counts)
    assert set(end["files"]) == {"head.safetensors", "connectors.safetensors", "provenance.json"}
    done = site.cli("tune", "adapter", "mixed", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["modalities"] == {board: list(owned) for board, owned in OWNS.items() if owned}
    shown = site.cli("tune", "report", "mixed")
    assert shown.returncode == 0 and "watch" in shown.stdout and "photos" in shown.stdout, shown.stdout
    # The files say all that telling an activity of readings takes, also on a board that has pictures alone.
    connectors = safetensors.open_safetensors(tmp_path / "connectors.safetensors")
    head = safetensors.open_safetensors(tmp_path / "head.safetensors")
    schema = msgspec.json.decode(connectors.metadata["modalities"], type=dict[str, Modality])["watch"].series
    assert schema == SCHEMA
    kernels = kernels_of(schema, int(connectors.metadata["seed"]))
    told = []
    for number, label in enumerate(LABELS * 5):
        rows = [row.split(",")[:2] for row in recording(label, schema.window, 1000 + number)]
        features = kernels.features(np.array([rows], np.float32))[0]
        point = connectors.view("watch.weight") @ features + connectors.view("watch.bias")
        point /= np.sqrt(np.square(point).mean())
        told.append(LABELS[int((head.view("weight") @ point + head.view("bias")).argmax())] == label)
    assert sum(told) >= 13


def test_whoever_is_killed_it_comes_to_the_same_bits(mixed_site: Site) -> None:
    site = mixed_site
    end = follow(site, job(site, "whole", count=3))
    assert end["state"] == "done", end
    killed = []

    def kill_once(event: dict[str, Any]) -> None:
        if event["event"] == "round" and not killed:
            killed.append(worker_of(site, "both"))
            killed[0].kill()

    end = follow(site, job(site, "cut", count=3), kill_once)
    assert end["state"] == "done" and killed, end
    kill_the_coordinator_of(site, job(site, "again", count=3), tuple(OWNS))
    expected = products(site, "whole")
    for name in ("cut", "again"):
        found = products(site, name)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in expected), name
    assert jobs(site)["again"]["state"] == "done"


def test_a_task_module_that_saw_readings_alone_tells_pictures_by_the_anchors_that_both_were_drawn_to(
    mixed_site: Site, tmp_path: Path
) -> None:
    site, rounds = mixed_site, list[dict[str, Any]]()
    words = write_bert(site.folder / "words")
    plan = (
        Planned(modules=("connector.watch", "connector.photos"), objective="contrastive"),
        Planned(modules=("head",), devices=("wrist",), first=2),
    )
    wanted = msgspec.structs.replace(
        job(site, "aligned", count=6), plan=plan, space=Space(width=SPACE, anchors=str(words), temperature=0.2)
    )
    end = follow(site, wanted, lambda event: rounds.append(event) if event["event"] == "round" else None)
    assert end["state"] == "done", end
    sent = [{board: told["sent_bytes"] for board, told in one["devices"].items()} for one in rounds[:-1]]
    expected = {board: sum(MODULE_BYTES[name] for name in owned) for board, owned in OWNS.items() if owned}
    assert sent[:2] == [expected, expected]
    assert sent[2:] == [{**expected, "wrist": expected["wrist"] + MODULE_BYTES["head"]}] * 4
    told = [
        found["by_modality"]["photos"] for found in rounds[-1]["devices"].values() if "photos" in found["by_modality"]
    ]
    right = sum(one["held_out_right"] for one in told) / sum(one["held_out_count"] for one in told)
    assert right > 0.8, rounds[-1]
    refused = msgspec.structs.replace(
        wanted, name="no-words", space=Space(width=SPACE, anchors=str(site.folder / "vit.onnx"))
    )
    with pytest.raises(EdgelamError, match="turns no text into vectors"):
        follow(site, refused)
