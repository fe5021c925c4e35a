"""A sentence encoder of a few thousand random weights, with a vocabulary of words, written as its publishers do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import erf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from models.formats import safetensors

WORDS = ("hello", "world", "a", "cat", "sat", "on", "the", "mat", "board", "boards", "cut", "model")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS)
CONFIG = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": len(VOCABULARY),
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
}


def random_bert(seed: int = 1) -> dict[str, npt.NDArray[np.float32]]:
    """All tensors of a Bert encoder of CONFIG's sizes by their published names."""
    chance = np.random.default_rng(seed)
    hidden, inner = 32, 64
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), hidden),
        "embeddings.position_embeddings.weight": (48, hidden),
        "embeddings.token_type_embeddings.weight": (2, hidden),
    }
    norms = ["embeddings.LayerNorm"]
    for index in range(4):
        layer = f"encoder.layer.{index}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{layer}.{name}.weight": (hidden, hidden), f"{layer}.{name}.bias": (hidden,)}
        shapes |= {f"{layer}.intermediate.dense.weight": (inner, hidden), f"{layer}.intermediate.dense.bias": (inner,)}
        shapes |= {f"{layer}.output.dense.weight": (hidden, inner), f"{layer}.output.dense.bias": (hidden,)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    tensors = {name: chance.standard_normal(shape).astype(np.float32) * 0.2 for name, shape in shapes.items()}
    for norm in norms:
        tensors[f"{norm}.weight"] = 1 + chance.standard_normal(hidden).astype(np.float32) * 0.1
        tensors[f"{norm}.bias"] = chance.standard_normal(hidden).astype(np.float32) * 0.1
    return tensors


def write_bert(folder: Path, seed: int = 1) -> Path:
    """Write config.json, model.safetensors and tokenizer.json; give the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    safetensors.write(folder / "model.safetensors", random_bert(seed))
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    return folder


def _tokenizer() -> dict[str, object]:
    ids = {word: number for number, word in enumerate(VOCABULARY)}

    def special(name: str) -> dict[str, object]:
        return {"SpecialToken": {"id": name, "type_id": 0}}

    return {
        "version": "1.0",
        "truncation": {"max_length": 8, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, special("[SEP]")],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in ("[CLS]", "[SEP]")},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": "[UNK]"},
    }


def reference(tokens: list[int], seed: int = 1) -> npt.NDArray[np.float64]:
    """The vector of a text from the random weights."""
    return vector_of(tokens, random_bert(seed), 4)


def vector_of(tokens: list[int], tensors: Mapping[str, npt.NDArray[Any]], heads: int) -> npt.NDArray[np.float64]:
    """The vector of a text, of length 1."""
    mean = mean_of(tokens, tensors, heads)
    return mean / np.linalg.norm(mean)


def mean_of(tokens: list[int], tensors: Mapping[str, npt.NDArray[Any]], heads: int) -> npt.NDArray[np.float64]:
    """The mean of a text's last rows by the formulas of the Bert paper (arXiv 1810.04805), in double precision."""
    weights = {name: tensor.astype(np.float64) for name, tensor in tensors.items() if tensor.dtype.kind == "f"}
    width = weights["embeddings.LayerNorm.weight"].size
    layers = sum(name.endswith("attention.self.query.bias") for name in weights)

    def linear(rows: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        return rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(rows: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        centred = rows - rows.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    places = weights["embeddings.position_embeddings.weight"][: len(tokens)]
    types = weights["embeddings.token_type_embeddings.weight"][0]
    states = norm(weights["embeddings.word_embeddings.weight"][tokens] + places + types, "embeddings.LayerNorm")
    for index in range(layers):
        layer = f"encoder.layer.{index}"
        query, key, value = (
            linear(states, f"{layer}.attention.self.{name}").reshape(-1, heads, width // heads).transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / sqrt(width // heads)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = (shares @ value).transpose(1, 0, 2).reshape(-1, width)
        states = norm(linear(mixed, f"{layer}.attention.output.dense") + states, f"{layer}.attention.output.LayerNorm")
        inner = linear(states, f"{layer}.intermediate.dense")
        bent = inner * 0.5 * (1 + np.vectorize(erf)(inner / sqrt(2)))
        states = norm(linear(bent, f"{layer}.output.dense") + states, f"{layer}.output.LayerNorm")
    mean: npt.NDArray[np.float64] = states.mean(0)
    return mean
