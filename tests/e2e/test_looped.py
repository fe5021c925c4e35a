"""Jobs whose one block is divided among boards, on real processes: what comes of them is what comes of one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

pytest.importorskip("torch")

from agent.workers.roundwork import device_seed
from coordinator.rounds.adapters import parts_of, spec_of
from coordinator.rounds.job import Adapter, Job
from coordinator.rounds.orders import task_of
from models.formats.bert import BertFile, read_bert_config
from models.lora.adapter import flat, initial, named, shapes
from models.lora.looped import at_every_depth
from models.lora.whole import to_file, weights_of
from models.training.data import read
from models.training.encoder import TrainedEncoder
from models.training.samples import Split, encoder_of, labelled_rows, split
from tests.e2e.site import Site
from tests.e2e.tuning import BOARDS, LABELS, TRAINED, adapter_of, follow, job, same, tuning_site, worker_of
from tests.models.tiny_bert import write_bert
from tests.training.looped_models import OneBlock
from tests.training.split_models import Halves, InOnePlace
from wire.errors import EdgelamError
from wire.messages import ArtifactRef

pytestmark = pytest.mark.torch

__all__ = ["tuning_site"]


def looped_job(model: str, name: str, **changes: Any) -> Job:
    rounds = {"count": 3, "steps": 4, "learning_rate": 0.002, **changes.pop("rounds", {})}
    fields = {"labels": LABELS, "train": "blocks", "adapter": Adapter(), **changes}
    return msgspec.structs.replace(job(model, name, **rounds), mode="looped", **fields)


def workers_of(site: Site, board: str) -> list[psutil.Process]:
    """All that train on a board, whatever part they have."""
    worker_of(site, board)
    pid = next(found.pid for found in site.boards.status().boards if found.name == board)
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "agent.workers.training" in " ".join(child.cmdline())]


def in_one_place(folder: Path, wanted: Job, data: Path) -> tuple[dict[str, Any], list[float]]:
    """The weights that a job comes to, and its loss while training, with all rows here."""
    config, spec = read_bert_config(folder), spec_of(wanted)
    shaped, file = shapes(config, spec), BertFile.open(config, folder / "model.safetensors")
    begun = {**initial(config, spec), **weights_of(file)}
    vector, losses = flat(begun, shaped), []
    stage = TrainedEncoder(file, spec, named(vector, shaped))
    stage.factors = OneBlock(stage.factors)
    encode = encoder_of((folder / "tokenizer.json").read_text())
    task = task_of(wanted, ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), None)
    rows: dict[str, Split] = {}
    for board in TRAINED:
        found = labelled_rows(read(data / f"{board}.jsonl").samples, encode, task.row_tokens, LABELS)
        rows[board] = split(found, task.held_out, task.seed)
    seeds = {board: device_seed(task.seed, board) for board in TRAINED}
    for number in range(wanted.rounds.count):
        halves = Halves(config, spec, stage, (), (), {})
        one = InOnePlace(halves, rows, task, vector, parts_of(wanted, number), seeds, number)
        losses.append(sum(one.step() for _ in range(task.steps)) / task.steps)
        vector = one.vector()
    return named(vector, shaped), losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("looped") / "bert")


@pytest.fixture(scope="module")
def undisturbed(tuning_site: Site, folder: Path) -> dict[str, Any]:
    """Of a job in which nothing happened; it learnt what is learnt in one place."""
    site, wanted = tuning_site, looped_job(str(folder), "looped")
    events: list[dict[str, Any]] = []
    end = follow(site, wanted, events.append)
    assert end["state"] == "done", end
    said = [event["text"] for event in events if "the shards are on" in event.get("text", "")]
    assert said and all(board in said[0] for board in BOARDS), "all boards that can have some"
    rounds = [event for event in events if event["event"] == "round"]
    assert rounds[-1]["held_out_loss"] < rounds[0]["held_out_loss"]
    for one in rounds:
        assert set(one["devices"]) == set(BOARDS) and not any(told["refused"] for told in one["devices"].values())
    expected, losses = in_one_place(folder, wanted, site.folder / "notes")
    assert [one["loss"] for one in rounds[:-1]] == pytest.approx(losses, rel=1e-4)
    found = adapter_of(site, "looped")
    weights = to_file(read_bert_config(folder), at_every_depth(read_bert_config(folder), expected))
    assert found.keys() == weights.keys()
    for name, values in weights.items():
        if not name.endswith("key.bias"):  # its gradient is zero, but for rounding
            np.testing.assert_allclose(found[name], values, atol=1e-3, err_msg=name)
        other = name.replace("layer.0.", "layer.3.")
        assert np.array_equal(found[name], found[other]), "one block at every depth"
    return found


def test_it_learns_what_it_learns_in_one_place_and_tells_labels(
    tuning_site: Site, folder: Path, undisturbed: dict[str, Any]
) -> None:
    told = tuning_site.cli("label", str(folder), "board 0 says hello world 3 times on the mat", "--adapter", "looped")
    assert told.returncode == 0, told.stderr
    assert any(label in told.stdout for label in LABELS), told.stdout
    shown = tuning_site.cli("tune", "report", "looped")
    assert shown.returncode == 0 and "looped; the shards are on" in shown.stdout, shown.stdout
    assert undisturbed


@pytest.mark.parametrize("part", ["a shard", pytest.param("the hub", marks=pytest.mark.slow)])
def test_whoever_is_killed_it_comes_to_the_same(
    part: str, tuning_site: Site, folder: Path, undisturbed: dict[str, Any]
) -> None:
    name, killed, where = f"looped-{part.split()[-1]}", [], []

    def kill_once(event: dict[str, Any]) -> None:
        text = event.get("text", "")
        if "the hub on " in text:
            where.append(text.split("the hub on ")[1].split(":")[0])
        if event["event"] == "round" and not killed:
            killed.append(where[0] if part == "the hub" else next(one for one in BOARDS if one != where[0]))
            for worker in workers_of(tuning_site, killed[0]):
                worker.kill()

    end = follow(tuning_site, looped_job(str(folder), name), kill_once)
    assert killed and end["state"] == "done", end
    assert same(adapter_of(tuning_site, name), undisturbed)


def test_what_does_not_go_with_it_is_said_at_once(tuning_site: Site, folder: Path) -> None:
    wanted = looped_job(str(folder), "bad", train="factors", labels=(), trunk="idle", rounds={"middle": "median"})
    with pytest.raises(EdgelamError) as raised:
        follow(tuning_site, wanted)
    for words in (
        "train: 'blocks' with",
        "labels: missing",
        "trunk: one board",
        "rounds.middle: 'median' means nothing",
    ):
        assert words in raised.value.message
    with pytest.raises(EdgelamError, match="no boards can have the blocks: nobody: not heard of"):
        follow(tuning_site, looped_job(str(folder), "no-shard", trunk=("idle", "nobody")))
