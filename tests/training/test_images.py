"""Pictures as boards have them: which are read, what is no picture, and features that are those of the whole net."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("PIL")

from PIL import Image

from agent.workers.frozen import FrozenNet
from coordinator.rounds.features import net_working_bytes
from models.engine.base import EngineFailed
from models.engine.items import ItemStage
from models.families.features import FeatureConfig
from models.items.features import features_part
from models.items.pack import PackedItems, pack_items
from models.lora.adapter import AdapterSpec
from models.training.data import BadRow
from models.training.features import image_features
from models.training.images import Picture, pictures, pixels_of
from models.training.memory import head_peak_bytes
from models.training.samples import IGNORED
from tests.models.tiny_bert import write_bert
from tests.models.tiny_vit import SIZE, WIDTH, vit_model
from wire.errors import CorruptData, UsageError
from wire.samples import Images

LABELS = ("cat", "dog")


def save(path: Path, values: Any, **more: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path, **more)
    return path


def noise(seed: int, height: int = 20, width: int = 30) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def plain(**more: Any) -> Images:
    return Images(**{"mean": (0, 0, 0), "deviation": (1, 1, 1), **more})


def pixels(path: Path, images: Images, width: int, height: int) -> Any:
    return pixels_of(Picture(path, 0), images, width, height)


def huge_png(path: Path) -> Path:
    """A few bytes that say they are 40,000 pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return path


def test_folders_are_labels_and_others_are_said(tmp_path: Path) -> None:
    for name in ("dog/2.png", "dog/1.jpg", "cat/a.PNG", "bird/b.png"):
        save(tmp_path / name, noise(1), format="PNG" if name.lower().endswith("png") else "JPEG")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    found = list(pictures(tmp_path, LABELS))
    assert [(one.where, one.label) for one in found if isinstance(one, Picture)] == [
        ("cat/a.PNG", 0), ("dog/1.jpg", 1), ("dog/2.png", 1),
    ]  # fmt: skip
    assert [str(one) for one in found if isinstance(one, BadRow)] == ["bird/b.png: its label is none of the job's"]
    private = [one for one in pictures(tmp_path, LABELS, keep_all=True) if isinstance(one, Picture)]
    assert [one.label for one in private] == [IGNORED, 0, 1, 1]
    with pytest.raises(CorruptData, match="no folders of labels"):
        list(pictures(tmp_path / "cat", LABELS))
    with pytest.raises(UsageError, match="no such file"):
        list(pictures(tmp_path / "nowhere", LABELS))


def test_pixels_are_those_of_the_picture_as_the_net_wants_them(tmp_path: Path) -> None:
    values = noise(2, 8, 8)
    path = save(tmp_path / "cat" / "a.png", values)
    found = pixels(path, plain(), 8, 8)
    np.testing.assert_allclose(found, values.transpose(2, 0, 1) / 255, atol=1e-6)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    moved = pixels(path, plain(mean=(0.5, 0.25, 0.0), deviation=(0.5, 1.0, 2.0)), 8, 8)
    for channel, (mean, deviation) in enumerate(((0.5, 0.5), (0.25, 1.0), (0.0, 2.0))):
        np.testing.assert_allclose(moved[channel], (values[:, :, channel] / 255 - mean) / deviation, atol=1e-6)
    wide = np.concatenate([np.zeros((8, 4, 3)), values, np.zeros((8, 4, 3))], axis=1)
    middle = pixels(save(tmp_path / "cat" / "wide.png", wide), plain(), 8, 8)
    np.testing.assert_allclose(middle, values.transpose(2, 0, 1) / 255, atol=1e-6)
    few = Image.fromarray(values).quantize(8)
    few.save(tmp_path / "cat" / "few.png")
    indexed = pixels(tmp_path / "cat" / "few.png", plain(), 8, 8)
    np.testing.assert_allclose(indexed, np.asarray(few.convert("RGB")).transpose(2, 0, 1) / 255, atol=1e-6)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(values).save(tmp_path / "cat" / "turned.png", exif=turned)
    upright = pixels(tmp_path / "cat" / "turned.png", plain(), 8, 8)
    np.testing.assert_allclose(upright, np.rot90(values, -1).transpose(2, 0, 1) / 255, atol=1e-6)
    soft = np.full((640, 960, 3), (250, 130, 10), np.uint8)
    large = pixels(save(tmp_path / "cat" / "large.jpg", soft, quality=95), plain(), 8, 8)
    np.testing.assert_allclose(large, np.tile(soft[:8, :8].transpose(2, 0, 1) / 255, 1), atol=0.02)
    grey = pixels(save(tmp_path / "cat" / "grey.png", values[:, :, 0]), plain(), 8, 8)
    np.testing.assert_allclose(grey, np.repeat(values[None, :, :, 0] / 255, 3, axis=0), atol=1e-6)


def test_what_is_no_picture_is_a_bad_row_and_nothing_large_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = save(tmp_path / "cat" / "a.png", noise(3, 200, 200)).read_bytes()
    cut = tmp_path / "cat" / "cut.png"
    cut.write_bytes(whole[: len(whole) // 2])
    empty = tmp_path / "cat" / "empty.jpg"
    empty.write_bytes(b"")
    text = tmp_path / "cat" / "text.png"
    text.write_text("<svg/>")
    damaged = tmp_path / "cat" / "damaged.png"
    damaged.write_bytes(whole[:60] + bytes(200) + whole[260:])
    other = save(tmp_path / "cat" / "other.png", noise(1), format="BMP")
    for path in (cut, empty, text, damaged, other):
        found = pixels(path, plain(), 8, 8)
        assert isinstance(found, BadRow) and found.because.startswith("no picture"), path
    deep = tmp_path / "cat" / "deep.png"
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(deep)
    assert "8 bits" in pixels(deep, plain(), 8, 8).because
    small = pixels(tmp_path / "cat" / "a.png", plain(most_pixels=39_999), 8, 8)
    assert small.because == "200 x 200, at most 39999 pixels"

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "convert", never)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", never)
    huge = pixels(huge_png(tmp_path / "cat" / "huge.png"), plain(), 8, 8)
    assert isinstance(huge, BadRow) and ("pixels" in huge.because), huge


def test_who_has_no_pillow_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "cat" / "a.png", noise(1))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError) as caught:
        pixels(path, plain(), 8, 8)
    assert "edgelam[images]" in caught.value.try_


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedItems:
    folder = tmp_path_factory.mktemp("vit")
    (folder / "vit.onnx").write_bytes(vit_model())
    return pack_items(folder / "vit.onnx", "vit", folder / "cache")


def net_at(packed: PackedItems, tensor: str, pool: str, folder: Path) -> FrozenNet:
    part = features_part(packed, tensor)
    folder.mkdir()
    (folder / "part.onnx").write_bytes(part.graph)
    net = FrozenNet(ItemStage.load(folder / "part.onnx", part.files.values(), 1), pool)
    assert (net.height, net.width, net.hidden) == (SIZE, SIZE, part.hidden)
    return net


def whole_net(tensor: str, given: Any) -> Any:
    """The same tensor as the published file makes it."""
    model = onnx.load_from_string(vit_model())
    model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run([tensor], {"picture": given[None]})[0][0]


def test_features_are_what_the_whole_net_makes_on_its_way(packed: PackedItems, tmp_path: Path) -> None:
    given = np.random.default_rng(5).standard_normal((3, SIZE, SIZE)).astype(np.float32)
    class_token = whole_net("pooled", given)
    assert class_token.shape == (WIDTH,)
    np.testing.assert_allclose(
        net_at(packed, "pooled", "first", tmp_path / "1").features(given), class_token, rtol=1e-5
    )
    rows = whole_net("l5.out", given)
    np.testing.assert_array_equal(rows[0], class_token)
    np.testing.assert_allclose(net_at(packed, "l5.out", "first", tmp_path / "2").features(given), rows[0], rtol=1e-5)
    mean = net_at(packed, "l2.out", "mean", tmp_path / "3").features(given)
    np.testing.assert_allclose(mean, whole_net("l2.out", given).mean(axis=0), rtol=1e-4, atol=1e-5)
    part, last = features_part(packed, "l0.out"), features_part(packed, "pooled")
    assert len(part.files) < len(last.files), "weights behind the features are not sent"
    patches = net_at(packed, "patches", "first", tmp_path / "4").features(given)
    np.testing.assert_allclose(patches, whole_net("patches", given).mean(axis=(1, 2)), rtol=1e-4, atol=1e-5)


def test_a_tensor_that_is_none_is_refused_with_those_that_are(packed: PackedItems, tmp_path: Path) -> None:
    for tensor in ("", "nothing", "picture"):
        with pytest.raises(ValueError, match=r"images\.features: .* the last of them: .*pooled"):
            features_part(packed, tensor)
    bert = pack_items(write_bert(tmp_path / "bert"), "bert", tmp_path / "cache")
    with pytest.raises(ValueError, match="takes no pictures"):
        features_part(bert, "x")
    stage = ItemStage.load(_stage_file(packed, tmp_path), packed.files.values(), 1)
    with pytest.raises(EngineFailed, match="gives"):
        FrozenNet(stage, "first")


def _stage_file(packed: PackedItems, folder: Path) -> Path:
    """A block of the net, which takes no picture."""
    path = folder / "block.onnx"
    path.write_bytes(packed.parts.graph_of(1, 2)[0])
    return path


def test_each_picture_has_features_of_one_size_and_bad_ones_are_counted(packed: PackedItems, tmp_path: Path) -> None:
    net = net_at(packed, "pooled", "first", tmp_path / "net")
    data = tmp_path / "photos"
    for number in range(6):
        save(data / LABELS[number % 2] / f"{number}.png", noise(number))
    save(data / "bird" / "b.png", noise(9))
    (data / "cat" / "9.png").write_bytes(b"broken")
    made = image_features(data, Images(), LABELS, 1, net)
    assert made.bad_rows == 2 and [str(one).split(":")[0] for one in made.said] == ["bird/b.png", "cat/9.png"]
    assert [row.label for row in made.rows] == [0, 0, 0, 1, 1, 1] and made.values.shape == (6, WIDTH)
    np.testing.assert_allclose(np.square(made.values).mean(axis=1), 1, rtol=1e-5)
    first = pixels(data / "cat" / "0.png", Images(), SIZE, SIZE)
    expected = whole_net("pooled", first)
    np.testing.assert_allclose(made.values[0], expected / np.sqrt(np.square(expected).mean()), rtol=1e-4)
    assert len(image_features(data, Images(most_images=3), LABELS, 1, net).rows) <= 3
    parts = made.split(0.34, seed=1)
    assert len(parts.held_out) == 3 and len(parts.trained) == 3
    with pytest.raises(CorruptData, match="no picture with one of the labels"):
        image_features(data, Images(), ("fish", "frog"), 1, net)


MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from agent.workers import training
from agent.workers.frozen import FrozenNet
from models.engine.items import ItemStage
from models.families.features import FeatureConfig
from models.lora.adapter import HEAD, AdapterSpec, initial, shapes
from models.training.features import image_features
from models.training.heads import TrainedHead
from models.training.rounds import Round
from tests.training.test_heads import asked, task
from wire.samples import Images
torch.set_num_threads(1)
folder, files = Path(sys.argv[1]), [Path(one) for one in json.loads(sys.argv[2])]
net = FrozenNet(ItemStage.load(folder / "part.onnx", files, 1), "first")
made = image_features(folder / "photos", Images(), ("cat", "dog"), 1, net)
config, spec = FeatureConfig(hidden=net.hidden), AdapterSpec(rank=1, alpha=1.0, labels=2)
stage, start = TrainedHead(made.values, initial(config, spec)[HEAD]), np.zeros(2 * (net.hidden + 1), np.float32)
given = Round(stage, shapes(config, spec), made.split(0.0, 1), task(labels=("cat", "dog")), 1, asked(), start)
while given.step():
    pass
given.vector()
assert len(made.rows) == 4 and not made.bad_rows
# Not getrusage: to it a process took what its parent took when it was begun.
print(json.dumps(1024 * int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])))
"""


@pytest.mark.torch
@pytest.mark.slow
def test_what_pictures_take_is_foretold(packed: PackedItems, tmp_path: Path) -> None:
    """The largest that are decoded, one of them to be turned."""
    pytest.importorskip("torch")
    images = Images()
    large = Image.fromarray(noise(1, 50, 100)).resize((7_000, images.most_pixels // 7_000))
    turned = Image.Exif()
    turned[0x0112] = 6
    for label in LABELS:
        (tmp_path / "photos" / label).mkdir(parents=True)
        large.save(tmp_path / "photos" / label / "1.png", exif=turned, compress_level=1)
        large.convert("RGBA").save(tmp_path / "photos" / label / "2.png", compress_level=1)
    part = features_part(packed, "pooled")
    (tmp_path / "part.onnx").write_bytes(part.graph)
    files = json.dumps([str(path) for path in part.files.values()])
    command = [sys.executable, "-c", MEASURE, str(tmp_path), files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads(done.stdout.splitlines()[-1])
    config, spec = FeatureConfig(hidden=part.hidden), AdapterSpec(rank=1, alpha=1.0, labels=2)
    foretold = head_peak_bytes(config, spec, 8, 4, net_working_bytes(part, images))
    print(measured / 1e6, foretold / 1e6)
    assert measured <= foretold <= 1.5 * measured
