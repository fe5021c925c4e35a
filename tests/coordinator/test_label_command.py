"""`edgelam label`: what it makes of files of readings and of pictures, and what it says of those that are none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.cli import _add_heavier_commands, app
from coordinator.commands import label as command
from coordinator.items.requests import InputsRequest, ItemsRequest, tensor_of
from models.lora.head import read_head
from models.training.images import Picture, fitted
from models.training.told import Told, told
from tests.training.test_told import LABELS, SCHEMA, head_file, recordings
from wire.errors import CorruptData, Degraded, EdgelamError, UsageError
from wire.samples import Images

SIZE = 8
NAMES = ("cat", "dog")


class Answering:
    """Stands for the coordinator: has a job `photos`, and tells of pictures which half of their pixels is lighter."""

    def __init__(self, head: bytes = b"") -> None:
        self.head = head
        self.asked: list[ItemsRequest] = []

    def __enter__(self) -> Answering:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def file(self, path: str) -> bytes:
        if path == "/v1/jobs/photos/head.safetensors":
            return self.head
        raise UsageError(f"no job {path.split('/')[3]!r}", try_="jobs: photos")

    def last(self, path: str, request: InputsRequest, _say: Any) -> dict[str, Any]:
        assert (path, request) == ("/v1/inputs", InputsRequest(model="vit", adapter="photos"))
        return {"event": "inputs", "inputs": {"pixels": {"dtype": "u8", "shape": [1, 3, SIZE, SIZE]}}, "labels": NAMES}

    def stream(self, path: str, request: ItemsRequest) -> Iterator[dict[str, Any]]:
        assert path == "/v1/items"
        self.asked.append(request)
        for index, item in enumerate(request.items):
            [pixels] = (
                tensor_of({"dtype": one.dtype, "shape": one.shape, "data": _base64(one.data)}) for one in item.values()
            )
            left = float(pixels[..., : SIZE // 2].mean() > pixels[..., SIZE // 2 :].mean())
            shares = np.array([[left, 1 - left]], np.float32)
            body = {"dtype": "f32", "shape": [1, 2], "data": _base64(shares.tobytes())}
            yield {"event": "item", "index": index, "outputs": {"shares": body}}
        yield {"event": "end", "labels": NAMES, "items": len(request.items), "items_per_s": 1.0,
               "predicted_items_per_s": 1.0, "item_s": 1.0, "predicted_item_s": 1.0, "stages": []}  # fmt: skip


def _base64(data: bytes) -> str:
    import base64

    return base64.b64encode(data).decode()


def run(*arguments: str) -> None:
    _add_heavier_commands()
    app(["label", *arguments], standalone_mode=False)


def refused(kind: type[EdgelamError], *arguments: str) -> str:
    with pytest.raises(kind) as caught:
        run(*arguments)
    assert type(caught.value) is kind
    return f"{caught.value.message}\n{caught.value.try_}"


def test_readings_are_told_here_without_anybody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head_file(tmp_path / "out")
    files = [str(recordings(tmp_path / name, label=name == "a.csv")) for name in ("a.csv", "b.csv")]
    with (tmp_path / "b.csv").open("a") as more:
        more.write("\n1,p9,none,2\n")
    run(*files, "--adapter", str(tmp_path / "out"), "--json")
    shown = json.loads(capsys.readouterr().out)
    head = read_head(tmp_path / "out" / "head.safetensors")
    expected = [one for file in files for one in told(Path(file), head) if isinstance(one, Told)]
    assert shown["schema"] == "edgelam.label/1" and shown["labels"] == list(LABELS) and shown["bad_rows"] == 1
    for one, window in zip(shown["windows"], expected, strict=True):
        assert one["label"] == LABELS[window.shares.argmax()]
        np.testing.assert_allclose(list(one["shares"].values()), window.shares)
        assert one["last_row"] - one["first_row"] == SCHEMA.window - 1 == one["to"] - one["from"]
    assert [one["file"] for one in shown["windows"]] == [files[0]] * 36 + [files[1]] * 36
    run(files[1], "--adapter", str(tmp_path / "out"))
    told_to_people = capsys.readouterr()
    lines = told_to_people.out.splitlines()
    assert lines[0].split() == ["label", "share", "or", "else", "file", "rows", "from", "to"]
    first, *others = (line for line in lines if "b.csv" in line)
    assert re.search(r"b\.csv +2 to 21 +0 +19$", first) and first.split()[0] in LABELS and len(others) == 35
    assert told_to_people.err == "... b.csv:422: 'ax' is no number\n"


def test_what_are_no_readings_is_said(tmp_path: Path) -> None:
    head_file(tmp_path / "out")
    adapter = ("--adapter", str(tmp_path / "out"))
    assert "nowhere.csv: no such file\nfiles of .csv, .parquet" in refused(UsageError, "nowhere.csv", *adapter)
    (tmp_path / "notes.txt").write_text("no readings")
    assert "'.txt' is not read" in refused(UsageError, str(tmp_path / "notes.txt"), *adapter)
    path = tmp_path / "other.csv"
    path.write_text("x,y\n1,2\n")
    assert "other.csv has no column 'ax', 'ay', 'who', 't'" in refused(CorruptData, str(path), *adapter)
    path.write_text("t,who,ax,ay\n1,p,1,2\n")
    assert "nowhere 20 rows behind each other" in refused(CorruptData, str(path), *adapter)


def test_what_names_no_task_module_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Answering()
    monkeypatch.setattr(command, "client", lambda *_: there)
    assert "no job 'watch'" in refused(UsageError, "a.csv", "--adapter", "watch")
    (tmp_path / "empty").mkdir()
    assert "no texts" in refused(UsageError, "minilm", "--adapter", str(tmp_path / "empty"))
    assert "no texts" in refused(UsageError, "minilm")
    assert not there.asked


def picture(path: Path, light_left: bool) -> Path:
    image = pytest.importorskip("PIL.Image")
    values = np.random.default_rng(1).integers(0, 100, (20, 20, 3), np.uint8)
    values[:, :10] += np.uint8(100 * light_left)
    values[:, 10:] += np.uint8(100 * (not light_left))
    path.parent.mkdir(exist_ok=True)
    image.fromarray(values).save(path)
    return path


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answering:
    from coordinator.rounds.adapters import files_of
    from coordinator.rounds.job import Job
    from coordinator.rounds.store import JobRecord
    from models.families.features import FeatureConfig

    job = Job(name="photos", model="vit", data="d", labels=NAMES, images=Images(most_pixels=10_000))
    files = files_of(FeatureConfig(hidden=4), JobRecord(job=job, state="done"), np.zeros(10, np.float32), [])
    there = Answering(files["head.safetensors"])
    monkeypatch.setattr(command, "client", lambda *_: there)
    return there


def test_pictures_are_scaled_here_and_told_in_requests_that_they_fit_in(
    photos: Answering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [True, False, True, True, False]
    files = [picture(tmp_path / "new" / f"{number}.png", side) for number, side in enumerate(sides)]
    monkeypatch.setattr(command, "MOST_PIXEL_BYTES", 2 * 3 * SIZE * SIZE)
    run(str(files[0]), str(tmp_path / "new"), "--adapter", "photos", "--json", "--boards-at-least", "2")
    shown = json.loads(capsys.readouterr().out)
    expected = [NAMES[not side] for side in (sides[0], *sides)]
    assert [one["label"] for one in shown["pictures"]] == expected and shown["bad"] == []
    assert [one["file"] for one in shown["pictures"]] == [str(file) for file in (files[0], *files)]
    assert [len(request.items) for request in photos.asked] == [2, 2, 2]
    assert all(request.model == "vit" and request.boards_at_least == 2 for request in photos.asked)
    sent = photos.asked[0].items[0][""]
    pixels = fitted(Picture(files[0], 0), 10_000, SIZE, SIZE)
    assert isinstance(pixels, np.ndarray) and sent.data == pixels.tobytes() and sent.shape == (1, 3, SIZE, SIZE)


def test_what_is_no_picture_is_said_and_the_others_are_told(
    photos: Answering, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = picture(tmp_path / "new" / "a.png", True), tmp_path / "new" / "b.png"
    bad.write_bytes(b"broken")
    assert "1 of 2 are no pictures" in refused(Degraded, str(tmp_path / "new"), "--adapter", "photos")
    shown = capsys.readouterr()
    assert re.search(rf"^cat +100% +dog 0% +{re.escape(str(good))}$", shown.out, re.M)
    assert f"{bad}: no picture" in shown.err
    assert "none of these is a picture" in refused(CorruptData, str(bad), "--adapter", "photos")
    assert "no such file" in refused(UsageError, "vit", str(good), "--adapter", "photos")
    (tmp_path / "empty").mkdir()
    assert "no .png, .jpg, .jpeg in it" in refused(UsageError, str(tmp_path / "empty"), "--adapter", "photos")
    assert len(photos.asked) == 1
