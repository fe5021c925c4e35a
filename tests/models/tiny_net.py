"""A small image net with skips, as an ONNX file: two levels of a U-Net, and scores from its last level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 8
SIZE = 16


class NetBuilder:
    """Appends convolutions with random weights."""

    def __init__(self, seed: int = 1) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.chance = np.random.default_rng(seed)

    def constant(self, name: str, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def node(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def conv(self, name: str, given: str, channels: int, out: int, **attributes: Any) -> str:
        weight = self.chance.standard_normal((out, channels, 3, 3)).astype(np.float32) * 0.2
        parts = [given, self.constant(f"{name}.weight", weight)]
        made = self.node("Conv", parts, f"{name}.conv", pads=[1, 1, 1, 1], **attributes)
        numbers = [self.chance.uniform(0.5, 1.5, out).astype(np.float32) for _ in range(4)]
        norm = [self.constant(f"{name}.{part}", values) for part, values in zip("sbmv", numbers, strict=True)]
        return self.node("Relu", [self.node("BatchNormalization", [made, *norm], f"{name}.normed")], name)

    def model(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        graph = helper.make_graph(self.nodes, "net", inputs, outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def unet_model(seed: int = 1, change: Callable[[Any], None] = lambda _model: None) -> bytes:
    """picture f32 [1, 3, 16, 16] -> scores f32 [1, 5]. Two skips are live while the lowest level is computed."""
    build = NetBuilder(seed)
    first = build.conv("down0", "picture", 3, CHANNELS)
    second = build.conv("down1", first, CHANNELS, CHANNELS, strides=[2, 2])
    low = build.conv("down2", second, CHANNELS, CHANNELS, strides=[2, 2])
    low = build.conv("low1", build.conv("low0", low, CHANNELS, CHANNELS), CHANNELS, CHANNELS)
    sizes = build.constant("twice", np.array([1, 1, 2, 2], np.float32))
    up = build.node("Resize", [low, "", sizes], "up1.resized", mode="nearest")
    up = build.conv("up1", build.node("Concat", [up, second], "up1.joined", axis=1), 2 * CHANNELS, CHANNELS)
    up = build.node("Resize", [up, "", sizes], "up0.resized", mode="nearest")
    up = build.conv("up0", build.node("Concat", [up, first], "up0.joined", axis=1), 2 * CHANNELS, CHANNELS)
    pooled = build.node("Flatten", [build.node("GlobalAveragePool", [up], "pooled")], "flat")
    weight = build.constant("scores.weight", build.chance.standard_normal((CHANNELS, 5)).astype(np.float32))
    build.node("MatMul", [pooled, weight], "scores")
    picture = helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, SIZE, SIZE])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 5])
    model = build.model([picture], [scores])
    change(model)
    data: bytes = model.SerializeToString()
    return data


def picture(seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((1, 3, SIZE, SIZE)).astype(np.float32)
