"""The same stage in operators of ONNX alone, for engines that don't know onnxruntime's own: TensorRT, GPU providers.

Inputs and outputs, with n rows of each of b requests, `context` rows of room, and the largest shapes set by the engine:
    tokens        int32 [b, n]                          stages with the embedding; else
    hidden        wire dtype [b, n, hidden]
    position      int32 [b]                             rows before those that are given, of each request
    offsets       int32 [n]                             0, 1, .. n - 1
    places        int32 [context]                       0, 1, .. context - 1
    rope.cos      float32 [context, head_dim / 2]       rope.sin alike
    kv.{i}.key    [b, kv_heads, context, head_dim]      and kv.{i}.value: what was run before; only read
    kv.{i}.key.new, kv.{i}.value.new  [b, kv_heads, n, head_dim]    outputs: the engine puts them into the buffers
    hidden.out    wire dtype [b, n, hidden]
    logits_rows   int32 [m]                             stages with the head: of which of the n rows
    logits        float32 [b * m, vocabulary]
No shape is computed in the graph, and no buffer is written in place: both are what engines differ in. Attention is over
the whole buffer, masked, in two parts (rows of before, rows of now) under one softmax; so nothing is concatenated.

Weights are floating point numbers (models.engine.expand), products are of their type; norms, rotation, softmax and the
sum of the residual stream inside a block are float32. The residual stream takes the wire dtype at every block boundary,
as in models.build.stage. Answers equal those of the other graph as far as floating point goes: not the same bits.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from models.build.layout import block_weights, checked_precision, checked_wire_dtype, head_matrix, table_weights
from models.build.stage import INT32, WEIGHT_TYPES, WIRE_TYPES, GraphWriter, check_stage
from models.engine.expand import compute_of, offsets_bytes, standard_weights
from models.engine.manifest import StageManifest, WeightInfo
from models.families.config import LlamaConfig

FLOAT: Final = WEIGHT_TYPES["f32"]

MASKED: Final = -1e30
"""Added to scores that don't count: its exponential is 0, and no infinity takes part in a sum."""


def build_standard_graph(
    config: LlamaConfig,
    precision: str,
    wire_dtype: str,
    *,
    first_block: int,
    end_block: int,
    embedding: bool,
    head: bool,
) -> bytes:
    """Give the ONNX model of a stage in standard operators; arguments and errors as `build_stage_graph`."""
    check_stage(config, first_block, end_block, embedding or head)
    packed_as = checked_precision(precision)
    weights: dict[str, WeightInfo] = {}
    for wanted, infos in (
        (embedding, table_weights("embedding", config, packed_as)),
        *((True, block_weights(config, index, packed_as)) for index in range(first_block, end_block)),
        (head, (WeightInfo("final_norm", "f32", (config.hidden,)),)),
        (head, table_weights(head_matrix(config), config, packed_as)),
    ):
        weights |= {info.name: info for info in infos if wanted}
    manifest = StageManifest(
        precision=packed_as,
        wire_dtype=checked_wire_dtype(wire_dtype),
        embedding=embedding,
        head=head,
        first_block=first_block,
        end_block=end_block,
        config=config,
        weights=tuple(weights.values()),
        operators="standard",
    )
    parts = _Parts(manifest)
    residual = parts.embedding() if embedding else parts.given_hidden()
    if end_block > first_block:
        parts.prepare_attention()
    for index in manifest.blocks:
        residual = parts.block(index, residual)
    parts.finish(residual, given=not embedding and end_block == first_block)
    return parts.graph.serialised(manifest)


class _Parts:
    """The parts of a Llama, appended to a graph."""

    def __init__(self, manifest: StageManifest) -> None:
        self.manifest = manifest
        self.config = manifest.config
        self.graph = GraphWriter()
        self._compute = WEIGHT_TYPES[compute_of(manifest.precision)]
        self._wire = WIRE_TYPES[manifest.wire_dtype]
        self._group = self.config.heads // self.config.kv_heads
        weights = standard_weights(manifest)
        for info, offset in zip(weights, offsets_bytes(weights), strict=True):
            self.graph.external(info, offset)

    def given_hidden(self) -> str:
        return self.graph.input("hidden", self._wire, ["b", "n", self.config.hidden])

    def embedding(self) -> str:
        tokens = self.graph.input("tokens", INT32, ["b", "n"])
        return self._cast(self.graph.value("Gather", ["embedding", tokens]), self._compute, self._wire)

    def prepare_attention(self) -> None:
        """What all blocks share: rotations of the rows given, and what each row may look at."""
        graph = self.graph
        position, offsets = graph.input("position", INT32, ["b"]), graph.input("offsets", INT32, ["n"])
        places = graph.input("places", INT32, ["context"])
        begins = graph.value("Reshape", [position, self._shape("begins", -1, 1)])
        rows = graph.value("Add", [begins, graph.value("Reshape", [offsets, self._shape("one_row", 1, -1)])])
        for name in ("cos", "sin"):
            table = graph.input(f"rope.{name}", FLOAT, ["context", self.config.head_dim // 2])
            turned = graph.value("Gather", [table, rows])
            axis = self._shape("heads_axis", 2)
            graph.rename(graph.value("Unsqueeze", [turned, axis]), f"rows.{name}")
        before = graph.value("Reshape", [position, self._shape("by_request", -1, 1, 1, 1)])
        self._mask("mask.past", graph.value("Less", [places, before]))
        # Rows are told apart by the query heads that share a key: row, then head.
        spread = graph.constant("group", np.zeros((1, self._group), np.int32))
        column = graph.value("Reshape", [offsets, self._shape("one_column", -1, 1)])
        queries = graph.value("Add", [column, spread])
        queries = graph.value("Reshape", [queries, self._shape("one_column", -1, 1)])
        self._mask("mask.new", graph.value("LessOrEqual", [offsets, queries]))

    def block(self, index: int, residual: str) -> str:
        """Append a block; residual stream in wire dtype in and out."""
        graph, prefix = self.graph, f"block.{index}."
        before = self._cast(residual, self._wire, FLOAT)
        attended = self._product(self._attention(index, self._norm(before, f"{prefix}attention_norm")), f"{prefix}o")
        middle = graph.value("Add", [before, attended])
        normed = self._cast(self._norm(middle, f"{prefix}ffn_norm"), FLOAT, self._compute)
        gate = graph.value("MatMul", [normed, f"{prefix}gate"])
        up = graph.value("MatMul", [normed, f"{prefix}up"])
        gated = graph.value("Mul", [gate, graph.value("Sigmoid", [gate])])
        added = self._product(graph.value("Mul", [gated, up]), f"{prefix}down")
        return self._cast(graph.value("Add", [middle, added]), FLOAT, self._wire)

    def finish(self, residual: str, *, given: bool) -> None:
        """Name the outputs; `given` says that the residual stream is the graph's own input."""
        graph, config = self.graph, self.config
        if not given:
            graph.rename(residual, "hidden.out")
            residual = "hidden.out"
            graph.output("hidden.out", self._wire, ["b", "n", config.hidden])
        if not self.manifest.head:
            return
        wanted = graph.input("logits_rows", INT32, ["m"])
        rows = graph.value("Gather", [residual, wanted], axis=1)
        flat = graph.value("Reshape", [rows, self._shape("flat_rows", -1, config.hidden)])
        normed = self._norm(self._cast(flat, self._wire, FLOAT), "final_norm")
        product = graph.value("Gemm", [self._cast(normed, FLOAT, self._compute), head_matrix(config)], transB=1)
        graph.rename(self._cast(product, self._compute, FLOAT), "logits")
        graph.output("logits", FLOAT, ["b * m", config.vocabulary])

    def _attention(self, index: int, normed: str) -> str:
        """float32 [b, n, hidden] -> [b, n, heads * head_dim], of the type of products."""
        config, graph, prefix = self.config, self.graph, f"block.{index}."
        stacked = graph.value("MatMul", [self._cast(normed, FLOAT, self._compute), f"{prefix}qkv"])
        if config.qkv_bias:
            stacked = graph.value("Add", [stacked, f"{prefix}qkv_bias"])
        parts = [f"{prefix}{letter}" for letter in "qkv"]
        graph.node(
            "Split", [stacked, self._shape("widths", config.q_width, config.kv_width, config.kv_width)], parts, axis=-1
        )
        query = self._rotated(parts[0], f"{prefix}q_norm", config.heads)
        key = self._rotated(parts[1], f"{prefix}k_norm", config.kv_heads)
        scale = graph.constant("scale", np.array(config.head_dim**-0.5, np.float32))
        query = self._cast(graph.value("Mul", [query, scale]), FLOAT, self._compute)
        by_group = self._shape("by_group", 0, 0, config.kv_heads, self._group, config.head_dim)
        query = graph.value("Transpose", [graph.value("Reshape", [query, by_group])], perm=[0, 2, 1, 3, 4])
        query = graph.value("Reshape", [query, self._shape("queries", 0, 0, -1, config.head_dim)])
        value = graph.value("Reshape", [parts[2], self._shape("by_kv_head", 0, 0, config.kv_heads, config.head_dim)])
        rows = {
            "key": graph.value("Transpose", [self._cast(key, FLOAT, self._compute)], perm=[0, 2, 1, 3]),
            "value": graph.value("Transpose", [value], perm=[0, 2, 1, 3]),
        }
        buffers = {}
        for part, made in rows.items():
            name = f"kv.{index}.{part}"
            buffers[part] = graph.input(name, self._compute, ["b", config.kv_heads, "context", config.head_dim])
            graph.rename(made, f"{name}.new")
            graph.output(f"{name}.new", self._compute, ["b", config.kv_heads, "n", config.head_dim])
            rows[part] = f"{name}.new"
        past = self._scores(query, buffers["key"], "mask.past")
        now = self._scores(query, rows["key"], "mask.new")
        last = self._shape("last_axis", -1)
        most = graph.value("Max", [graph.value("ReduceMax", [part, last]) for part in (past, now)])
        powers = [graph.value("Exp", [graph.value("Sub", [part, most])]) for part in (past, now)]
        whole = graph.value("Add", [graph.value("ReduceSum", [power, last]) for power in powers])
        shares = [self._cast(graph.value("Div", [power, whole]), FLOAT, self._compute) for power in powers]
        sums = [
            graph.value("MatMul", [share, kept])
            for share, kept in zip(shares, (buffers["value"], rows["value"]), strict=True)
        ]
        by_row = self._shape("by_row", 0, 0, -1, self._group, config.head_dim)
        heads = graph.value(
            "Transpose", [graph.value("Reshape", [graph.value("Add", sums), by_row])], perm=[0, 2, 1, 3, 4]
        )
        return graph.value("Reshape", [heads, self._shape("flat_heads", 0, 0, config.q_width)])

    def _scores(self, query: str, keys: str, mask: str) -> str:
        """[b, kv_heads, n * group, keys], float32, masked."""
        product = self.graph.value("MatMul", [query, self.graph.value("Transpose", [keys], perm=[0, 1, 3, 2])])
        return self.graph.value("Add", [self._cast(product, self._compute, FLOAT), mask])

    def _rotated(self, values: str, norm: str, heads: int) -> str:
        """[b, n, heads * head_dim] -> [b, n, heads, head_dim], normed where the family does so, turned, float32."""
        config, graph = self.config, self.graph
        rows = graph.value("Reshape", [values, self._shape(f"by_head_{heads}", 0, 0, heads, config.head_dim)])
        rows = self._cast(rows, self._compute, FLOAT)
        if config.qk_norm:
            rows = self._norm(rows, norm)
        half = config.head_dim // 2
        if config.rope_interleaved:
            pairs = graph.value("Reshape", [rows, self._shape(f"pairs_{heads}", 0, 0, heads, half, 2)])
            halves = [graph.value("Gather", [pairs, self._number(at)], axis=-1) for at in (0, 1)]
        else:
            halves = [f"{values}.{part}.of.{norm}" for part in ("first", "second")]
            graph.node("Split", [rows, self._shape("halves", half, half)], halves, axis=-1)
        (first, second), (cos, sin) = halves, ("rows.cos", "rows.sin")
        real = graph.value("Sub", [graph.value("Mul", [first, cos]), graph.value("Mul", [second, sin])])
        other = graph.value("Add", [graph.value("Mul", [first, sin]), graph.value("Mul", [second, cos])])
        if not config.rope_interleaved:
            return graph.value("Concat", [real, other], axis=-1)
        last = self._shape("last_axis", -1)
        pairs = graph.value("Concat", [graph.value("Unsqueeze", [part, last]) for part in (real, other)], axis=-1)
        return graph.value("Reshape", [pairs, self._shape(f"by_head_{heads}", 0, 0, heads, config.head_dim)])

    def _norm(self, values: str, weight: str) -> str:
        """values / sqrt(mean(values^2) + eps) * weight, over the last axis, float32."""
        graph = self.graph
        mean = graph.value("ReduceMean", [graph.value("Mul", [values, values]), self._shape("last_axis", -1)])
        eps = graph.constant("eps", np.array(self.config.rms_eps, np.float32))
        root = graph.value("Sqrt", [graph.value("Add", [mean, eps])])
        return graph.value("Mul", [graph.value("Div", [values, root]), weight])

    def _product(self, values: str, matrix: str) -> str:
        return self._cast(self.graph.value("MatMul", [values, matrix]), self._compute, FLOAT)

    def _mask(self, name: str, seen: str) -> None:
        nothing = self.graph.constant("seen", np.array(0, np.float32))
        much = self.graph.constant("masked", np.array(MASKED, np.float32))
        self.graph.rename(self.graph.value("Where", [seen, nothing, much]), name)

    def _cast(self, values: str, given: int, wanted: int) -> str:
        return values if given == wanted else self.graph.value("Cast", [values], to=wanted)

    def _number(self, value: int) -> str:
        return self.graph.constant(f"number_{value}", np.array(value, np.int32))

    def _shape(self, name: str, *dims: int) -> str:
        return self.graph.constant(name, np.array(dims, np.int64))
