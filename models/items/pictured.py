"""A net that tells labels of pictures: a frozen one as far as its features, a trained task module behind it.

    pixels u8 [1, 3, height, width] -> shares f32 [1, labels]

    <cache>/adapters/<id>/<model>-<first of id>.onnx

It does all that a board does with a picture that is scaled (models.training.images, agent.workers.frozen,
models.training.features), in float32 and in the same order. Each operator that is added means the same in all versions
that nets are published in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.cache import write_atomic
from models.formats import safetensors
from models.items.features import FeaturesPart
from models.items.manifest import LABELS_KEY
from models.lora.adapter import HEAD_FILE
from models.lora.head import Head, read_head
from models.lora.serving import SHOWN, check_base, kept_at
from models.training.features import LEAST
from wire.errors import Refused
from wire.samples import Images

_MADE: Final = "edgelam.label."
"""Before the names of all that is added."""
PIXELS: Final = f"{_MADE}pixels"
SHARES: Final = f"{_MADE}shares"


def pictured(adapter_id: str, model: str, part: FeaturesPart, cache: Path) -> Path:
    """The file of such a net: of a kept task module, and the part of a net that makes its features. Raises Refused for
    a module that is of something else; CorruptData; OSError when the cache can't be written."""
    kept = kept_at(adapter_id, cache)
    path = kept / f"{model}-{adapter_id[:SHOWN]}.onnx"
    if not path.is_file():
        check_base(kept, part.digest)
        write_atomic(path, _net(part, read_head(kept / HEAD_FILE), str(kept / HEAD_FILE)))
    return path


def _net(part: FeaturesPart, head: Head, where: str) -> bytes:
    if head.images is None or head.weight.shape[1] != part.hidden:
        raise Refused(
            f"{where}: a weight of {list(head.weight.shape)}, the net gives {part.hidden} features of a picture",
            try_="the net that it was trained with",
        )
    model = onnx.load_model_from_string(part.graph)
    graph = model.graph
    weights = {name: values for path in part.files.values() for name, values in safetensors.read(path).items()}
    inline = [tensor for tensor in graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
    read = [
        numpy_helper.from_array(np.asarray(weights[tensor.name]), tensor.name)
        for tensor in graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    ]
    [given], [features] = graph.input, graph.output
    size = [dim.dim_value for dim in given.type.tensor_type.shape.dim]
    build = _Builder()
    build.picture(given.name, head.images)
    build.nodes += graph.node
    build.shares(build.pooled(features.name, part.shape, head.images.pool), head)
    made = helper.make_model(
        helper.make_graph(
            build.nodes,
            "pictures",
            [helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, size)],
            [helper.make_tensor_value_info(SHARES, TensorProto.FLOAT, [1, len(head.labels)])],
            [*inline, *read, *build.constants],
        ),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
    )
    helper.set_model_props(made, {LABELS_KEY: msgspec.json.encode(head.labels).decode()})
    data: bytes = made.SerializeToString(deterministic=True)
    return data


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[TensorProto] = []

    def picture(self, name: str, images: Images) -> None:
        """From pixels to the tensor of this name, as models.training.images makes it."""
        light = self._node(
            "Div", [self._node("Cast", [PIXELS], "numbers", to=TensorProto.FLOAT), self._f32("most", 255)]
        )
        centred = self._node("Sub", [light, self._f32("mean", images.mean, 1, 3, 1, 1)])
        self._node("Div", [centred, self._f32("deviation", images.deviation, 1, 3, 1, 1)], name)

    def pooled(self, name: str, shape: tuple[int, ...], pool: str) -> str:
        """[1, hidden] of a tensor of this name and shape, as agent.workers.frozen makes it."""
        if len(shape) == 2:
            return name
        if len(shape) == 3 and pool == "first":
            first = self._constant("first", np.array(0, np.int64))
            return self._node("Gather", [name, first], axis=1)
        places = self._node("Transpose", [name], perm=[0, 2, 1]) if len(shape) == 3 else name
        return self._node("Flatten", [self._node("GlobalAveragePool", [places])], axis=1)

    def shares(self, vector: str, head: Head) -> None:
        """Of a vector that is brought to a mean square of 1, as models.training.features does."""
        squares = self._node("MatMul", [vector, self._node("Transpose", [vector], perm=[1, 0])])
        root = self._node("Sqrt", [self._node("Div", [squares, self._f32("hidden", head.weight.shape[1])])])
        normed = self._node("Div", [vector, self._node("Max", [root, self._f32("least", LEAST)])])
        product = self._node("MatMul", [normed, self._constant("weight", head.weight.T)])
        scores = self._node("Add", [product, self._constant("bias", head.bias)])
        self._node("Softmax", [scores], SHARES, axis=1)

    def _node(self, operator: str, inputs: list[str], name: str = "", **attributes: Any) -> str:
        made = name or f"{_MADE}{operator.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [made], **attributes))
        return made

    def _f32(self, name: str, values: Any, *shape: int) -> str:
        return self._constant(name, np.array(values, np.float32).reshape(shape))

    def _constant(self, name: str, values: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.array(values, order="C"), f"{_MADE}{name}"))
        return f"{_MADE}{name}"
