"""A job on pictures, on real processes: a frozen net's features, and a task module that tells their labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("torch")
pytest.importorskip("PIL")

from PIL import Image

from coordinator.rounds.job import Job, Rounds
from models.formats import safetensors
from models.training.images import Picture, pixels_of
from testbed import commands
from testbed.boards import BoardSpec, with_data
from testbed.site import CoordinatorProcess
from tests.e2e.site import Site, prefer_own_ports
from tests.e2e.tuning import follow
from tests.models.tiny_vit import SIZE, WIDTH, vit_model
from wire.errors import EdgelamError
from wire.samples import Images

pytestmark = pytest.mark.torch

LABELS = ("dawn", "forest", "night")
COLOURS = {"dawn": (220, 120, 60), "forest": (40, 150, 50), "night": (20, 20, 60)}
BOARDS = ("board1", "board2")


def draw(path: Path, label: str, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    values = np.array(COLOURS[label]) + rng.normal(0, 25, (24, 32, 3))
    Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def photo_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two boards with pictures, one of which is broken."""
    folder = tmp_path_factory.mktemp("photos")
    for number, board in enumerate(BOARDS):
        for place in range(24):
            label = LABELS[place % 3]
            draw(folder / "photos" / board / label / f"{place}.{('png', 'jpg')[place % 2]}", label, 50 * number + place)
    (folder / "photos" / "board2" / "night" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    name = f"photos-{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    prefer_own_ports(folder)
    coordinator = CoordinatorProcess(folder, name)
    site = Site(folder, coordinator, coordinator.start())
    try:
        boards = tuple(BoardSpec(name=board, memory_bytes=2 << 30) for board in BOARDS)
        specs = with_data(boards, "photos", folder / "photos")
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


@pytest.mark.slow
def test_labels_of_pictures_are_learnt_where_they_are(photo_site: Site, tmp_path: Path) -> None:
    site, rounds = photo_site, list[dict[str, Any]]()
    net = tmp_path / "vit.onnx"
    net.write_bytes(vit_model())
    wanted = Job(
        name="photos", model=str(net), data="photos", labels=LABELS, images=Images(features="pooled"),
        rounds=Rounds(count=4, steps=30, batch_rows=6, learning_rate=0.05, held_out=0.2),
    )  # fmt: skip
    end = follow(site, wanted, lambda event: rounds.append(event) if event["event"] == "round" else None)
    assert end["state"] == "done", end
    assert rounds[-1]["held_out_accuracy"] > 0.9 > rounds[0]["held_out_accuracy"]
    assert [rounds[0]["devices"][board]["bad_rows"] for board in BOARDS] == [0, 1]
    assert rounds[0]["up_bytes"] == 2 * 4 * len(LABELS) * (WIDTH + 1)
    done = site.cli("tune", "adapter", "photos", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    head = safetensors.open_safetensors(tmp_path / "out" / "head.safetensors")
    images = msgspec.json.decode(head.metadata["images"], type=Images)
    # Others tell labels of new pictures by the published net, the tensor that the file names, and the task module.
    model = onnx.load_from_string(net.read_bytes())
    model.graph.output.append(onnx.helper.make_tensor_value_info(images.features, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    told, files = [], []
    for number, label in enumerate(LABELS * 5):
        files.append(str(draw(tmp_path / "new" / f"{number}.png", label, 500 + number)))
        pixels = pixels_of(Picture(Path(files[-1]), 0), images, SIZE, SIZE)
        assert isinstance(pixels, np.ndarray)
        [features] = session.run([images.features], {"picture": pixels[None]})[0]
        scores = head.view("weight") @ (features / np.sqrt(np.square(features).mean())) + head.view("bias")
        told.append(LABELS[int(scores.argmax())])
    assert sum(one == label for one, label in zip(told, LABELS * 5, strict=True)) >= 14
    # The boards tell the same, over one of them or two.
    (tmp_path / "new" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    for adapter, boards, given in (("photos", "2", files), (str(tmp_path / "out"), "1", [str(tmp_path / "new")])):
        done = site.cli(
            "label", *given, "--adapter", adapter, "--json", "--boards-at-least", boards, "--boards-at-most", boards
        )
        assert done.returncode == (0 if given is files else 5), done.stderr
        shown = json.loads(done.stdout)
        assert {one["file"]: one["label"] for one in shown["pictures"]} == dict(zip(files, told, strict=True))
        assert len(shown["bad"]) == int(given is not files) and len(shown["stages"]) == int(boards)
    for changed, said in (
        ({"images": Images(features="nothing")}, "'nothing' is no tensor"),
        ({"images": Images()}, "images.features"),
        ({"bad_rows": "refuse"}, "night/torn.jpg: no picture"),
    ):
        rounds_of_both = msgspec.structs.replace(wanted.rounds, at_least=2)
        again = msgspec.structs.replace(wanted, name="refused", rounds=rounds_of_both, **changed)
        try:
            refused = follow(site, again)["because"]
        except EdgelamError as error:
            refused = error.message
        assert said in refused, refused
