"""Jobs on real processes: boards train on their own data, over MQTT, and whoever is killed, the result is the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

from agent.workers.roundwork import device_seed
from coordinator.rounds.adapters import aggregate, spec_of
from coordinator.rounds.job import Job
from coordinator.rounds.orders import task_of
from models.formats import safetensors
from models.formats.bert import BertFile, read_bert_config
from models.lora.adapter import HEAD, flat, initial, named, shapes
from models.training.data import read
from models.training.encoder import TrainedEncoder
from models.training.rounds import Round
from models.training.samples import encoder_of, labelled_rows, split
from tests.e2e.losses import PROMPT, Model
from tests.e2e.site import Site
from tests.e2e.tuning import (
    LABELS,
    TRAINED,
    adapter_of,
    follow,
    job,
    kill_the_coordinator_of,
    killing_a_worker,
    own_adapter,
    rounds_of,
    same,
    tuning_site,
    worker_of,
)
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from tests.models.tiny_bert import write_bert
from wire.errors import EdgelamError, UsageError
from wire.messages import ArtifactRef, InboxAddress, RoundMeta, Sampling, UpdateMeta
from wire.privacy import Privacy

pytestmark = pytest.mark.torch

__all__ = ["tuning_site"]


@pytest.fixture(scope="module")
def undisturbed(tuning_site: Site, tiny_model: str) -> dict[str, Any]:
    """The adapter of a job in which nothing happened."""
    events: list[dict[str, Any]] = []
    end = follow(tuning_site, job(tiny_model, "calm"), events.append)
    assert (end["state"], end["round"], end["rounds"]) == ("done", 2, 2), end
    rounds = [event for event in events if event["event"] == "round"]
    assert [one["round"] for one in rounds] == [0, 1, 2]
    for one in rounds[:2]:
        assert set(one["devices"]) == set(TRAINED), "who has no data takes no part"
        assert [one["devices"][board]["bad_rows"] for board in TRAINED] == [1, 1]
        assert one["up_bytes"] == one["down_bytes"]
    assert rounds[2]["held_out_loss"] < rounds[0]["held_out_loss"], "two rounds have taught it something"
    return adapter_of(tuning_site, "calm")


def test_an_adapter_comes_out_that_has_peft_s_layout(tuning_site: Site, undisturbed: dict[str, Any]) -> None:
    with tuning_site.client() as there:
        config = msgspec.json.decode(there.file("/v1/jobs/calm/adapter_config.json"))
        provenance = msgspec.json.decode(there.file("/v1/jobs/calm/provenance.json"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4.0)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    assert provenance["rounds"] == 2 and set(provenance["samples"]) == set(TRAINED)
    key = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
    assert undisturbed[key].shape == (64, 2) and np.abs(undisturbed[key]).max() > 0
    assert len(undisturbed) == 4 * 3 * 2


@pytest.mark.slow
def test_the_same_job_gives_the_same_bits(tuning_site: Site, tiny_model: str, undisturbed: dict[str, Any]) -> None:
    follow(tuning_site, job(tiny_model, "again"))
    assert same(adapter_of(tuning_site, "again"), undisturbed)


def test_a_worker_that_is_killed_does_its_round_again(
    tuning_site: Site, tiny_model: str, undisturbed: dict[str, Any]
) -> None:
    killed = []

    def kill_once(event: dict[str, Any]) -> None:
        if event["event"] == "round" and not killed:
            killed.append(worker_of(tuning_site, "board2"))
            killed[0].kill()

    end = follow(tuning_site, job(tiny_model, "killed-worker"), kill_once)
    assert killed and end["state"] == "done"
    assert same(adapter_of(tuning_site, "killed-worker"), undisturbed)


@pytest.mark.slow
def test_a_coordinator_that_is_killed_goes_on_with_the_round(
    tuning_site: Site, tiny_model: str, undisturbed: dict[str, Any]
) -> None:
    kill_the_coordinator_of(tuning_site, job(tiny_model, "killed-hub"))
    assert same(adapter_of(tuning_site, "killed-hub"), undisturbed)


@pytest.mark.slow
def test_a_job_is_stopped_and_goes_on_where_it_stood(
    tuning_site: Site, tiny_model: str, undisturbed: dict[str, Any]
) -> None:
    def stop_once(event: dict[str, Any]) -> None:
        if event["event"] == "begun":
            with tuning_site.client() as other:
                other.post("/v1/jobs/stopped/stop")

    end = follow(tuning_site, job(tiny_model, "stopped"), stop_once)
    assert end["state"] == "stopped" and end["round"] < 2
    done = tuning_site.cli("tune", "resume", "stopped")
    assert done.returncode == 0, done.stderr
    done = tuning_site.cli("tune", "follow", "stopped", "--json", timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "done"
    assert same(adapter_of(tuning_site, "stopped"), undisturbed)


def test_the_command_line_trains_and_fetches_the_adapter(
    tuning_site: Site, tiny_model: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "typed.toml"
    path.write_text(
        f'model = "{tiny_model}"\ndata = "notes"\nprecision = "f32"\nseed = 5\n'
        '[adapter]\nrank = 2\nmatrices = ["q", "v", "down"]\n'
        "[rounds]\ncount = 2\nsteps = 3\nrow_tokens = 24\nbatch_rows = 2\nlearning_rate = 0.02\nheld_out = 0.2\n"
    )
    done = tuning_site.cli("tune", str(path), "--output", str(tmp_path / "out"), timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert "round 0: loss" in done.stdout and "job typed done; 2 of 2 rounds" in done.stdout
    found = safetensors.read(tmp_path / "out" / "adapter_model.safetensors")
    assert same({key: np.array(values) for key, values in found.items()}, undisturbed)
    listed = tuning_site.cli("tune", "status")
    assert listed.returncode == 0 and "typed" in listed.stdout and "2 of 2" in listed.stdout


def test_boards_that_are_told_how_fast_to_send_come_to_the_same(
    tuning_site: Site, tiny_model: str, undisturbed: dict[str, Any]
) -> None:
    rounds = rounds_of(tuning_site, job(tiny_model, "paced", medium="shared"))
    assert same(adapter_of(tuning_site, "paced"), undisturbed)
    assert [one["expected_s"] is not None for one in rounds] == [False, True, False], "the first is for getting to know"
    assert all(told["wall_s"] > 0 for one in rounds for told in one["devices"].values())


@pytest.mark.slow
def test_a_private_job_tells_what_it_may_and_is_paid_for_once_whoever_is_killed(
    tuning_site: Site, tiny_model: str
) -> None:
    wanted = msgspec.structs.replace(job(tiny_model, "private"), privacy=Privacy(epsilon=3.0))
    killed = []
    rounds: list[dict[str, Any]] = []

    def kill_once(event: dict[str, Any]) -> None:
        if event["event"] == "round":
            rounds.append(event)
            if not killed:
                killed.append(worker_of(tuning_site, "board2"))
                killed[0].kill()

    end = follow(tuning_site, wanted, kill_once)
    assert killed and (end["state"], end["most_epsilon"]) == ("done", 3.0), end
    assert 2.9 < end["epsilon"] <= 3.0, "noise is no more than the budget asks for"
    assert [one["round"] for one in rounds] == [0, 1], "nothing is judged where losses are not told"
    for one in rounds:
        assert one["loss"] is None and one["held_out_loss"] is None
        assert set(one["devices"]) == set(TRAINED)
        assert all(told["noise"] > 0.5 and told["compute_s"] == 0 for told in one["devices"].values())
    books = [msgspec.json.decode(path.read_bytes()) for path in tuning_site.folder.rglob("privacy/notes.json")]
    assert len(books) == 2
    for book in books:
        [mine] = [account for name, account in book["jobs"].items() if name.startswith("tune-private/")]
        assert mine["releases"] == 2 * 3, "each step once, though one board did a round again"
    with tuning_site.client() as there:
        provenance = msgspec.json.decode(there.file("/v1/jobs/private/provenance.json"))
    assert provenance["privacy"]["epsilon"] == 3.0 and set(provenance["privacy"]["spent"]) == set(TRAINED)
    shown = tuning_site.cli("tune", "status", "private")
    assert "of 3" in shown.stdout, shown.stdout


def test_with_fedsa_a_is_everybody_s_and_each_board_has_its_own_b(tuning_site: Site, tiny_model: str) -> None:
    site = tuning_site
    rounds = killing_a_worker(site, job(tiny_model, "own", aggregation="fedsa"))
    assert [one["trained"] for one in rounds] == [True, True, False]
    shared = adapter_of(site, "own")
    letters = 4 * sum(values.size for name, values in shared.items() if "lora_A" in name)
    assert rounds[0]["down_bytes"] == rounds[0]["up_bytes"] == 2 * letters, "A alone travels"
    for board in TRAINED:
        first, last = (one["devices"][board]["held_out_loss"] for one in (rounds[0], rounds[-1]))
        assert last < first, "judged with its own B"
    mine = [own_adapter(site, "own", board) for board in TRAINED]
    for name, values in shared.items():
        of_boards = [one[name] for one in mine]
        if "lora_A" in name:
            assert all(np.array_equal(one, values) for one in of_boards), "A of the last round came to all"
        else:
            assert not values.any() and not np.array_equal(*of_boards) and all(one.any() for one in of_boards)


def test_what_can_not_be_is_refused_before_anything_starts(tuning_site: Site, tiny_model: str, tmp_path: Path) -> None:
    wanted = job(tiny_model, "no-such-data")
    with pytest.raises(EdgelamError, match="has no data 'poems'"):
        follow(tuning_site, msgspec.structs.replace(wanted, data="poems"))
    end = follow(tuning_site, msgspec.structs.replace(wanted, name="strict", bad_rows="refuse"))
    assert end["state"] == "failed" and "1 rows are no samples: board1.jsonl:13: " in end["because"], end
    with pytest.raises(UsageError, match="nothere"):
        follow(tuning_site, msgspec.structs.replace(wanted, model="nothere"))
    with pytest.raises(EdgelamError, match="context"):
        follow(tuning_site, job(tiny_model, "too-long", row_tokens=4096))
    bad = tmp_path / "bad.toml"
    bad.write_text("model = 3\nrank = 4\n[rounds]\nsteps = 0\n")
    done = tuning_site.cli("tune", str(bad))
    assert done.returncode == 2
    assert all(word in done.stderr for word in ("model:", "data: missing", "rank: no such key", "rounds.steps:"))
    assert tuning_site.cli("tune", "follow", "nobody").returncode == 2


def by_hand(folder: Path, wanted: Job, data: Path) -> tuple[dict[str, Any], list[float]]:
    """The factors that a job of labels comes to, and the share that is right before each round, in this process."""
    config = read_bert_config(folder)
    spec = spec_of(wanted)
    shaped = shapes(config, spec)
    stage = TrainedEncoder(BertFile.open(config, folder / "model.safetensors"), spec, initial(config, spec))
    encode = encoder_of((folder / "tokenizer.json").read_text())
    task = task_of(wanted, ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), None)
    splits = {}
    for board in TRAINED:
        rows = labelled_rows(read(data / f"{board}.jsonl").samples, encode, task.row_tokens, LABELS)
        splits[board] = split(rows, task.held_out, task.seed)
    factors = flat(initial(config, spec), shaped)
    right = []
    for number in range(wanted.rounds.count + 1):
        updates, told = [], []
        for board, rows in splits.items():
            train = number < wanted.rounds.count
            asked = RoundMeta(reply=InboxAddress(topic="t"), round=number, parts=("a", "b", "c"), train=train)
            made = Round(stage, shaped, rows, task, device_seed(task.seed, board), asked, factors)
            while made.step():
                pass
            updates.append((UpdateMeta(round=number, device=board, samples=len(rows.trained)), made.vector()))
            told.append((made.held_out_right or 0, made.held_out_count))
        right.append(sum(one for one, _ in told) / sum(count for _, count in told))
        if train:
            factors = aggregate(config, wanted, number, factors, updates)
    return named(factors, shaped), right


@pytest.mark.slow
def test_labels_of_texts_are_learnt_by_an_encoder(tuning_site: Site, tmp_path: Path) -> None:
    """Over MQTT it comes to what the same rounds come to by hand."""
    site, folder = tuning_site, write_bert(tmp_path / "bert")
    wanted = msgspec.structs.replace(job(str(folder), "told", count=3, steps=8), labels=LABELS)
    rounds = rounds_of(site, wanted)
    expected, right = by_hand(folder, wanted, site.folder / "notes")
    assert [one["held_out_accuracy"] for one in rounds] == pytest.approx(right)
    assert right[-1] == 1.0 > right[0], "it has learnt to tell them"
    done = site.cli("tune", "adapter", "told", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    head = safetensors.open_safetensors(tmp_path / "out" / "head.safetensors")
    assert msgspec.json.decode(head.metadata["labels"]) == list(LABELS)
    np.testing.assert_allclose(head.view("weight"), expected[HEAD][:, :-1], atol=1e-4)
    found = safetensors.read(tmp_path / "out" / "adapter_model.safetensors")
    key = "base_model.model.encoder.layer.3.output.dense.lora_B.weight"
    np.testing.assert_allclose(found[key], expected["block.3.down.b"], atol=1e-4)
    with pytest.raises(EdgelamError, match="labels: missing"):
        follow(site, msgspec.structs.replace(wanted, name="told-none", labels=()))
    shown = site.cli("tune", "report", "told")
    assert shown.returncode == 0 and "100.0% right" in shown.stdout, shown.stdout
    asked = ["label", str(folder), "board says hello", "board says hello on the mat", "--json"]
    for adapter in ("told", str(tmp_path / "out")):
        shown = site.cli(*asked, "--adapter", adapter)
        assert shown.returncode == 0, shown.stderr
        assert [one["label"] for one in json.loads(shown.stdout)["texts"]] == list(LABELS)
    assert follow(site, msgspec.structs.replace(wanted, seed=6))["state"] == "done"
    with site.client() as there:
        before = {record["name"] for record in there.get("/v1/status")["deployments"]}
    shown = site.cli(*asked, "--adapter", "told")
    assert shown.returncode == 0, shown.stderr
    with site.client() as there:
        after = {record["name"] for record in there.get("/v1/status")["deployments"]}
    assert len(before - after) == 1 and len(after - before) == 1, "the later adapter takes the place of the earlier one"
    plain = site.cli(*asked)
    assert plain.returncode == 2 and "tells no labels" in plain.stderr


def merged(tiny_model: str, adapter: dict[str, Any], scale: float, folder: Path) -> Model:
    """The tiny model with the adapter in its weights."""
    config = tiny_config("llama")
    tensors = random_tensors(config, 0)
    for name, b in adapter.items():
        if ".lora_B." in name:
            short = name.removesuffix("_proj.lora_B.weight").rsplit(".", 1)[1]
            block = name.split(".layers.")[1].split(".")[0]
            tensors[f"block.{block}.{short}"] = (
                tensors[f"block.{block}.{short}"] + scale * b @ adapter[name.replace("_B.", "_A.")]
            )
    return Model(str(write_gguf(folder / "merged.gguf", config, tensors)), folder / "merged", "f32")


def test_a_finished_adapter_is_served_beside_the_base_without_a_restart(
    tuning_site: Site, undisturbed: dict[str, Any], tiny_model: str, tmp_path: Path
) -> None:
    site = tuning_site
    expected = {
        "": Model(tiny_model, tmp_path / "base", "f32"),
        "calm": merged(tiny_model, undisturbed, 2.0, tmp_path),
    }
    epochs, said = [], {}
    for adapter in ("", "calm", "", "calm"):
        end = site.run(tiny_model, 2, prompt=PROMPT, precision="f32", max_tokens=24, adapter=adapter)
        epochs.append(end["epoch"])
        said[adapter] = end["token_ids"]
        model = expected[adapter]
        assert end["token_ids"] == model.says(model.prompt, 24, Sampling()), adapter
        assert bool(end["adapter"]) == bool(adapter)
    assert said[""] != said["calm"], "the adapter changes the answer"
    assert epochs[0] < epochs[1] == epochs[2] == epochs[3], "base and adapter share one deployment"

    asked = ["--prompt", PROMPT, "--raw", "--max-tokens", "24", "--context", "128", "--ignore-stop", "--precision",
             "f32", "--boards-at-least", "2", "--boards-at-most", "2", "--speculate", "off", "--json"]  # fmt: skip
    fetched = site.cli("tune", "adapter", "calm", "--output", str(tmp_path / "fetched"))
    assert fetched.returncode == 0, fetched.stderr
    for name in ("calm", str(tmp_path / "fetched")):
        shown = site.cli("run", tiny_model, *asked, "--adapter", name)
        assert shown.returncode == 0, shown.stderr
        assert json.loads(shown.stdout)["token_ids"] == said["calm"]
    unknown = site.cli("run", tiny_model, *asked, "--adapter", "nothing")
    assert unknown.returncode == 2 and "no adapter 'nothing'" in unknown.stderr


def test_a_report_says_what_became_of_a_job(tuning_site: Site, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    shown = tuning_site.cli("tune", "report", "calm")
    assert shown.returncode == 0 and "2 of 2" in shown.stdout and "board1" in shown.stdout
    assert "privacy: none" in shown.stdout.lower() and "idle" not in shown.stdout
    for form in ("html", "md", "csv", "json"):
        path = tmp_path / f"calm.{form}"
        made = tuning_site.cli("tune", "report", "calm", "-o", str(path))
        assert made.returncode == 0, made.stderr
        assert path.stat().st_size > 200
    assert (tmp_path / "calm.html").read_text().count("<svg") == 4
    document = json.loads((tmp_path / "calm.json").read_text())
    assert document["schema"] == "edgelam.job-report/1" and len(document["each"]) == 3
    assert len((tmp_path / "calm.csv").read_text().splitlines()) == 1 + 3 * len(TRAINED)
    for arguments, said in ((("calm", "-o", "calm.pdf"), "in which form"), (("nobody",), "no job")):
        refused = tuning_site.cli("tune", "report", *arguments)
        assert refused.returncode == 2 and said in refused.stderr
