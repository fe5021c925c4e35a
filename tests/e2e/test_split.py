"""Jobs that split their model, on real processes: what comes of them is what comes of training in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

from agent.workers.roundwork import device_seed
from coordinator.rounds.adapters import parts_of, spec_of
from coordinator.rounds.job import Adapter, Job
from coordinator.rounds.orders import task_of
from models.formats import safetensors
from models.formats.bert import BertFile, read_bert_config
from models.lora.adapter import HEAD, flat, initial, named, shapes, to_peft
from models.lora.whole import to_file, weights_of
from models.training.data import read
from models.training.samples import Split, encoder_of, labelled_rows, split
from testbed.links import LinkSpec
from tests.e2e.site import Site
from tests.e2e.tuning import (
    BOARDS,
    LABELS,
    TRAINED,
    adapter_of,
    follow,
    job,
    kill_the_coordinator_of,
    rounds_of,
    same,
    site_of,
    tuning_site,
    worker_of,
)
from tests.models.tiny_bert import write_bert
from tests.training.split_models import InOnePlace, bert
from wire.errors import EdgelamError
from wire.messages import ArtifactRef
from wire.privacy import Privacy

pytestmark = pytest.mark.torch

__all__ = ["tuning_site"]


def split_job(model: str, name: str, **changes: Any) -> Job:
    rounds = {"count": 3, "steps": 4, **changes.pop("rounds", {})}
    return msgspec.structs.replace(job(model, name, **rounds), mode="split", **changes)


def in_one_place(folder: Path, wanted: Job, data: Path) -> tuple[dict[str, Any], list[float]]:
    """The factors that a job of labels comes to, and its loss while training, with all rows here."""
    config = read_bert_config(folder)
    spec = spec_of(wanted)
    shaped = shapes(config, spec)
    begun = initial(config, spec)
    if spec.blocks:
        begun.update(weights_of(BertFile.open(config, folder / "model.safetensors")))
    halves = bert(folder, spec, (), begun)
    encode = encoder_of((folder / "tokenizer.json").read_text())
    task = task_of(wanted, ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), None)
    rows: dict[str, Split] = {}
    for board in TRAINED:
        found = labelled_rows(read(data / f"{board}.jsonl").samples, encode, task.row_tokens, LABELS)
        rows[board] = split(found, task.held_out, task.seed)
    vector, losses = flat(begun, shaped), []
    seeds = {board: device_seed(task.seed, board) for board in TRAINED}
    for number in range(wanted.rounds.count):
        one = InOnePlace(halves, rows, task, vector, parts_of(wanted, number), seeds, number)
        losses.append(sum(one.step() for _ in range(task.steps)) / task.steps)
        vector = one.vector()
    return named(vector, shaped), losses


def test_it_learns_what_it_learns_in_one_place(tuning_site: Site, tmp_path: Path) -> None:
    site, folder = tuning_site, write_bert(tmp_path / "bert")
    wanted = split_job(str(folder), "halves", labels=LABELS, trunk="idle", rounds={"count": 5, "learning_rate": 0.004})
    events: list[dict[str, Any]] = []
    end = follow(site, wanted, events.append)
    assert end["state"] == "done", end
    assert any("the blocks are on idle: the job names it" in event.get("text", "") for event in events)
    rounds = [event for event in events if event["event"] == "round"]
    expected, losses = in_one_place(folder, wanted, site.folder / "notes")
    assert [one["round"] for one in rounds] == [0, 1, 2, 3, 4, 5]
    for one, loss in zip(rounds, losses, strict=False):
        assert set(one["devices"]) == set(BOARDS)
        samples = {board: one["devices"][board]["samples"] for board in TRAINED}
        told = sum(count * one["devices"][board]["loss"] for board, count in samples.items()) / sum(samples.values())
        assert told == pytest.approx(one["loss"]) and told == pytest.approx(loss, rel=1e-4)
        assert one["devices"]["idle"]["loss"] is None and one["devices"]["idle"]["samples"] == 0
    assert rounds[-1]["held_out_accuracy"] >= rounds[0]["held_out_accuracy"]
    found = adapter_of(site, "halves")
    config = read_bert_config(folder)
    for name, values in to_peft(config, expected):
        np.testing.assert_allclose(found[name], values, atol=1e-4, err_msg=name)
    with site.client() as there:
        path = tmp_path / "head.safetensors"
        path.write_bytes(there.file("/v1/jobs/halves/head.safetensors"))
        provenance = msgspec.json.decode(there.file("/v1/jobs/halves/provenance.json"))
    np.testing.assert_allclose(safetensors.read(path)["weight"], expected[HEAD][:, :-1], atol=1e-4)
    assert set(provenance["samples"]) == set(TRAINED) and provenance["job"]["mode"] == "split"
    shown = site.cli("tune", "report", "halves")
    assert shown.returncode == 0 and "split; the blocks are on idle: the job names it" in shown.stdout, shown.stdout


@pytest.mark.parametrize("mode", [pytest.param("federated", marks=pytest.mark.slow), "pipeline"])
def test_all_weights_of_an_encoder_are_trained_and_tell_labels(mode: Any, tuning_site: Site, tmp_path: Path) -> None:
    site, folder = tuning_site, write_bert(tmp_path / "bert")
    wanted = split_job(
        str(folder), f"whole-{mode}", labels=LABELS, train="blocks", trunk=("idle", "board1"),
        adapter=Adapter(), rounds={"count": 3, "learning_rate": 0.002},
    )  # fmt: skip
    wanted = msgspec.structs.replace(wanted, mode=mode, trunk=wanted.trunk if mode == "pipeline" else ())
    rounds = rounds_of(site, wanted)
    assert rounds[-1]["held_out_loss"] < rounds[0]["held_out_loss"]
    if mode == "pipeline":
        expected, losses = in_one_place(folder, wanted, site.folder / "notes")
        assert [one["loss"] for one in rounds[:-1]] == pytest.approx(losses, rel=1e-4)
        found = adapter_of(site, wanted.name)
        weights = to_file(read_bert_config(folder), expected)
        assert found.keys() == weights.keys()
        before = safetensors.read(folder / "model.safetensors")
        for name, values in weights.items():
            if not name.endswith("key.bias"):  # its gradient is zero, but for rounding
                np.testing.assert_allclose(found[name], values, atol=1e-3, err_msg=name)
                assert not np.array_equal(found[name], np.asarray(before[name])), name
    told = site.cli("label", str(folder), "board 0 says hello world 3 times on the mat", "--adapter", wanted.name)
    assert told.returncode == 0, told.stderr
    assert any(label in told.stdout for label in LABELS), told.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["split", "pipeline"])
def test_a_schedule_knows_boards_by_what_they_took_together(mode: Any, tiny_model: str, tmp_path: Path) -> None:
    """Features and gradients of eight steps cross a link of 50 ms sixteen times, so rounds with that board are long."""
    steps, delay_s = 8, 0.05
    far = LinkSpec(delay_s=delay_s)
    with site_of(
        tmp_path / "far", ("board1", "board2", "far", "idle"), ("board1", "board2", "far"), {"far": far}
    ) as site:
        rounds = {"count": 14, "steps": steps, "who": "scheduled", "delay_s": 1.0}
        trunk = "idle" if mode == "split" else ("idle", "board1")
        wanted = split_job(tiny_model, f"timed-{mode}", trunk=trunk, rounds=rounds)
        found = rounds_of(site, msgspec.structs.replace(wanted, mode=mode))[:-1]
    own_s = [{board: told["own_s"] for board, told in one["devices"].items() if told["own_s"]} for one in found]
    for one, own in zip(found, own_s, strict=True):
        print(f"{', '.join(own)}: {one['wall_s']:.2f} s, planned {one['expected_s']}")
        assert own.get("far", 1e9) >= 2 * steps * delay_s and max(own.values()) < one["wall_s"]
    assert set(own_s[0]) == {"board1", "board2", "far"} and found[0]["expected_s"] is None, "all are tried"
    later = found[2:], own_s[2:]
    with_it, without = (
        [one["expected_s"] for one, own in zip(*later, strict=True) if ("far" in own) is far] for far in (True, False)
    )
    assert with_it and without and min(with_it) > 2 * steps * delay_s > np.median(without)
    assert all({"board1", "board2"} & set(own) for own in own_s)


@pytest.fixture(scope="module")
def undisturbed(tuning_site: Site, tiny_model: str) -> dict[str, Any]:
    """Of a language model's job in which nothing happened."""
    rounds = rounds_of(tuning_site, split_job(tiny_model, "calm-halves"))
    assert rounds[-1]["held_out_loss"] < rounds[0]["held_out_loss"], "it has learnt something"
    hidden = 64
    for one in rounds[:-1]:
        for board in TRAINED:  # states of what is judged and of each step; gradients of the latter, as long
            sent = one["devices"][board]["sent_bytes"]
            assert sent > 0 and sent % (4 * hidden) == 0
    return adapter_of(tuning_site, "calm-halves")


@pytest.mark.parametrize("board", [pytest.param("board2", marks=pytest.mark.slow), "the trunk"])
def test_whoever_is_killed_it_comes_to_the_same(
    board: str, tuning_site: Site, tiny_model: str, undisturbed: dict[str, Any]
) -> None:
    name = f"killed-{board.replace(' ', '-')}"
    killed: list[str] = []
    trunk: list[str] = []

    def kill_once(event: dict[str, Any]) -> None:
        text = event.get("text", "")
        if "the blocks are on" in text:
            trunk.append(text.split("the blocks are on ")[1].split(":")[0])
        if event["event"] == "round" and not killed:
            killed.append(trunk[0] if board == "the trunk" else board)
            worker_of(tuning_site, killed[0]).kill()

    end = follow(tuning_site, split_job(tiny_model, name), kill_once)
    assert killed and end["state"] == "done", end
    assert same(adapter_of(tuning_site, name), undisturbed)


@pytest.fixture(scope="module")
def calm_pipeline(tuning_site: Site, tiny_model: str) -> dict[str, Any]:
    """Of the same job with its blocks on two boards."""
    events: list[dict[str, Any]] = []
    end = follow(tuning_site, pipeline_job(tiny_model, "calm-pipeline"), events.append)
    assert end["state"] == "done", end
    where = "the blocks are on idle (2), board1 (2): the job names them"
    assert any(where in event.get("text", "") for event in events)
    for one in (event for event in events if event["event"] == "round"):
        assert set(one["devices"]) == set(BOARDS)
        assert one["devices"]["idle"]["compute_s"] > 0 or not one["trained"]
        assert one["devices"]["idle"]["held_out_loss"] is None
        assert one["devices"]["board1"]["held_out_loss"] is not None
    return adapter_of(tuning_site, "calm-pipeline")


def pipeline_job(model: str, name: str) -> Job:
    return msgspec.structs.replace(split_job(model, name), mode="pipeline", trunk=("idle", "board1"))


def test_a_pipeline_comes_to_what_one_trunk_comes_to(
    tuning_site: Site, undisturbed: dict[str, Any], calm_pipeline: dict[str, Any]
) -> None:
    assert same(calm_pipeline, undisturbed), "bit by bit: boards here are one machine"
    shown = tuning_site.cli("tune", "report", "calm-pipeline")
    assert "pipeline; the blocks are on idle (2), board1 (2)" in shown.stdout, shown.stdout


@pytest.mark.parametrize("board", [pytest.param("idle", marks=pytest.mark.slow), "board1"])
def test_a_segment_that_is_killed_changes_nothing(
    board: str, tuning_site: Site, tiny_model: str, calm_pipeline: dict[str, Any]
) -> None:
    """Both parts of board1, or a board that has blocks alone."""
    killed: list[str] = []

    def kill_once(event: dict[str, Any]) -> None:
        if event["event"] == "round" and not killed:
            killed.append(board)
            worker_of(tuning_site, board).kill()

    end = follow(tuning_site, pipeline_job(tiny_model, f"cut-{board}"), kill_once)
    assert killed and end["state"] == "done", end
    assert same(adapter_of(tuning_site, f"cut-{board}"), calm_pipeline)


@pytest.mark.slow
def test_gradients_by_a_low_rank_matrix_come_to_the_same_for_fewer_bytes(tuning_site: Site, tiny_model: str) -> None:
    rank, hidden, steps = 2, 64, 4
    sent: dict[str, list[dict[str, int]]] = {}
    for name, changes in (
        ("by-features", {"trunk": "idle"}),
        ("by-rank", {"trunk": "idle", "uplink_grad": "lowrank"}),
        ("by-rank-cut", {"trunk": ("idle", "board1"), "uplink_grad": "lowrank", "mode": "pipeline"}),
    ):
        wanted = split_job(tiny_model, name, rounds={"count": 4, "steps": steps, "aggregation": "rolora"})
        adapter = Adapter(rank=rank, matrices=("down",), blocks="last")
        rounds = rounds_of(tuning_site, msgspec.structs.replace(wanted, adapter=adapter, **changes))
        assert rounds[-1]["held_out_loss"] < rounds[0]["held_out_loss"], "it has learnt something"
        sent[name] = [{board: one["devices"][board]["sent_bytes"] for board in TRAINED} for one in rounds]
    by_features, by_rank = (adapter_of(tuning_site, name) for name in ("by-features", "by-rank"))
    assert len(by_rank) == 2 and all(".down_proj." in name for name in by_rank)
    for name, values in by_rank.items():
        np.testing.assert_allclose(values, by_features[name], atol=1e-5, err_msg=name)
    assert same(adapter_of(tuning_site, "by-rank-cut"), by_rank)
    for board in TRAINED:
        *long, judged = (one[board] for one in sent["by-features"])
        for number, (long_bytes, short_bytes) in enumerate(
            zip(long, (one[board] for one in sent["by-rank"]), strict=False)
        ):
            states = (long_bytes - judged) / 2  # and gradients by features, as long
            gradients = short_bytes - judged - states
            assert gradients == (states * rank / hidden if number % 2 else 4 * steps * hidden * rank)
    said = tuning_site.cli(
        "run", tiny_model, "--prompt", "hello", "--raw", "--max-tokens", "4", "--context", "128", "--adapter", "by-rank"
    )
    assert said.returncode == 0, said.stderr


@pytest.mark.slow
def test_a_private_job_is_paid_for_once_whoever_is_killed_and_says_what_is_not_covered(
    tuning_site: Site, tiny_model: str
) -> None:
    steps, killed, events = 4, [], []
    wanted = msgspec.structs.replace(
        split_job(tiny_model, "private-halves", rounds={"count": 2, "steps": steps, "aggregation": "ffa"}),
        uplink_grad="lowrank", privacy=Privacy(epsilon=3.0), trunk="idle",
        adapter=Adapter(rank=2, matrices=("down",), blocks="last"),
    )  # fmt: skip

    def kill_once(event: dict[str, Any]) -> None:
        events.append(event)
        if event["event"] == "round" and not killed:
            killed.append(worker_of(tuning_site, "board2"))
            killed[0].kill()

    end = follow(tuning_site, wanted, kill_once)
    assert killed and (end["state"], end["most_epsilon"]) == ("done", 3.0), end
    assert 2.9 < end["epsilon"] <= 3.0, "noise is no more than the budget asks for"
    said = "only gradients are covered; activations are not"
    assert any(said in event.get("text", "") for event in events)
    rounds = [event for event in events if event["event"] == "round"]
    assert [one["round"] for one in rounds] == [0, 1], "nothing is judged where losses are not told"
    for one in rounds:
        assert one["loss"] is None and one["held_out_loss"] is None and set(one["devices"]) == set(BOARDS)
        for board in TRAINED:
            told = one["devices"][board]
            assert told["noise"] > 0.5 and told["compute_s"] == 0 and told["sent_bytes"] > 4 * steps * 64 * 2
    books = [msgspec.json.decode(path.read_bytes()) for path in tuning_site.folder.rglob("privacy/notes.json")]
    mine = [
        account for book in books for name, account in book["jobs"].items() if name.startswith("tune-private-halves/")
    ]
    assert [account["releases"] for account in mine] == [2 * steps] * 2, "each step once, though some were made again"
    assert all(values.any() for values in adapter_of(tuning_site, "private-halves").values()), "B has moved"
    with tuning_site.client() as there:
        provenance = msgspec.json.decode(there.file("/v1/jobs/private-halves/provenance.json"))
    assert provenance["privacy"]["covers"] == said and set(provenance["privacy"]["spent"]) == set(TRAINED)
    for command in ("status", "report"):
        shown = tuning_site.cli("tune", command, "private-halves")
        assert said in " ".join(shown.stdout.split()) and "of 3" in shown.stdout, shown.stdout


@pytest.mark.slow
def test_a_coordinator_that_is_killed_begins_the_round_anew(
    tuning_site: Site, tiny_model: str, undisturbed: dict[str, Any]
) -> None:
    kill_the_coordinator_of(tuning_site, split_job(tiny_model, "killed-hub"))
    assert same(adapter_of(tuning_site, "killed-hub"), undisturbed)


def test_who_can_not_have_the_blocks_is_named(tuning_site: Site, tiny_model: str) -> None:
    with pytest.raises(EdgelamError, match="no boards can have the blocks: nobody: not heard of"):
        follow(tuning_site, split_job(tiny_model, "no-trunk", trunk="nobody"))
    with pytest.raises(EdgelamError, match=r"rounds\.middle: 'median' means nothing with mode = 'split'"):
        follow(tuning_site, split_job(tiny_model, "bad", rounds={"middle": "median"}))
