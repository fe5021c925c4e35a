"""An ONNX graph, read and not believed: what its nodes take and give, and any run of them as a graph of its own.

Refused: weights in other files, functions, subgraphs (If, Loop, Scan), operators of domains other than ONNX's own and
onnxruntime's. Constants, and what is computed from constants alone, belong to whoever needs them and cross no cut.
Shapes are told without running the graph (models.items.shapes).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper, numpy_helper

from models.engine.manifest import WEIGHTS_LOCATION, WeightInfo
from models.items.cuts import Node
from models.items.manifest import KEY, LABELS_KEY, ROWS, ItemManifest, Labels, Port
from models.items.shapes import TYPES, shapes_of
from wire.errors import CorruptData, Refused, UsageError
from wire.limits import MAX_DIM, MAX_RANK
from wire.units import bytes_text

Array = npt.NDArray[np.generic]

MAX_FILE_BYTES: Final = 1 << 31
"""What one protobuf may have."""
MAX_NODES: Final = 20_000
MAX_INLINE_BYTES: Final = 1024
"""Constants up to this, and those of other dtypes than weights have, stay in the graph."""
DOMAINS: Final = ("", "ai.onnx", "com.microsoft")
IR_VERSION: Final = 10
"""As for stages of language models (models.build.stage)."""
MAX_OPSET: Final = 22
"""Of ONNX's own operators; what onnxruntime 1.23 knows, the last one for Python 3.10 boards."""
TYPICAL_ROWS: Final = 64
"""Of an item with rows, when it is cut and planned: a few sentences."""


class Net:
    """`nodes` are those that depend on what is given, in order; `ports` every tensor whose size is known."""

    def __init__(self, model: onnx.ModelProto, name: str, most_rows: int) -> None:
        """`most_rows`: of an item, where the graph leaves a size open. Raises Refused, CorruptData."""
        self.name = name
        self.most_rows = most_rows
        self.labels = _labels_of(model)
        """Whose shares come out, where the file says so."""
        graph = model.graph
        self._opsets = list(model.opset_import)
        self._constants = _without_weights(graph)
        inputs = [value for value in graph.input if value.name not in self._constants]
        everything = _in_order(graph.node, {value.name for value in inputs} | set(self._constants), name)
        self.ports, self.has_rows, sizes = shapes_of(model, inputs, name)
        sizes = {tensor: value for tensor, value in sizes.items() if tensor not in {out.name for out in graph.output}}
        self._made_of_constants: dict[str, onnx.NodeProto] = {}
        self._protos: list[onnx.NodeProto] = []
        for node in everything:
            fixed = all(not part or part in self._constants or part in self._made_of_constants for part in node.input)
            if fixed:
                self._made_of_constants.update(dict.fromkeys(node.output, node))
            elif node.output[0] in sizes:
                self._constants[node.output[0]] = numpy_helper.from_array(sizes[node.output[0]], node.output[0])
            else:
                self._protos.append(node)
        _name_norms(self._protos, self._constants)
        self.given = [_known(self.ports, value.name, name) for value in inputs]
        self.wanted = [_known(self.ports, value.name, name) for value in graph.output]
        if self.labels and [(port.dtype, port.shape) for port in self.wanted] != [("f32", (1, len(self.labels)))]:
            raise CorruptData(f"{name}: says that it tells {len(self.labels)} labels, and gives other numbers")
        shapes = self._shapes_for(TYPICAL_ROWS)
        self.nodes = [self._node(proto, shapes) for proto in self._protos]

    def run_of(self, begin: int, end: int, crossing: Sequence[Sequence[str]]) -> tuple[bytes, ItemManifest]:
        """Nodes `begin` to `end - 1` as a graph without weights, with its manifest inside, and that manifest."""
        before, behind = crossing[begin], crossing[end]
        protos = self._protos[begin:end]
        taken = {part for node in protos for part in node.input}
        fed = [name for name in before if name in taken]
        made = [name for name in behind if name not in before]
        fixed, weights, inline = self._fixed(protos)
        manifest = ItemManifest(
            inputs=tuple(self.ports[name] for name in before),
            outputs=tuple(self.ports[name] for name in behind),
            fed=tuple(fed),
            most_rows=self.most_rows,
            weights=tuple(WeightInfo(tensor.name, _weight_dtype(tensor), tuple(tensor.dims)) for tensor in weights),
        )
        graph = helper.make_graph(
            [*fixed, *protos],
            "stage",
            [_value_info(self.ports[name]) for name in fed],
            [_value_info(self.ports[name]) for name in made],
            [*inline, *map(_external, weights)],
        )
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=IR_VERSION, producer_name="edgelam")
        helper.set_model_props(model, {KEY: msgspec.json.encode(manifest).decode()})
        data: bytes = model.SerializeToString(deterministic=True)
        return data, manifest

    def weights_of(self, begin: int, end: int) -> dict[str, Array]:
        """The weights of these nodes by name; raise CorruptData where there are not as many values as declared."""
        _, weights, _ = self._fixed(self._protos[begin:end])
        found: dict[str, Array] = {}
        for tensor in weights:
            try:
                found[tensor.name] = np.ascontiguousarray(numpy_helper.to_array(tensor))
            except (ValueError, TypeError) as error:
                raise CorruptData(f"{self.name}: weights {tensor.name!r} are damaged: {error}") from error
        return found

    def inline_bytes(self, begin: int, end: int) -> int:
        """Bytes of the constants that stay in the graph of these nodes."""
        return sum(tensor.ByteSize() for tensor in self._fixed(self._protos[begin:end])[2])

    def forget_weights(self) -> None:
        """Keep of the weights what graphs declare of them: enough for `run_of`."""
        self._constants = {
            name: _external(tensor) if _is_weight(tensor) else tensor for name, tensor in self._constants.items()
        }

    def likeness(self, begin: int, end: int, crossing: Sequence[Sequence[str]]) -> str:
        """A name for all that decides the time of these nodes: what they do, in which sizes, and how they hang
        together; not what their tensors are called, nor the values of weights."""
        protos = self._protos[begin:end]
        fixed, weights, inline = self._fixed(protos)
        words: dict[str, str] = {"": ""}
        for name in crossing[begin]:
            port = self.ports[name]
            words[name] = f"in{len(words)}:{port.dtype}:{port.shape}"
        for tensor in weights:
            words[tensor.name] = f"weight:{tensor.data_type}:{list(tensor.dims)}"
        for tensor in inline:
            values = numpy_helper.to_array(tensor)
            small = hashlib.sha256(values.tobytes()).hexdigest() if values.dtype.kind in "iub" else ""
            words[tensor.name] = f"constant:{tensor.data_type}:{list(tensor.dims)}:{small}"
        text = []
        for index, node in enumerate([*fixed, *protos]):
            words.update({name: f"n{index}.{place}" for place, name in enumerate(node.output) if name})
            attributes = sorted(attribute.SerializeToString(deterministic=True).hex() for attribute in node.attribute)
            text.append([node.domain, node.op_type, attributes, [words[name] for name in node.input]])
        text.append(["out", "", [], [words[name] for name in crossing[end]]])
        return hashlib.sha256(msgspec.json.encode(text)).hexdigest()[:16]

    def macs_of(self, begin: int, end: int, rows: int) -> int:
        """Products of these nodes for an item of so many rows."""
        shapes = self._shapes_for(rows)
        return sum(_macs(proto, shapes) for proto in self._protos[begin:end])

    def _fixed(
        self, protos: Sequence[onnx.NodeProto]
    ) -> tuple[list[onnx.NodeProto], list[TensorProto], list[TensorProto]]:
        """What these nodes need that depends on nothing given: nodes, weights, small constants."""
        nodes: dict[int, onnx.NodeProto] = {}
        tensors: dict[str, TensorProto] = {}
        open_ = [part for node in protos for part in node.input]
        while open_:
            name = open_.pop()
            if name in self._constants:
                tensors[name] = self._constants[name]
            elif name in self._made_of_constants and id(self._made_of_constants[name]) not in nodes:
                node = self._made_of_constants[name]
                nodes[id(node)] = node
                open_ += node.input
        order = {id(node): place for place, node in enumerate(self._made_of_constants.values())}
        fixed = [nodes[key] for key in sorted(nodes, key=order.__getitem__)]
        ordered = [tensors[name] for name in sorted(tensors)]
        weights = [tensor for tensor in ordered if _is_weight(tensor)]
        return fixed, weights, [tensor for tensor in ordered if not _is_weight(tensor)]

    def _shapes_for(self, rows: int) -> dict[str, tuple[int, ...]]:
        """Of all tensors and constants, for an item of so many rows."""
        shapes = {port.name: port.dims(rows) for port in self.ports.values()}
        return shapes | {tensor.name: tuple(tensor.dims) for tensor in self._constants.values()}

    def _node(self, proto: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> Node:
        takes = [part for part in proto.input if part and not self._is_fixed(part)]
        outputs = sum(math.prod(shapes[name]) for name in proto.output if name in shapes)
        return Node(
            takes=tuple(dict.fromkeys(takes)),
            gives=tuple(name for name in proto.output if name),
            work=float(_macs(proto, shapes) + outputs),
        )

    def _is_fixed(self, name: str) -> bool:
        return name in self._constants or name in self._made_of_constants


def _macs(proto: onnx.NodeProto, known: Mapping[str, tuple[int, ...]]) -> int:
    """Products of a node: of matrices and convolutions; 0 for all others, and where a size is not known."""
    out = known.get(proto.output[0])
    shapes = [known.get(name) for name in proto.input]
    if out is None or len(shapes) < 2:
        return 0
    count, first, second = math.prod(out), shapes[0], shapes[1]
    if proto.op_type in ("MatMul", "MatMulInteger", "Gemm") and first:
        turned = any(attribute.name == "transA" and attribute.i for attribute in proto.attribute)
        return count * first[0 if turned else -1]
    if proto.op_type in ("Conv", "ConvInteger", "QLinearConv"):
        kernel = shapes[3] if proto.op_type == "QLinearConv" and len(shapes) > 3 else second
        return count * math.prod(kernel[1:]) if kernel else 0
    if proto.op_type == "ConvTranspose" and first and second:
        return math.prod(first) * math.prod(second[1:])
    return 0


def open_net(path: Path, most_rows: int) -> Net:
    """Read an ONNX file. Raises UsageError (not there), CorruptData (no ONNX), Refused (not supported, by name)."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise Refused(f"{path}: {bytes_text(size)}, at most {bytes_text(MAX_FILE_BYTES)} are taken")
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", try_="a path to an .onnx file") from error
    return net_of(data, path.name, most_rows)


def net_of(data: bytes, name: str, most_rows: int) -> Net:
    """As `open_net`, of the file's bytes."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise CorruptData(f"{name}: not an ONNX model: {error}") from error
    try:
        _check(model, name)
        return Net(model, name, most_rows)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        # Names that are no text, sizes that are no numbers: protobuf takes them, and so no list of them is complete.
        raise CorruptData(f"{name}: a damaged ONNX model: {error}") from error


def _labels_of(model: onnx.ModelProto) -> tuple[str, ...]:
    """As models.items.pictured writes them; raise ValueError for what are none."""
    for told in model.metadata_props:
        if told.key == LABELS_KEY:
            return msgspec.json.decode(told.value, type=Labels)
    return ()


def _check(model: onnx.ModelProto, name: str) -> None:
    graph = model.graph
    if not graph.node or not graph.output:
        raise CorruptData(f"{name}: not an ONNX model: it has no nodes or no outputs")
    if len(graph.node) > MAX_NODES:
        raise Refused(f"{name}: {len(graph.node)} nodes, at most {MAX_NODES} are taken")
    if model.functions or graph.sparse_initializer:
        raise Refused(f"{name}: functions and sparse weights are not supported")
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > MAX_OPSET:
            raise Refused(f"{name}: opset {opset.version}, boards know {MAX_OPSET}", try_="export it again with that")
    tensors = list(graph.initializer)
    for node in graph.node:
        if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
            raise Refused(f"{name}: {node.op_type} gives another answer each time, which is not supported")
        if node.domain not in DOMAINS:
            raise Refused(f"{name}: operator {node.domain}.{node.op_type} is a custom one")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise Refused(f"{name}: {node.op_type} has a graph of its own, which is not supported")
            tensors += [attribute.t] if attribute.HasField("t") else []
    for tensor in tensors:
        if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
            raise Refused(f"{name}: weights in other files are not supported", try_="save it as one file")
        if any(dim < 0 for dim in tensor.dims) or not _is_whole(tensor):
            raise CorruptData(f"{name}: constant {tensor.name!r} is damaged: not as many values as its sizes say")
    known = [opset for opset in model.opset_import if opset.domain in DOMAINS]
    del model.opset_import[:]
    model.opset_import.extend(known)


def _without_weights(graph: Any) -> dict[str, TensorProto]:
    """Take the constants out of a graph, and leave declarations of weights: what is inferred needs no more of them."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    if len(constants) != len(graph.initializer):
        raise CorruptData("an ONNX model declares a constant twice")
    del graph.initializer[:]
    graph.initializer.extend(_external(tensor) if _is_weight(tensor) else tensor for tensor in constants.values())
    return constants


def _is_whole(tensor: TensorProto) -> bool:
    """Whether a constant has as many values as its sizes say."""
    if not tensor.HasField("raw_data"):
        return bool(numpy_helper.to_array(tensor).size == math.prod(tensor.dims))
    bits = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    bits = 4 if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) else bits
    return bool(len(tensor.raw_data) == -(-math.prod(tensor.dims) * bits // 8))


def _in_order(nodes: Any, known: set[str], name: str) -> list[onnx.NodeProto]:
    """The nodes, checked to stand in topological order with every tensor made once; constants' nodes are nodes."""
    seen = set(known)
    for node in nodes:
        for part in node.input:
            if part and part not in seen:
                raise CorruptData(f"{name}: {node.op_type} takes {part!r}, which nothing before it gives")
        for part in node.output:
            if part and part in seen:
                raise CorruptData(f"{name}: {part!r} is made twice")
            seen.add(part)
        if not node.output or not node.output[0]:
            raise CorruptData(f"{name}: {node.op_type} gives nothing")
    return list(nodes)


def _name_norms(nodes: Sequence[onnx.NodeProto], constants: dict[str, TensorProto]) -> None:
    """Weights of norms get names by which boards that make up weights know them: a variance must not be negative."""
    renamed: dict[str, str] = {}
    for node in nodes:
        for place, part in enumerate(node.input):
            if node.op_type == "BatchNormalization" and place and part in constants and not part.endswith("norm"):
                renamed[part] = f"{part}.norm"
    for node in nodes:
        for place, part in enumerate(node.input):
            if part in renamed:
                node.input[place] = renamed[part]
    for old, new in renamed.items():
        tensor = constants.pop(old)
        tensor.name = new
        constants[new] = tensor


def _known(ports: Mapping[str, Port], tensor: str, name: str) -> Port:
    if tensor not in ports:
        raise Refused(
            f"{name}: the size of {tensor!r} can't be told", try_="export it with fixed sizes, or one open size"
        )
    return ports[tensor]


def _is_weight(tensor: TensorProto) -> bool:
    size = int(np.prod(tensor.dims, dtype=np.int64))
    kinds = {TensorProto.FLOAT: 4, TensorProto.UINT8: 1}
    fits = 1 <= len(tensor.dims) <= MAX_RANK and min(tensor.dims) >= 1 and max(tensor.dims) <= MAX_DIM
    return fits and size * kinds.get(tensor.data_type, 0) > MAX_INLINE_BYTES


def _weight_dtype(tensor: TensorProto) -> Any:
    return "f32" if tensor.data_type == TensorProto.FLOAT else "u8"


def _external(tensor: TensorProto) -> TensorProto:
    declared = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    declared.data_location = TensorProto.EXTERNAL
    size = int(np.prod(tensor.dims, dtype=np.int64)) * (4 if tensor.data_type == TensorProto.FLOAT else 1)
    for key, value in (("location", WEIGHTS_LOCATION), ("offset", "0"), ("length", str(size))):
        declared.external_data.add(key=key, value=value)
    return declared


def _value_info(port: Port) -> Any:
    return helper.make_tensor_value_info(
        port.name, TYPES[port.dtype], ["rows" if dim == ROWS else dim for dim in port.shape]
    )
