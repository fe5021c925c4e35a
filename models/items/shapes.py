"""The dtype and shape of every tensor of an ONNX graph, told without running it.

ONNX's own inference stops where a graph computes sizes from its input, as exports of transformers do: a Reshape whose
target is put together from the Shape of what came in. So what follows from known sizes alone is computed here, and
inference asked again, until no more comes of it. Only operators on sizes are computed, of at most MOST_NUMBERS numbers:
what a file from anywhere can have the coordinator do is small, whatever it says. (ONNX's own propagation of data has no
such end: forty Concats that double what they take fill any memory.) Whole numbers that are found so become constants of
the graph. They cross no cut, and a board that measures a module with made-up inputs has true sizes.

One size of the inputs may be left open, the rows of an item: all is told for two numbers of rows, and what differs
between them as they do has as many.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from models.items.manifest import MAX_PORT_RANK, ROWS, DtypeName, Port
from wire.errors import Refused
from wire.limits import MAX_DIM

Array = npt.NDArray[np.generic]
Told = dict[str, tuple[DtypeName, tuple[int, ...]]]

ROWS_TRIED: Final = (7, 11)
"""Numbers of rows with which shapes are inferred: odd ones, that no model has for a size of its own."""
MOST_NUMBERS: Final = 256
"""Of a tensor that is computed for the sizes that follow from it: shapes, scales, indices have a few."""
MOST_ROUNDS: Final = 300
"""Of inference: each computes something new, and a graph of many layers may need several."""
ON_SIZES: Final = frozenset(
    ("Add", "Cast", "Ceil", "Concat", "Div", "Equal", "Floor", "Gather", "Greater", "Identity", "Less", "Max", "Min",
     "Mod", "Mul", "Neg", "Not", "ReduceProd", "Reshape", "Slice", "Sqrt", "Squeeze", "Sub", "Unsqueeze", "Where")
)  # fmt: skip
"""Operators that give at most as many numbers as they take, or twice that: none of these makes much of little."""

NAMES: Final[Mapping[int, DtypeName]] = {
    TensorProto.FLOAT: "f32",
    TensorProto.FLOAT16: "f16",
    TensorProto.INT64: "i64",
    TensorProto.INT32: "i32",
    TensorProto.UINT8: "u8",
    TensorProto.INT8: "i8",
    TensorProto.BOOL: "bool",
}
TYPES: Final = {name: number for number, name in NAMES.items()}


class Shapes(NamedTuple):
    """Every tensor whose dtype and shape can be told; whether items have rows; and whole numbers that are computed from
    shapes and are the same for items of any size."""

    ports: dict[str, Port]
    has_rows: bool
    constants: dict[str, Array]


def shapes_of(model: onnx.ModelProto, inputs: Sequence[Any], name: str) -> Shapes:
    """Raises Refused for shapes that contradict each other."""
    has_rows = any(_open_dims(value, name) for value in inputs)
    tries = [_told(model, inputs, rows, name) for rows in (ROWS_TRIED if has_rows else ROWS_TRIED[:1])]
    first, last = tries[0][1], tries[-1][1]
    constants = {
        tensor: value
        for tensor, value in first.items()
        if value.dtype.kind in "biu" and tensor in last and np.array_equal(value, last[tensor])
    }
    return Shapes(_ports([told for told, _ in tries]), has_rows, constants)


def _ports(found: Sequence[Told]) -> dict[str, Port]:
    """Tensors of which all tries say the same, or what follows the rows."""
    ports: dict[str, Port] = {}
    for tensor, (dtype, shape) in found[0].items():
        other = found[-1].get(tensor)
        if other is None or other[0] != dtype or len(other[1]) != len(shape):
            continue
        dims = tuple(
            ROWS if (one, two) == ROWS_TRIED else one if one == two else -1
            for one, two in zip(shape, other[1], strict=True)
        )
        if min(dims, default=1) >= 0 and max(dims, default=1) <= MAX_DIM and len(dims) <= MAX_PORT_RANK:
            ports[tensor] = Port(tensor, dtype, dims)
    return ports


def _open_dims(value: Any, name: str) -> list[int]:
    """Dimensions of an input that are left open and stand for rows; the first of several is the batch, which is 1."""
    if not value.type.HasField("tensor_type"):
        raise Refused(f"{name}: input {value.name!r} is no tensor")
    dims = value.type.tensor_type.shape.dim
    left = [place for place, dim in enumerate(dims) if dim.dim_value < 1]
    return [place for place in left if place > 0 or len(dims) == 1]


def _told(model: onnx.ModelProto, inputs: Sequence[Any], rows: int, name: str) -> tuple[Told, dict[str, Array]]:
    """dtype and shape of every tensor for items of so many rows, and the values of those that were computed."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    open_ = {value.name: _open_dims(value, name) for value in inputs}
    for value in fixed.graph.input:
        for place, dim in enumerate(value.type.tensor_type.shape.dim):
            if value.name in open_ and dim.dim_value < 1:
                dim.dim_value = rows if place in open_[value.name] else 1
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    sizes = _Sizes(fixed)
    found = _inferred(fixed, name)
    for _ in range(MOST_ROUNDS):
        if not sizes.compute(found):
            break
        found = _inferred(fixed, name) | sizes.told()
    return found, sizes.computed


def _inferred(model: onnx.ModelProto, name: str) -> Told:
    try:
        told = shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (shape_inference.InferenceError, RuntimeError, ValueError) as error:
        raise Refused(f"{name}: its shapes contradict each other: {str(error).strip()[-300:]}") from error
    found: Told = {}
    for value in [*told.graph.input, *told.graph.value_info, *told.graph.output]:
        kind = value.type.tensor_type
        if not kind.HasField("shape") or kind.elem_type not in NAMES:
            continue
        dims = tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim)
        if min(dims, default=1) > 0:
            found[value.name] = (NAMES[kind.elem_type], dims)
    return found


class _Sizes:
    """What follows from known sizes in a model: each tensor that can be computed from them becomes a constant of it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._values: dict[str, Array] = {}
        self.computed: dict[str, Array] = {}
        """What became a constant, and of which inference no longer tells."""
        for tensor in model.graph.initializer:
            self._keep_small(tensor.name, tensor)
        for node in model.graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self._keep_small(node.output[0], attribute.t)

    def compute(self, told: Told) -> bool:
        """Compute what can be, given what is told of shapes; whether there was anything new."""
        graph, left = self._model.graph, []
        before = len(self.computed)
        for node in list(graph.node):
            value = self._value(node, told)
            if value is None:
                left.append(node)
                continue
            self._values[node.output[0]] = self.computed[node.output[0]] = value
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
        del graph.node[:]
        graph.node.extend(left)
        return len(self.computed) > before

    def told(self) -> Told:
        """dtype and shape of what was computed."""
        types = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in self.computed.items()}
        known = [name for name, number in types.items() if number in NAMES and self.computed[name].size]
        return {name: (NAMES[types[name]], self.computed[name].shape) for name in known}

    def _keep_small(self, name: str, tensor: TensorProto) -> None:
        if tensor.data_location != TensorProto.EXTERNAL and math.prod(tensor.dims) <= MOST_NUMBERS:
            self._values[name] = numpy_helper.to_array(tensor)

    def _value(self, node: Any, told: Told) -> Array | None:
        """The only output of a node, as an array; None where it is not known, or no matter of sizes."""
        if node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            return None
        if node.op_type == "Shape" and node.input[0] in told:
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            shape = told[node.input[0]][1][attributes.get("start", 0) : attributes.get("end")]
            return np.array(shape, np.int64)
        if node.op_type == "ConstantOfShape" and node.input[0] in self._values:
            return self._filled(node)
        if node.op_type not in ON_SIZES or any(part and part not in self._values for part in node.input):
            return None
        value = self._by_reference(node)
        return value if value is not None and value.size <= MOST_NUMBERS and value.dtype.kind in "biuf" else None

    def _filled(self, node: Any) -> Array | None:
        shape = [int(size) for size in self._values[node.input[0]].reshape(-1)]
        if len(shape) > MAX_PORT_RANK or min(shape, default=1) < 0 or math.prod(shape) > MOST_NUMBERS:
            return None
        fill = [numpy_helper.to_array(attribute.t) for attribute in node.attribute if attribute.name == "value"]
        one = fill[0].reshape(-1)[:1] if fill and fill[0].size else np.zeros(1, np.float32)
        return np.broadcast_to(one, shape).copy() if one.dtype.kind in "biuf" else None

    def _by_reference(self, node: Any) -> Array | None:
        """What ONNX's own reference says; None where it says nothing (inputs that contradict each other)."""
        from onnx.reference import ReferenceEvaluator  # here, since few graphs need it, and it takes long to import

        given = [part for part in dict.fromkeys(node.input) if part]
        if math.prod(self._values[part].size or 1 for part in given) > MOST_NUMBERS**2:
            return None  # what is broadcast may have as many numbers as all inputs multiplied
        values = [helper.make_tensor_value_info(part, TensorProto.UNDEFINED, None) for part in (*given, node.output[0])]
        alone = helper.make_model(
            helper.make_graph([node], "sizes", values[:-1], values[-1:]), opset_imports=self._model.opset_import
        )
        try:
            with np.errstate(divide="raise", invalid="raise", over="raise"):
                [found] = ReferenceEvaluator(alone).run(None, {part: self._values[part] for part in given})
        except (ArithmeticError, RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            return None
        return np.asarray(found) if isinstance(found, np.ndarray | np.generic) else None
