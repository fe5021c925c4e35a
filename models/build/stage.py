"""A stage as an ONNX graph without weights, out of onnxruntime's own fused operators.

Inputs and outputs, with n rows of each of b requests and `context` rows of room; b is 1 (a prompt) or n is 1 (decode),
for GroupQueryAttention appends several rows of one request, or one row of several, but not several of several:
    tokens       int64 [b, n]                        stages with the embedding; else
    hidden       wire dtype [b, n, hidden]
    last_row     int32 [b]                           position of the last row given, of each request
    rows         int32 []                            the greatest last_row + 1
    rope.cos     float32 [context, head_dim / 2]     rope.sin alike: the engine computes them once
    kv.{i}.key   float32 [b, kv_heads, context, head_dim], and kv.{i}.value; the same buffers are the outputs
    hidden.out   wire dtype [b, n, hidden]           what goes to the next stage; with a head: of the last block
    adapters     float32 [b, 1, width]               stages with adapters: 1 for each rank that a request's rows take
                                                     part with, 0 for the others
    logits_from  int64 [1]                           stages with the head: -m for logits of the last m rows
    logits       float32 [b * m, vocabulary]         stages with the head; m is 1 where b is more
Stages without blocks have none of last_row, rows, rope and kv. Weights are declared as external data: the engine
supplies them by name from mapped files, so they are in memory once.

A cut changes no bit. The residual stream takes the wire dtype and comes back (Add, Cast, Cast) at every block boundary,
cut or not, and behind the embedding; engines must run the graph as it is written, without fusing over these casts.
With 4 and 8 bit weights activations are rounded to 8 bit, and a difference in a last bit would become another word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from models.build.layout import (
    block_weights,
    checked_precision,
    checked_wire_dtype,
    head_matrix,
    matrix_weights,
    table_precision,
    table_weights,
)
from models.build.quantise import BLOCK, ZERO_POINT_8BIT, blocks_in
from models.engine.manifest import KEY, WEIGHTS_LOCATION, Adapters, Precision, StageManifest, WeightInfo, WireDtype
from models.families.config import LlamaConfig, matrix_size
from wire.errors import UsageError

CONTRIB: Final = "com.microsoft"

OPSET: Final = 18
"""The oldest with all standard operators used here (Split with num_outputs was not there before)."""

IR_VERSION: Final = 10
"""What onnxruntime 1.23 reads; the last one for Python 3.10 boards."""

ACCURACY_LEVEL: Final = 4
"""MatMulNBits rounds activations to 8 bit blockwise and multiplies whole numbers; in floating point 4 bit is slow."""

WIRE_TYPES: Final = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
WEIGHT_TYPES: Final = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "u8": TensorProto.UINT8}
INT32: Final = TensorProto.INT32


def check_stage(config: LlamaConfig, first_block: int, end_block: int, ends: bool) -> None:
    """Raise UsageError for blocks that the model hasn't, and for a stage without anything. `ends`: whether it has the
    embedding or the head."""
    if not 0 <= first_block <= end_block <= config.blocks or not (ends or end_block > first_block):
        raise UsageError(f"no stage of blocks {first_block} to {end_block} in a model of {config.blocks} blocks")


def build_stage_graph(
    config: LlamaConfig,
    precision: str,
    wire_dtype: str,
    *,
    first_block: int,
    end_block: int,
    embedding: bool,
    head: bool,
    adapters: Adapters | None = None,
) -> bytes:
    """Give the ONNX model of blocks [first_block, end_block), with the embedding before and the head behind if wanted,
    and `adapters` beside the weights of its blocks.

    Equal arguments give equal bytes. Raises UsageError for an unknown precision or dtype and for blocks that the model
    hasn't; a stage without anything is such a case.
    """
    check_stage(config, first_block, end_block, embedding or head)
    if end_block == first_block:
        adapters = None
    parts = _Parts(config, checked_precision(precision), checked_wire_dtype(wire_dtype), adapters)
    residual = parts.embedding() if embedding else parts.given_hidden()
    if end_block > first_block:
        parts.declare_attention_inputs()
    for index in range(first_block, end_block):
        residual = parts.block(index, residual)
    parts.finish(residual, head=head, given=not embedding and end_block == first_block)
    manifest = StageManifest(
        precision=parts.precision,
        wire_dtype=parts.wire_dtype,
        embedding=embedding,
        head=head,
        first_block=first_block,
        end_block=end_block,
        config=config,
        weights=tuple(parts.weights.values()),
        adapters=adapters,
    )
    return parts.graph.serialised(manifest)


class GraphWriter:
    """Nodes, values and initialisers of an ONNX graph under construction; names are unique and deterministic."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def node(
        self, operator: str, inputs: Sequence[str], outputs: Sequence[str], domain: str = "", **attributes: object
    ) -> None:
        name = f"{len(self._nodes)}.{operator}"
        self._nodes.append(helper.make_node(operator, inputs, outputs, name=name, domain=domain, **attributes))

    def value(self, operator: str, inputs: Sequence[str], domain: str = "", **attributes: object) -> str:
        """Append a node with one output and give the output's name."""
        output = f"{len(self._nodes)}.{operator.lower()}"
        self.node(operator, inputs, [output], domain, **attributes)
        return output

    def rename(self, value: str, name: str) -> None:
        """Give the value another name, where it is made and where it is used."""
        for node in self._nodes:
            node.input[:] = [name if given == value else given for given in node.input]
            node.output[:] = [name if made == value else made for made in node.output]

    def input(self, name: str, dtype: int, shape: Sequence[int | str]) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: int, shape: Sequence[int | str]) -> None:
        self._outputs.append(helper.make_tensor_value_info(name, dtype, shape))

    def constant(self, name: str, value: npt.NDArray[np.generic]) -> str:
        self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def external(self, info: WeightInfo, offset_bytes: int | None = None) -> str:
        """Declare a weight that the engine supplies; with its place, where it may do so as a file."""
        tensor = TensorProto(name=info.name, data_type=WEIGHT_TYPES[info.dtype], dims=info.shape)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=WEIGHTS_LOCATION)
        if offset_bytes is not None:
            tensor.external_data.add(key="offset", value=str(offset_bytes))
            tensor.external_data.add(key="length", value=str(info.size_bytes))
        self._initializers[info.name] = tensor
        return info.name

    def serialised(self, manifest: StageManifest) -> bytes:
        graph = helper.make_graph(self._nodes, "stage", self._inputs, self._outputs, list(self._initializers.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="edgelam")
        helper.set_model_props(model, {KEY: msgspec.json.encode(manifest).decode()})
        data: bytes = model.SerializeToString(deterministic=True)
        return data


class _Parts:
    """The parts of a Llama, appended to a graph."""

    def __init__(
        self, config: LlamaConfig, precision: Precision, wire_dtype: WireDtype, adapters: Adapters | None
    ) -> None:
        self.config = config
        self.adapters = adapters
        self._masks: dict[int, str] = {}
        """By the number of letters of a product."""
        self.precision = precision
        self.wire_dtype = wire_dtype
        self.graph = GraphWriter()
        self.weights: dict[str, WeightInfo] = {}
        self._wire_type = WIRE_TYPES[wire_dtype]

    def given_hidden(self) -> str:
        """Give the input 'hidden', still in wire dtype."""
        return self.graph.input("hidden", self._wire_type, ["b", "n", self.config.hidden])

    def embedding(self) -> str:
        """Look the tokens up; give hidden states in wire dtype."""
        tokens = self.graph.input("tokens", TensorProto.INT64, ["b", "n"])
        names = self._declare(table_weights("embedding", self.config, self.precision))
        rows = self.graph.value("Gather", [names[0], tokens])
        if table_precision(self.precision) == "f32":
            return self._to_wire(rows)
        zero = self.graph.constant("code_zero", np.array(ZERO_POINT_8BIT, np.float32))
        blocks = blocks_in(self.config.hidden)
        by_row = self._shape("scales_by_row", self.config.vocabulary, blocks)
        scales = self.graph.value("Gather", [self.graph.value("Reshape", [names[1], by_row]), tokens])
        column = self.graph.value("Unsqueeze", [scales, self._shape("last_axis", -1)])
        codes = self.graph.value("Sub", [self.graph.value("Cast", [rows], to=TensorProto.FLOAT), zero])
        values = self.graph.value("Mul", [codes, column])
        flat = self.graph.value("Reshape", [values, self._shape("padded_rows", 0, -1, blocks * BLOCK)])
        if self.config.hidden % BLOCK:
            end = self._shape("hidden_end", self.config.hidden)
            flat = self.graph.value("Slice", [flat, self._shape("start", 0), end, self._shape("last_axis", -1)])
        return self._to_wire(flat)

    def declare_attention_inputs(self) -> None:
        self.graph.input("last_row", TensorProto.INT32, ["b"])
        self.graph.input("rows", TensorProto.INT32, [])
        if self.adapters is not None:
            self._masks[1] = self.graph.input("adapters", TensorProto.FLOAT, ["b", 1, self.adapters.width])
        for name in ("rope.cos", "rope.sin"):
            self.graph.input(name, TensorProto.FLOAT, ["context", self.config.head_dim // 2])

    def block(self, index: int, residual: str) -> str:
        """Append a block; residual stream in wire dtype in and out."""
        prefix = f"block.{index}."
        for info in block_weights(self.config, index, self.precision):
            self._declare([info])
        for info in self.adapters.weights_of(self.config, index) if self.adapters is not None else ():
            self._declare([info])
        before = self._from_wire(residual)
        normed = self._norm(before, f"{prefix}attention_norm")
        attended = self._product(self._attention(index, normed), prefix, "o")
        # One node gives both the sum and its norm; it stays inside the block, so no cut can fall on it.
        normed, middle = f"{prefix}normed", f"{prefix}middle"
        self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [before, attended, f"{prefix}ffn_norm"],
            [normed, "", "", middle],
            CONTRIB,
            epsilon=self.config.rms_eps,
        )
        gate = self._product(normed, prefix, "gate")
        up = self._product(normed, prefix, "up")
        # QuickGelu with alpha 1 is x * sigmoid(x), SiLU, in one node.
        gated = self.graph.value("Mul", [self.graph.value("QuickGelu", [gate], CONTRIB, alpha=1.0), up])
        added = self._product(gated, prefix, "down")
        return self._to_wire(self.graph.value("Add", [middle, added]))

    def finish(self, residual: str, *, head: bool, given: bool) -> None:
        """Name the outputs; `given` says that the residual stream is the graph's own input."""
        if not given:
            self.graph.rename(residual, "hidden.out")
            residual = "hidden.out"
            self.graph.output("hidden.out", self._wire_type, ["b", "n", self.config.hidden])
        if not head:
            return
        first = self.graph.input("logits_from", TensorProto.INT64, [1])
        end, axis = self._shape("all_rows", np.iinfo(np.int64).max), self._shape("row_axis", 1)
        rows = self.graph.value("Slice", [residual, first, end, axis])
        row = self._from_wire(self.graph.value("Reshape", [rows, self._shape("flat_rows", -1, self.config.hidden)]))
        self._declare([WeightInfo("final_norm", "f32", (self.config.hidden,))])
        normed = self._norm(row, "final_norm")
        matrix = head_matrix(self.config)
        names = self._declare(table_weights(matrix, self.config, self.precision))
        if table_precision(self.precision) == "f32":
            self.graph.node("Gemm", [normed, names[0]], ["logits"], transB=1)
        else:
            self._product_of_codes(normed, matrix, names, 8, ["logits"])
        self.graph.output("logits", TensorProto.FLOAT, ["m", self.config.vocabulary])

    def _attention(self, index: int, normed: str) -> str:
        """Rotate, append to the KV buffers, attend: [b, n, hidden] -> [b, n, heads * head_dim]."""
        config, prefix = self.config, f"block.{index}."
        stacked = self._product(normed, prefix, "qkv")
        if config.qkv_bias:
            stacked = self.graph.value("Add", [stacked, f"{prefix}qkv_bias"])
        # Without norms in between, the operator takes the stacked product and splits it itself.
        query, key, value = self._normed_heads(stacked, prefix) if config.qk_norm else (stacked, "", "")
        buffers = [f"kv.{index}.key", f"kv.{index}.value"]
        shape: list[int | str] = ["b", config.kv_heads, "context", config.head_dim]
        for name in buffers:
            self.graph.input(name, TensorProto.FLOAT, shape)
            self.graph.output(f"{name}.out", TensorProto.FLOAT, shape)
        attended = f"{prefix}attended"
        self.graph.node(
            "GroupQueryAttention",
            [query, key, value, *buffers, "last_row", "rows", "rope.cos", "rope.sin"],
            [attended, *(f"{name}.out" for name in buffers)],
            CONTRIB,
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=1,
            rotary_interleaved=int(config.rope_interleaved),
        )
        return attended

    def _normed_heads(self, stacked: str, prefix: str) -> tuple[str, str, str]:
        """Split q, k and v, and norm each head of q and of k (Qwen3)."""
        config = self.config
        parts = [f"{prefix}{letter}" for letter in "qkv"]
        widths = self._shape("qkv_widths", config.q_width, config.kv_width, config.kv_width)
        self.graph.node("Split", [stacked, widths], parts, axis=-1)
        normed = []
        for letter, part, width in (("q", parts[0], config.q_width), ("k", parts[1], config.kv_width)):
            by_head = self._shape(f"{letter}_by_head", 0, -1, width // config.head_dim, config.head_dim)
            heads = self._norm(self.graph.value("Reshape", [part, by_head]), f"{prefix}{letter}_norm")
            normed.append(self.graph.value("Reshape", [heads, self._shape(f"{letter}_flat", 0, -1, width)]))
        return normed[0], normed[1], parts[2]

    def _norm(self, values: str, weight: str) -> str:
        return self.graph.value(
            "SimplifiedLayerNormalization", [values, weight], axis=-1, epsilon=self.config.rms_eps, stash_type=1
        )

    def _product(self, values: str, prefix: str, matrix: str) -> str:
        """Multiply with a matrix of a block, whose weights are declared, and with the factors beside it."""
        name = f"{prefix}{matrix}"
        if self.precision == "f32":
            product = self.graph.value("MatMul", [values, f"{name}.weight"])
        else:
            names = [info.name for info in matrix_weights(name, *matrix_size(self.config, matrix), self.precision)]
            product = f"{name}.product"
            self._product_of_codes(values, matrix, names, 4 if self.precision == "int4" else 8, [product])
        products: dict[str, tuple[str, ...]] = dict(self.adapters.products) if self.adapters is not None else {}
        letters = products.get(matrix)
        if letters is None:
            return product
        ranks = self.graph.value("MatMul", [values, f"{name}.lora_a"])
        # A row without an adapter gets zeros added: its bits stay.
        taken = self.graph.value("Mul", [ranks, self._mask(len(letters))])
        return self.graph.value("Add", [product, self.graph.value("MatMul", [taken, f"{name}.lora_b"])])

    def _mask(self, letters: int) -> str:
        """Which ranks the rows take part with, once for each letter of a product."""
        if letters not in self._masks:
            self._masks[letters] = self.graph.value("Concat", [self._masks[1]] * letters, axis=-1)
        return self._masks[letters]

    def _product_of_codes(
        self, values: str, matrix: str, names: Sequence[str], bits: int, outputs: Sequence[str]
    ) -> None:
        out, columns = matrix_size(self.config, matrix)
        self.graph.node(
            "MatMulNBits",
            [values, *names],
            outputs,
            CONTRIB,
            K=columns,
            N=out,
            bits=bits,
            block_size=BLOCK,
            accuracy_level=ACCURACY_LEVEL,
        )

    def _to_wire(self, values: str) -> str:
        return values if self.wire_dtype == "f32" else self.graph.value("Cast", [values], to=self._wire_type)

    def _from_wire(self, values: str) -> str:
        return values if self.wire_dtype == "f32" else self.graph.value("Cast", [values], to=TensorProto.FLOAT)

    def _shape(self, name: str, *dims: int) -> str:
        return self.graph.constant(name, np.array(dims, np.int64))

    def _declare(self, weights: Sequence[WeightInfo]) -> list[str]:
        """Declare weights once, however many parts use them (tied embedding and head); give their names."""
        for info in weights:
            if info.name not in self.weights:
                self.weights[info.name] = info
                self.graph.external(info)
        return [info.name for info in weights]
