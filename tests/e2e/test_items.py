"""Models that are no language models on a real site: coordinator, broker, boards, workers, and the official client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openai
import psutil
import pytest

from models.items.words import WordTokenizer
from tests.e2e.site import Site, board_names
from tests.models.tiny_bert import reference, write_bert
from tests.models.tiny_net import picture, unet_model

TEXTS = ["hello world", "the cat sat on the mat", "a board", "boards cut a model on the cat"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("encoder") / "tiny-bert")


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{site.address['http_url']}/v1", api_key="any", max_retries=0, timeout=90) as made:
        yield made


def over(boards: int) -> dict[str, Any]:
    return {"edgelam": {"boards_at_least": boards, "boards_at_most": boards}}


def vectors(client: openai.OpenAI, encoder: Path, boards: int, texts: list[str]) -> list[list[float]]:
    made = client.embeddings.create(model=str(encoder), input=texts, extra_body=over(boards))
    assert [row.index for row in made.data] == list(range(len(texts)))
    return [row.embedding for row in made.data]


def test_three_boards_give_the_vectors_of_the_uncut_model(client: openai.OpenAI, encoder: Path, site: Site) -> None:
    cut = vectors(client, encoder, 3, TEXTS)
    [plan] = [row["plan"] for row in site.get("/v1/status")["deployments"]]
    assert len(plan["stages"]) == 3 and plan["runs"] == "items"
    words = WordTokenizer.beside(encoder)
    assert words is not None
    for text, vector in zip(TEXTS, cut, strict=True):
        np.testing.assert_allclose(vector, reference(words.encode(text)), atol=2e-6)
    assert vectors(client, encoder, 1, TEXTS) == cut


def test_a_net_with_skips_gives_the_bits_of_its_file_over_boards(site: Site, tmp_path: Path) -> None:
    path, pictures = tmp_path / "unet.onnx", [picture(seed) for seed in range(12)]
    path.write_bytes(unet_model())
    files = []
    for number, image in enumerate(pictures):
        np.save(tmp_path / f"{number}.npy", image)
        files += ["--input", str(tmp_path / f"{number}.npy")]
    spread = ("--boards-at-least", "3", "--boards-at-most", "3")
    done = site.cli("infer", str(path), *files, *spread, "--output", str(tmp_path / "out.npz"), "--json")
    assert done.returncode == 0, done.stderr
    end = json.loads(done.stdout)
    assert end["items"] == 12 and len(end["stages"]) == 3
    assert all(row["measured_compute_s"] > 0 for row in end["stages"])
    whole = onnxruntime.InferenceSession(unet_model(), unoptimised(), providers=["CPUExecutionProvider"])
    written = np.load(tmp_path / "out.npz")
    for number, image in enumerate(pictures):
        np.testing.assert_array_equal(written[f"{number}/scores"], whole.run(None, {"picture": image})[0])
    [plan] = [row["plan"] for row in site.get("/v1/status")["deployments"] if row["plan"]["model"] == str(path)]
    sent = [row["sent_bytes_per_item"] for row in end["stages"]]
    assert [stage["hop_bytes"] - size for stage, size in zip(plan["stages"], sent, strict=True)] == [264] * 3
    shown = site.cli("infer", str(path), *files[:2], *spread)
    assert "scores f32 [1, 5]: " in shown.stdout and "predicted" in shown.stderr
    plain = site.cli("plan", str(path), "--explain", *spread)
    assert "per item" in plain.stdout and "items/s" in plain.stdout and "token" not in plain.stdout.split("\n")[0]


def unoptimised() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return options


def test_the_command_line_shows_how_alike_texts_are(site: Site, encoder: Path) -> None:
    done = site.cli("embed", str(encoder), "hello world", "hello world", "the cat sat on the mat")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[2][1:3] == ["1.000", "1.000"] and float(rows[2][3]) < 1
    assert "items:" in done.stderr and "predicted" in done.stderr


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": []}, "input"),
        ({"input": [1, 2]}, "input"),
        ({"input": "a board " * 30}, "62 tokens"),
        ({"input": "a", "dimensions": 5}, "vectors of 5"),
    ],
)
def test_what_an_encoder_can_not_take_is_refused_by_name(
    client: openai.OpenAI, encoder: Path, body: dict[str, Any], words: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.embeddings.create(model=str(encoder), **body)


def test_language_models_and_others_are_told_apart(
    site: Site, client: openai.OpenAI, encoder: Path, tiny_model: str, tmp_path: Path
) -> None:
    with pytest.raises(openai.BadRequestError, match="is a language model"):
        client.embeddings.create(model=tiny_model, input="a")
    with pytest.raises(openai.BadRequestError, match="is no language model"):
        client.completions.create(model=str(encoder), prompt="a")
    (tmp_path / "unet.onnx").write_bytes(unet_model())
    np.save(tmp_path / "wide.npy", np.zeros((1, 3, 16, 17), np.float32))
    done = site.cli("infer", str(tmp_path / "unet.onnx"), "--input", str(tmp_path / "wide.npy"))
    assert done.returncode == 2 and "f32 [1, 3, 16, 16]" in done.stderr
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    done = site.cli("infer", str(tmp_path / "unet.onnx"), "--input", str(tmp_path / "objects.npy"))
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_items_of_a_lost_stage_are_sent_again(site: Site, client: openai.OpenAI, encoder: Path) -> None:
    expected = vectors(client, encoder, 3, TEXTS)
    agents = [psutil.Process(board.pid) for board in site.boards.status().boards]
    workers = [child for agent in agents for child in agent.children(recursive=True)]
    named = [child for child in workers if "agent.workers.items" in child.cmdline()]
    assert len(named) >= 3
    answers: list[list[list[float]]] = []
    asking = threading.Thread(target=lambda: answers.append(vectors(client, encoder, 3, TEXTS * 200)))
    asking.start()
    time.sleep(0.3)
    named[0].kill()
    asking.join(90)
    assert answers == [expected * 200]


def test_a_lost_board_is_replaced_under_items(site: Site, client: openai.OpenAI, encoder: Path) -> None:
    spread = {"edgelam": {"boards_at_least": 1, "boards_at_most": 3}}
    expected = [row.embedding for row in client.embeddings.create(model=str(encoder), input=TEXTS).data]
    client.embeddings.create(model=str(encoder), input=TEXTS, extra_body=spread)
    [plan] = [row["plan"] for row in site.get("/v1/status")["deployments"] if row["plan"]["model"] == str(encoder)]
    site.boards.kill(plan["stages"][0]["device"])
    try:
        made = client.embeddings.create(model=str(encoder), input=TEXTS, extra_body=spread)
        assert [row.embedding for row in made.data] == expected
    finally:
        site.boards.start(plan["stages"][0]["device"])
        site.await_states(dict.fromkeys(board_names(3), "online"))
