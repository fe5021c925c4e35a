"""A small vision transformer as exporters write it: sizes are taken from the input and computed, the batch is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.models.tiny_net import NetBuilder

WIDTH, HEADS, PATCH, SIZE, LAYERS = 16, 2, 4, 16, 6


class _VitBuilder(NetBuilder):
    def numbers(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def size(self, name: str, of: str, place: int) -> str:
        """One number of a tensor's shape, [1]."""
        shape = self.node("Shape", [of], f"{name}.shape")
        one = self.node("Gather", [shape, self.constant(f"{name}.place", np.array(place, np.int64))], f"{name}.one")
        return self.node("Unsqueeze", [one, self.numbers(f"{name}.axis", 0)], name)

    def target(self, name: str, *parts: str) -> str:
        return self.node("Concat", parts, name, axis=0)

    def matrix(self, name: str, rows: int, columns: int) -> str:
        return self.constant(name, self.chance.standard_normal((rows, columns)).astype(np.float32) * 0.3)


def vit_model(change: Callable[[Any], None] = lambda _model: None) -> bytes:
    """picture f32 [batch, 3, 16, 16] -> scores f32 [batch, 5]."""
    build = _VitBuilder()
    batch = build.size("batch", "picture", 0)
    kernel = build.chance.standard_normal((WIDTH, 3, PATCH, PATCH)).astype(np.float32) * 0.2
    build.node("Conv", ["picture", build.constant("patch", kernel)], "patches", strides=[PATCH, PATCH])
    flat = build.target("flat.target", batch, build.numbers("flat.rest", WIDTH, -1))
    build.node("Reshape", ["patches", flat], "flat")
    build.node("Transpose", ["flat"], "tokens", perm=[0, 2, 1])
    # The class token is spread over the batch as torch's `expand` is exported: -1 means "as it is".
    wanted = build.target("class.wanted", batch, build.numbers("class.kept", -1, -1))
    ones = build.node("ConstantOfShape", [build.numbers("class.rank", 3)], "class.zeros")
    ones = build.node("Cast", [ones], "class.whole", to=TensorProto.INT64)
    ones = build.node("Add", [ones, build.numbers("class.one", 1)], "class.ones")
    minus = build.node("Mul", [ones, build.numbers("class.minus", -1)], "class.minuses")
    same = build.node("Equal", [wanted, minus], "class.same")
    target = build.node("Where", [same, ones, wanted], "class.target")
    token = build.constant("class", build.chance.standard_normal((1, 1, WIDTH)).astype(np.float32))
    build.node("Expand", [token, target], "class.token")
    states = build.node("Concat", ["class.token", "tokens"], "states", axis=1)
    for layer in range(LAYERS):
        states = _layer(build, f"l{layer}", states, batch)
    first = build.constant("first", np.array(0, np.int64))
    build.node("Gather", [states, first], "pooled", axis=1)
    build.node("MatMul", ["pooled", build.matrix("scores.weight", WIDTH, 5)], "scores")
    picture = helper.make_tensor_value_info("picture", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", "of_each"])
    model = build.model([picture], [scores])
    change(model)
    data: bytes = model.SerializeToString()
    return data


def _layer(build: _VitBuilder, name: str, states: str, batch: str) -> str:
    rows = build.size(f"{name}.rows", states, 1)
    split = build.target(f"{name}.split", batch, rows, build.numbers(f"{name}.heads", HEADS, WIDTH // HEADS))
    parts = {}
    for part in "qkv":
        made = build.node(
            "MatMul", [states, build.matrix(f"{name}.{part}.weight", WIDTH, WIDTH)], f"{name}.{part}.flat"
        )
        made = build.node("Reshape", [made, split], f"{name}.{part}.split")
        order = [0, 2, 3, 1] if part == "k" else [0, 2, 1, 3]
        parts[part] = build.node("Transpose", [made], f"{name}.{part}", perm=order)
    weighed = build.node("Softmax", [build.node("MatMul", [parts["q"], parts["k"]], f"{name}.dots")], f"{name}.weights")
    mixed = build.node("MatMul", [weighed, parts["v"]], f"{name}.mixed")
    joined = build.target(f"{name}.join", batch, rows, build.numbers(f"{name}.width", WIDTH))
    turned = build.node("Transpose", [mixed], f"{name}.turned", perm=[0, 2, 1, 3])
    out = build.node("Reshape", [turned, joined], f"{name}.joined")
    states = build.node("Add", [states, out], f"{name}.attended")
    wide = build.node("MatMul", [states, build.matrix(f"{name}.up", WIDTH, 4 * WIDTH)], f"{name}.wide")
    wide = build.node("Tanh", [wide], f"{name}.bent")
    down = build.node("MatMul", [wide, build.matrix(f"{name}.down", 4 * WIDTH, WIDTH)], f"{name}.narrow")
    return build.node("Add", [states, down], f"{name}.out")
