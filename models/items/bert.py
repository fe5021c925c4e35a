"""Sentence encoders of the Bert family (MiniLM, BGE, E5): from a folder of safetensors to an ONNX graph.

    tokens int64 [rows] -> embedding f32 [hidden]

One text at a time, so nothing is padded and no mask is needed. The rows of the last block are averaged and brought to
length 1, as sentence-transformers does for these models. Positions and the one token type are added beforehand.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct
from onnx import TensorProto, helper, numpy_helper

from models.families.config import MAX_BLOCKS, MAX_CONTEXT, MAX_HEADS, MAX_VOCABULARY, MAX_WIDTH
from models.formats.safetensors import SafetensorsFile, open_safetensors
from wire.errors import CorruptData, Refused, UsageError

Floats = npt.NDArray[np.float32]

OPSET: Final = 20
"""The oldest with Gelu as one operator."""
MAX_CONFIG_BYTES: Final = 1 << 20
PREFIXES: Final = ("", "bert.")
"""Before the names of tensors: checkpoints of the bare encoder have none."""


class BertConfig(Struct, frozen=True, kw_only=True):
    """What of config.json decides the graph. Raises Refused or CorruptData when made with what can't be."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"

    def __post_init__(self) -> None:
        if self.model_type != "bert":
            raise Refused(f"a {self.model_type!r} model is not supported as a sentence encoder", try_="a Bert model")
        if self.hidden_act != "gelu" or self.position_embedding_type != "absolute":
            raise Refused(f"{self.hidden_act} with {self.position_embedding_type} positions is not supported")
        counts = (
            ("hidden_size", self.hidden_size, MAX_WIDTH),
            ("num_hidden_layers", self.num_hidden_layers, MAX_BLOCKS),
            ("num_attention_heads", self.num_attention_heads, MAX_HEADS),
            ("intermediate_size", self.intermediate_size, MAX_WIDTH),
            ("vocab_size", self.vocab_size, MAX_VOCABULARY),
            ("max_position_embeddings", self.max_position_embeddings, MAX_CONTEXT),
        )
        for name, number, most in counts:
            if not 1 <= number <= most:
                raise CorruptData(f"model configuration: {name} is {number}, must be 1 to {most}")
        if self.hidden_size % self.num_attention_heads:
            raise CorruptData(f"{self.hidden_size} wide does not divide by {self.num_attention_heads} heads")
        if not 0.0 < self.layer_norm_eps < 1.0:
            raise CorruptData(f"model configuration: layer_norm_eps is {self.layer_norm_eps}")


def is_bert(folder: Path) -> bool:
    """Whether a folder's config.json says that it holds a Bert model."""
    try:
        return read_bert_config(folder).model_type == "bert"
    except (Refused, CorruptData, UsageError):
        return False


def read_bert_config(folder: Path) -> BertConfig:
    """Raises UsageError (none there), CorruptData, Refused (not supported)."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CorruptData(f"{path}: {path.stat().st_size} bytes are no configuration")
        return msgspec.json.decode(path.read_bytes(), type=BertConfig)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", try_="a folder with config.json") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptData(f"{path}: {error}") from error


def build_bert(folder: Path) -> bytes:
    """Give the ONNX model of a folder with config.json and model.safetensors. Raises what reading them raises."""
    config = read_bert_config(folder)
    return _Builder(config, open_safetensors(folder / "model.safetensors")).model()


class _Builder:
    def __init__(self, config: BertConfig, file: SafetensorsFile) -> None:
        self._config = config
        self._file = file
        self._prefix = next((p for p in PREFIXES if f"{p}embeddings.word_embeddings.weight" in file.tensors), "")
        self._nodes: list[Any] = []
        self._constants: dict[str, TensorProto] = {}

    def model(self) -> bytes:
        config = self._config
        states = self._embedded()
        for index in range(config.num_hidden_layers):
            states = self._block(index, states)
        mean = self._value("pool.mean", "ReduceMean", [states, self._numbers("rows_axis", 0)], keepdims=0)
        self._value("embedding", "LpNormalization", [mean], axis=0, p=2)
        graph = helper.make_graph(
            self._nodes,
            "encoder",
            [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["rows"])],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [config.hidden_size])],
            list(self._constants.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        data: bytes = model.SerializeToString()
        return data

    def _embedded(self) -> str:
        config, width = self._config, self._config.hidden_size
        words = self._weight("embeddings.word_embeddings.weight", config.vocab_size, width)
        places = self._tensor("embeddings.position_embeddings.weight", config.max_position_embeddings, width)
        types = self._tensor("embeddings.token_type_embeddings.weight", None, width)
        table = self._constant("places", places + types[0])
        rows = self._value("embeddings.rows", "Gather", [words, "tokens"])
        count = self._value("embeddings.count", "Shape", ["tokens"])
        start, axis = self._numbers("zero", 0), self._numbers("rows_axis", 0)
        first = self._value("embeddings.places", "Slice", [table, start, count, axis])
        return self._norm("embeddings", self._value("embeddings.sum", "Add", [rows, first]), "embeddings.LayerNorm")

    def _block(self, index: int, states: str) -> str:
        config, at = self._config, f"block.{index}"
        source, width, heads = f"encoder.layer.{index}", config.hidden_size, config.num_attention_heads
        size = width // heads
        split = self._numbers("by_head", -1, heads, size)
        parts = []
        for name in ("query", "key", "value"):
            rows = self._linear(f"{at}.{name}", states, f"{source}.attention.self.{name}", width, width)
            by_head = self._value(f"{at}.{name}.by_head", "Reshape", [rows, split])
            turn = [1, 2, 0] if name == "key" else [1, 0, 2]
            parts.append(self._value(f"{at}.{name}.heads", "Transpose", [by_head], perm=turn))
        scores = self._value(f"{at}.products", "MatMul", parts[:2])
        scale = self._constant("scale", np.array(1 / math.sqrt(size), np.float32))
        shares = self._value(f"{at}.shares", "Softmax", [self._value(f"{at}.scores", "Mul", [scores, scale])], axis=-1)
        mixed = self._value(f"{at}.mixed", "MatMul", [shares, parts[2]])
        turned = self._value(f"{at}.turned", "Transpose", [mixed], perm=[1, 0, 2])
        joined = self._value(f"{at}.joined", "Reshape", [turned, self._numbers("flat", -1, width)])
        out = self._linear(f"{at}.out", joined, f"{source}.attention.output.dense", width, width)
        attended = self._value(f"{at}.attended", "Add", [out, states])
        states = self._norm(f"{at}.attention", attended, f"{source}.attention.output.LayerNorm")
        inner = config.intermediate_size
        wide = self._linear(f"{at}.wide", states, f"{source}.intermediate.dense", width, inner)
        bent = self._value(f"{at}.gelu", "Gelu", [wide])
        narrow = self._linear(f"{at}.narrow", bent, f"{source}.output.dense", inner, width)
        return self._norm(at, self._value(f"{at}.sum", "Add", [narrow, states]), f"{source}.output.LayerNorm")

    def _linear(self, name: str, rows: str, source: str, given: int, out: int) -> str:
        weight = np.ascontiguousarray(self._tensor(f"{source}.weight", out, given).T)
        product = self._value(f"{name}.product", "MatMul", [rows, self._constant(f"{name}.weight", weight)])
        return self._value(name, "Add", [product, self._weight(f"{source}.bias", out)])

    def _norm(self, name: str, rows: str, source: str) -> str:
        width = self._config.hidden_size
        parts = [rows, self._weight(f"{source}.weight", width), self._weight(f"{source}.bias", width)]
        return self._value(f"{name}.normed", "LayerNormalization", parts, axis=-1, epsilon=self._config.layer_norm_eps)

    def _value(self, name: str, operator: str, inputs: list[str], **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operator, inputs, [name], **attributes))
        return name

    def _weight(self, name: str, *shape: int) -> str:
        return self._constant(name, self._tensor(name, *shape))

    def _constant(self, name: str, values: npt.NDArray[Any]) -> str:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(values, name)
        return name

    def _numbers(self, name: str, *numbers: int) -> str:
        return self._constant(name, np.array(numbers, np.int64))

    def _tensor(self, name: str, *shape: int | None) -> Floats:
        """A tensor of the file as float32; raise CorruptData if it is missing or of another shape (None: any size)."""
        full = f"{self._prefix}{name}"
        if full not in self._file.tensors:
            raise CorruptData(f"{self._file.path}: no tensor {full!r}")
        tensor = self._file.float32(full)
        fits = tensor.ndim == len(shape) and all(
            size >= 1 and wanted in (None, size) for size, wanted in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            raise CorruptData(f"{self._file.path}: tensor {full!r} is {list(tensor.shape)}, {list(shape)} is due")
        return tensor
