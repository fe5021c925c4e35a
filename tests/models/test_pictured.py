"""A net that tells labels of pictures gives what a board's features and the task module give, however it is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest

pytest.importorskip("PIL")

from PIL import Image

from agent.workers.frozen import FrozenNet
from coordinator.rounds.adapters import files_of
from coordinator.rounds.job import Job
from coordinator.rounds.store import JobRecord
from models.engine.items import ItemStage
from models.families.features import FeatureConfig
from models.items.features import FeaturesPart, features_part
from models.items.manifest import bundle, views
from models.items.pack import PackedItems, pack_items
from models.items.pictured import pictured
from models.lora.head import read_head
from models.lora.merged import forget, merged_at
from models.lora.serving import keep, load
from models.training.features import image_features
from models.training.images import Picture, fitted, pixels_of
from tests.models.tiny_net import unet_model
from tests.models.tiny_vit import SIZE, vit_model
from wire.errors import CorruptData, Refused
from wire.samples import Images

LABELS = ("cat", "dog", "fox")
NETS: dict[str, Callable[[], bytes]] = {"vit": vit_model, "unet": unet_model}


class Trained:
    """A net, pictures, and a task module of random numbers on the net's features, as a job leaves it."""

    def __init__(self, folder: Path, net: str, images: Images) -> None:
        self.images, self.cache = images, folder / "cache"
        self.source = folder / f"{net}.onnx"
        self.source.write_bytes(NETS[net]())
        packed = pack_items(self.source, net, self.cache)
        self.part = features_part(packed, images.features)
        self.job = Job(name="p", model=net, data="d", labels=LABELS, images=images)
        self.adapter = folder / "adapter"
        self.write()
        for number in range(3):
            path = folder / "photos" / LABELS[number] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), np.uint8)
            Image.fromarray(values).save(path)
        self.pictures = sorted((folder / "photos").glob("*/*"))

    def write(self, seed: int = 1, base: str | None = None) -> None:
        numbers = np.random.default_rng(seed).standard_normal((len(LABELS), self.part.hidden + 1))
        record = JobRecord(job=self.job, state="done", base=self.part.digest if base is None else base)
        self.adapter.mkdir(exist_ok=True)
        factors = numbers.astype(np.float32).reshape(-1)
        for name, data in files_of(FeatureConfig(hidden=self.part.hidden), record, factors, []).items():
            (self.adapter / name).write_bytes(data)

    def made(self) -> Path:
        return pictured(keep(self.adapter, self.cache), "net-p", self.part, self.cache)

    def on_a_board(self, folder: Path) -> Any:
        """[n, hidden] as a board that trains makes them, in the order of `pictures`."""
        folder.mkdir()
        (folder / "part.onnx").write_bytes(self.part.graph)
        net = FrozenNet(ItemStage.load(folder / "part.onnx", self.part.files.values(), 1), self.images.pool)
        return image_features(self.pictures[0].parents[1], self.images, LABELS, 0, net).values

    def published(self, path: Path) -> Any:
        """The tensor of one picture as the published file makes it, pooled and brought to its length by numpy."""
        model = onnx.load_from_string(self.source.read_bytes())
        name = self.images.features
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        pixels = pixels_of(Picture(path, 0), self.images, SIZE, SIZE)
        assert isinstance(pixels, np.ndarray)
        [tensor] = session.run([name], {"picture": pixels[None]})[0].astype(np.float64)
        if tensor.ndim == 3:
            tensor = tensor.mean(axis=(1, 2))
        elif tensor.ndim == 2:
            tensor = tensor[0] if self.images.pool == "first" else tensor.mean(axis=0)
        return tensor / np.sqrt(np.square(tensor).mean())


def stages_of(packed: PackedItems, cuts: list[int], folder: Path) -> list[ItemStage]:
    found = []
    for first, end in zip([0, *cuts], [*cuts, len(packed.parts)], strict=True):
        path = folder / f"{first}-{end}.onnx"
        path.write_bytes(packed.parts.graph_of(first, end)[0])
        found.append(ItemStage.load(path, list(packed.files.values()), 1))
    return found


def answer(packed: PackedItems, path: Path, stages: list[ItemStage]) -> Any:
    """[labels] of a picture, by one stage after the other."""
    given = fitted(Picture(path, 0), 10_000, SIZE, SIZE)
    assert isinstance(given, np.ndarray)
    [port] = packed.config.inputs
    assert (port.dtype, port.shape) == ("u8", (1, 3, SIZE, SIZE))
    data = bundle([port], 1, {port.name: given[None]})
    for stage in stages:
        data = stage.run(data, 1)
    [out] = packed.config.outputs
    return np.array(views([out], 1, data)[out.name][0], np.float64)


@pytest.mark.parametrize(
    ("net", "images"),
    [
        ("vit", Images(features="pooled")),
        ("vit", Images(features="l5.out", pool="first", mean=(0.5, 0.25, 0.0), deviation=(0.5, 1.0, 2.0))),
        ("vit", Images(features="l2.out", pool="mean")),
        ("unet", Images(features="down2")),
        ("unet", Images(features="flat")),
    ],
)
def test_it_tells_labels_as_boards_and_the_formulas_do(net: str, images: Images, tmp_path: Path) -> None:
    trained = Trained(tmp_path, net, images)
    head = read_head(trained.adapter / "head.safetensors")
    packed = pack_items(trained.made(), "net-p", trained.cache)
    assert packed.config.labels == LABELS
    features = trained.on_a_board(tmp_path / "board")
    whole, cut = stages_of(packed, [], tmp_path), stages_of(packed, [len(packed.parts) // 2], tmp_path)
    for path, of_board in zip(trained.pictures, features, strict=True):
        scores = head.weight.astype(np.float64) @ trained.published(path) + head.bias
        expected = np.exp(scores) / np.exp(scores).sum()
        for stages in (whole, cut):
            shares = answer(packed, path, stages)
            np.testing.assert_allclose(shares, expected, atol=1e-5)
            assert shares.argmax() == (head.weight @ of_board + head.bias).argmax()


def test_it_is_made_once_and_goes_with_what_was_packed_of_it(tmp_path: Path) -> None:
    trained = Trained(tmp_path, "vit", Images(features="pooled"))
    made = trained.made()
    assert trained.made() == made and merged_at(made.parent.name, trained.cache) == [made]
    packed = pack_items(made, "net-p", trained.cache)
    forget(made, trained.cache)
    assert not made.exists() and not any(path.exists() for path in packed.files.values())
    trained.write(seed=2)
    assert trained.made() != made, "another task module is another net"


def test_what_is_of_another_net_is_refused(tmp_path: Path) -> None:
    trained = Trained(tmp_path, "vit", Images(features="pooled"))
    other = features_part(pack_items(trained.source, "vit", trained.cache), "l1.out")
    with pytest.raises(Refused, match="another checkpoint"):
        pictured(keep(trained.adapter, trained.cache), "net-p", other, trained.cache)
    trained.write(base="")
    wider: FeaturesPart = msgspec.structs.replace(trained.part, hidden=trained.part.hidden + 1)
    with pytest.raises(Refused, match=r"\[3, 16\], the net gives 17 features"):
        pictured(keep(trained.adapter, trained.cache), "net-p", wider, trained.cache)
    with pytest.raises(Refused, match="readings or pictures"):
        load(keep(trained.adapter, trained.cache), FeatureConfig(hidden=16), trained.cache)


def test_a_net_that_says_labels_of_which_it_gives_no_shares_is_damaged(tmp_path: Path) -> None:
    for said in ('["a", "b"]', '["a"', "[1, 2, 3, 4, 5]"):
        model = onnx.load_from_string(unet_model())
        onnx.helper.set_model_props(model, {"edgelam.labels": said})
        path = tmp_path / "net.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(CorruptData):
            pack_items(path, "net", tmp_path / "cache")
