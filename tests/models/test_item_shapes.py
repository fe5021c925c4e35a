"""Sizes that a graph computes from its input are told without running it, and what they cost has an end."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.engine.items import ItemStage
from models.items.manifest import bundle, views
from models.items.net import net_of
from models.items.pack import kit_of_items, pack_items
from models.items.shapes import MOST_NUMBERS
from tests.models.test_items import stage, whole, write_net
from tests.models.tiny_net import NetBuilder, picture
from tests.models.tiny_vit import LAYERS, WIDTH, vit_model
from wire.errors import EdgelamError, Refused


def test_a_vision_transformer_is_cut_at_its_layers_and_gives_the_bits_of_its_file(tmp_path: Path) -> None:
    data, image = vit_model(), picture()
    packed = pack_items(write_net(tmp_path, data), "vit", tmp_path / "cache")
    crossing = [packed.parts.crossing[end] for end in packed.parts.ends[:-1]]
    assert len(crossing) >= LAYERS - 1 and all(len(names) == 1 for names in crossing), "sizes cross no cut"
    states = [packed.parts.net.ports[names[0]] for names in crossing]
    assert all(port.shape == (1, 17, WIDTH) for port in states), "between layers, not within one"
    keys = [module.profile_key for module in packed.graph.modules]
    assert len(set(keys)) <= 5 < len(keys), "layers are alike"
    given = bundle(packed.config.inputs, 1, {"picture": image})
    for index in range(len(packed.parts)):
        given = stage(packed, tmp_path, index, index + 1).run(given, 1)
    np.testing.assert_array_equal(views(packed.config.outputs, 1, given)["scores"], whole(data, picture=image)[0])


def test_each_of_its_modules_can_be_measured_alone(tmp_path: Path) -> None:
    packed = pack_items(write_net(tmp_path, vit_model()), "vit", tmp_path / "cache")
    for entry in kit_of_items(packed):
        (tmp_path / "kit.onnx").write_bytes(entry.graphs[1])
        loaded = ItemStage.load_synthetic(tmp_path / "kit.onnx", 1, 1)
        out = views(loaded.manifest.outputs, 1, loaded.run(loaded.sample(1), 1))
        assert all(np.isfinite(tensor).all() for tensor in out.values())


def test_all_sizes_of_it_are_known_and_those_that_open_stay_unknown() -> None:
    net = net_of(vit_model(), "vit", 512)
    assert not [name for node in net.nodes for name in node.gives if name not in net.ports]
    assert net.wanted[0].shape == (1, 5) and not net.has_rows


def sized(*nodes: Any, constants: Any = ()) -> bytes:
    """A net whose `y` is its picture, reshaped to what `nodes` make `target` to be."""
    build = NetBuilder()
    build.nodes += [helper.make_node("Shape", ["picture"], ["shape"]), *nodes]
    build.node("Reshape", ["picture", "target"], "y")
    build.constants += [numpy_helper.from_array(np.array(values), name) for name, values in dict(constants).items()]
    given = helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, 16, 16])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])
    data: bytes = build.model([given], [y]).SerializeToString()
    return data


def node(operator: str, takes: str, gives: str, **attributes: Any) -> Any:
    return helper.make_node(operator, takes.split(), [gives], **attributes)


def test_scales_are_computed_as_numbers_with_a_point() -> None:
    scaled = [
        node("Cast", "shape", "real", to=TensorProto.FLOAT),
        node("Div", "real four", "quarter"),
        node("Floor", "quarter", "down"),
        node("Cast", "down", "whole", to=TensorProto.INT64),
        node("Slice", "whole two three", "last"),
        node("Concat", "minus last", "target", axis=0),
    ]
    constants = {"four": np.float32(4), "two": np.array([2]), "three": np.array([3]), "minus": np.array([-1])}
    assert net_of(sized(*scaled, constants=constants), "net", 512).wanted[0].shape == (192, 4)


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([node("ConstantOfShape", "huge", "target")], {"huge": np.array([1 << 40])}),
        ([node("ConstantOfShape", "below", "target")], {"below": np.array([-5])}),
        ([node("Gather", "shape far", "target")], {"far": np.array([99])}),
        ([node("Div", "shape nothing", "target")], {"nothing": np.array([0, 0, 0, 0])}),
        ([node("Expand", "shape huge", "target")], {"huge": np.array([1 << 40])}),
        ([node("Cast", "shape", "words", to=TensorProto.STRING), node("Cast", "words", "target", to=7)], {}),
    ],
    ids=["huge", "negative", "outside", "division by nothing", "expanded", "text"],
)
def test_sizes_that_can_not_be_told_are_refused_and_nothing_is_made_for_them(nodes: list[Any], constants: Any) -> None:
    with pytest.raises(Refused):
        net_of(sized(*nodes, constants=constants), "net", 512)


def test_what_doubles_at_each_step_is_given_up_before_it_is_large() -> None:
    doubled = [node("Concat", f"{last} {last}", f"d{number}", axis=0) for number, last in
               enumerate(["shape", *(f"d{number}" for number in range(39))])]  # fmt: skip
    began_s = time.monotonic()
    with pytest.raises(Refused):
        net_of(sized(*doubled, node("ReduceProd", "d39", "target", keepdims=1)), "net", 512)
    assert time.monotonic() - began_s < 10
    assert MOST_NUMBERS < 4 * 2**39


def test_a_damaged_file_that_computes_sizes_is_an_error_and_never_a_crash() -> None:
    chance, data = random.Random(3), vit_model()
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 1, 3, 20))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            net_of(bytes(damaged), "vit", 512)
        except EdgelamError:
            refused += 1
    assert refused > 20
