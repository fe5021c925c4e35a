"""Sentence encoders of the Bert family (MiniLM, BGE, E5): from a folder of safetensors to an ONNX graph.

    tokens int64 [rows] -> embedding f32 [hidden], or, with a task module, shares f32 [labels]

One text at a time, so nothing is padded and no mask is needed. The rows of the last block are averaged and brought to
length 1, as sentence-transformers does for these models; a task module takes the plain average, and its scores become
shares that add up to 1. Positions and the one token type are added beforehand.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper, numpy_helper

from models.formats.bert import BLOCK_NORMS, EMBEDDINGS_NORM, BertFile, matrix_name, read_bert_config

OPSET: Final = 20
"""The oldest with Gelu as one operator."""


def build_bert(folder: Path) -> bytes:
    """Give the ONNX model of a folder with config.json and model.safetensors. Raises what reading them raises."""
    config = read_bert_config(folder)
    return _Builder(BertFile.open(config, folder / "model.safetensors")).model()


class _Builder:
    def __init__(self, file: BertFile) -> None:
        self._config = file.config
        self._file = file
        self._nodes: list[Any] = []
        self._constants: dict[str, TensorProto] = {}

    def model(self) -> bytes:
        config = self._config
        states = self._embedded()
        for index in range(config.num_hidden_layers):
            states = self._block(index, states)
        mean = self._value("pool.mean", "ReduceMean", [states, self._numbers("rows_axis", 0)], keepdims=0)
        name, width = self._answer(mean)
        graph = helper.make_graph(
            self._nodes,
            "encoder",
            [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["rows"])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, [width])],
            list(self._constants.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        data: bytes = model.SerializeToString()
        return data

    def _answer(self, mean: str) -> tuple[str, int]:
        """What comes out, and how many numbers that has."""
        task = self._file.task_module()
        if task is None:
            return self._value("embedding", "LpNormalization", [mean], axis=0, p=2), self._config.hidden_size
        weight, bias = task
        product = self._value("scores.product", "MatMul", [self._constant("scores.weight", weight), mean])
        scores = self._value("scores", "Add", [product, self._constant("scores.bias", bias)])
        return self._value("shares", "Softmax", [scores], axis=-1), len(bias)

    def _embedded(self) -> str:
        words = self._constant("embeddings.word_embeddings.weight", self._file.words())
        table = self._constant("places", self._file.places())
        rows = self._value("embeddings.rows", "Gather", [words, "tokens"])
        count = self._value("embeddings.count", "Shape", ["tokens"])
        start, axis = self._numbers("zero", 0), self._numbers("rows_axis", 0)
        first = self._value("embeddings.places", "Slice", [table, start, count, axis])
        return self._norm("embeddings", self._value("embeddings.sum", "Add", [rows, first]), EMBEDDINGS_NORM)

    def _block(self, index: int, states: str) -> str:
        config, at = self._config, f"block.{index}"
        source, width, heads = f"encoder.layer.{index}", config.hidden_size, config.num_attention_heads
        size = width // heads
        split = self._numbers("by_head", -1, heads, size)
        parts = []
        for name in ("query", "key", "value"):
            rows = self._linear(f"{at}.{name}", states, index, name[0])
            by_head = self._value(f"{at}.{name}.by_head", "Reshape", [rows, split])
            turn = [1, 2, 0] if name == "key" else [1, 0, 2]
            parts.append(self._value(f"{at}.{name}.heads", "Transpose", [by_head], perm=turn))
        scores = self._value(f"{at}.products", "MatMul", parts[:2])
        scale = self._constant("scale", np.array(1 / math.sqrt(size), np.float32))
        shares = self._value(f"{at}.shares", "Softmax", [self._value(f"{at}.scores", "Mul", [scores, scale])], axis=-1)
        mixed = self._value(f"{at}.mixed", "MatMul", [shares, parts[2]])
        turned = self._value(f"{at}.turned", "Transpose", [mixed], perm=[1, 0, 2])
        joined = self._value(f"{at}.joined", "Reshape", [turned, self._numbers("flat", -1, width)])
        out = self._linear(f"{at}.out", joined, index, "o")
        attended = self._value(f"{at}.attended", "Add", [out, states])
        states = self._norm(f"{at}.attention", attended, f"{source}.{BLOCK_NORMS[0]}")
        wide = self._linear(f"{at}.wide", states, index, "up")
        bent = self._value(f"{at}.gelu", "Gelu", [wide])
        narrow = self._linear(f"{at}.narrow", bent, index, "down")
        return self._norm(at, self._value(f"{at}.sum", "Add", [narrow, states]), f"{source}.{BLOCK_NORMS[1]}")

    def _linear(self, name: str, rows: str, block: int, matrix: str) -> str:
        weight, bias = self._file.linear(block, matrix)
        turned = self._constant(f"{name}.weight", np.ascontiguousarray(weight.T))
        product = self._value(f"{name}.product", "MatMul", [rows, turned])
        added = self._constant(f"{matrix_name(block, matrix)}.bias", bias)
        return self._value(name, "Add", [product, added])

    def _norm(self, name: str, rows: str, source: str) -> str:
        weight, bias = self._file.norm(source)
        parts = [rows, self._constant(f"{source}.weight", weight), self._constant(f"{source}.bias", bias)]
        epsilon = self._config.layer_norm_eps
        return self._value(f"{name}.normed", "LayerNormalization", parts, axis=-1, epsilon=epsilon)

    def _value(self, name: str, operator: str, inputs: list[str], **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def _constant(self, name: str, values: npt.NDArray[Any]) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(values, name)
        return name

    def _numbers(self, name: str, *numbers: int) -> str:
        return self._constant(name, np.array(numbers, np.int64))
