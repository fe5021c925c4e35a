"""A GGUF file as a checkpoint of the Llama family: which keys mean what, and tensors under canonical names.

Architectures 'llama' (Llama, SmolLM, Mistral), 'qwen2' and 'qwen3'. llama.cpp permutes the rows of q and k of arch
'llama', and only of it, so that dimensions 2j and 2j+1 rotate together.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar, cast

import numpy as np

from models.cache import file_digest
from models.families.config import Family, LlamaConfig
from models.formats.contents import STOP_TOKENS, Floats, GgufVocabulary, RawTensor, check_tensors
from models.formats.ggml import dequantise
from models.formats.gguf import GgufFile, Value, open_gguf
from wire.errors import CorruptData, Refused

FAMILIES: Final[dict[str, Family]] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TOKENIZERS: Final = ("gpt2", "llama")

_WHOLE_NAMES: Final = {"token_embd.weight": "embedding", "output_norm.weight": "final_norm", "output.weight": "head"}
_BLOCK_NAMES: Final = {
    "attn_norm.weight": "attention_norm",
    "attn_q.weight": "q",
    "attn_k.weight": "k",
    "attn_v.weight": "v",
    "attn_output.weight": "o",
    "attn_q.bias": "q_bias",
    "attn_k.bias": "k_bias",
    "attn_v.bias": "v_bias",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "ffn_norm.weight": "ffn_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
}
_OF_BLOCK: Final = re.compile(r"^blk\.(\d{1,6})\.(.+)$", re.ASCII)
_ROPE_FACTORS: Final = "rope_freqs.weight"
_CONTROL: Final = 3
_USER_DEFINED: Final = 4

T = TypeVar("T", int, float, str, bool)


def canonical_name(stored: str) -> str:
    """'blk.3.attn_q.weight' -> 'block.3.q'. A name that means nothing to us is given back as it is."""
    found = _OF_BLOCK.match(stored)
    if found:
        short = _BLOCK_NAMES.get(found[2])
        return stored if short is None else f"block.{int(found[1])}.{short}"
    return _WHOLE_NAMES.get(stored, stored)


class _Keys:
    """Typed access to metadata; a wrong type is damage."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file

    def get(self, key: str, kind: type[T], default: T) -> T:
        value = self._file.metadata.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not kind:
            raise CorruptData(f"{self._file.path}: key {key} is {_short(value)}, not {kind.__name__}")
        return value

    def need(self, key: str, kind: type[T]) -> T:
        if key not in self._file.metadata:
            raise CorruptData(f"{self._file.path}: key {key} is missing")
        return self.get(key, kind, kind())

    def token(self, key: str) -> int | None:
        return self.get(key, int, 0) if key in self._file.metadata else None

    def same_for_all(self, key: str, default: int) -> int:
        """An integer, or an array with one integer per block that are all equal."""
        value = self._file.metadata.get(key, default)
        if isinstance(value, np.ndarray):
            if value.size == 0 or (value != value[0]).any():
                raise Refused(f"{self._file.path}: {key} differs between blocks, which is not supported")
            return int(value[0])
        return self.get(key, int, default)

    def texts(self, key: str) -> list[str]:
        value = self._file.metadata.get(key, [])
        if isinstance(value, list):
            return value
        raise CorruptData(f"{self._file.path}: key {key} is no array of texts")

    def numbers(self, key: str) -> list[float]:
        value = self._file.metadata.get(key)
        if value is None:
            return []
        if isinstance(value, np.ndarray):
            return cast("list[float]", value.tolist())
        raise CorruptData(f"{self._file.path}: key {key} is no array of numbers")


def _short(value: Value) -> str:
    return repr(value)[:40]


class GgufCheckpoint:
    """A Checkpoint (see models.formats.contents) in one GGUF file."""

    def __init__(self, file: GgufFile, config: LlamaConfig, stored: dict[str, str], cache: Path | None) -> None:
        self.path = file.path
        self.config = config
        self._file = file
        self._stored = stored
        self._cache = cache
        self._keys = _Keys(file)

    @classmethod
    def open(cls, path: Path, cache: Path | None) -> GgufCheckpoint:
        file = open_gguf(path)
        stored = {canonical_name(name): name for name in file.tensors if name != _ROPE_FACTORS}
        config = _config(file, stored)
        check_tensors(path, config, {name: file.tensors[at].shape for name, at in stored.items()})
        checkpoint = cls(file, config, stored, cache)
        checkpoint.tokenizer_data  # noqa: B018  damage there is better known now than after the weights were sent
        return checkpoint

    @property
    def name(self) -> str:
        return self._keys.get("general.name", str, self.path.stem)

    @property
    def licence(self) -> str | None:
        return self._keys.get("general.license", str, "") or None

    @cached_property
    def digest(self) -> str:
        return file_digest(self.path, self._cache)

    @property
    def chat_template(self) -> str | None:
        return self._keys.get("tokenizer.chat_template", str, "") or None

    @property
    def bos_id(self) -> int | None:
        return self._keys.token("tokenizer.ggml.bos_token_id")

    @property
    def eos_id(self) -> int | None:
        return self._keys.token("tokenizer.ggml.eos_token_id")

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        named = (self._keys.token(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        stops = {token for token in named if token is not None}
        vocabulary = self.tokenizer_data
        if vocabulary is not None:
            special = (_CONTROL, _USER_DEFINED)
            pairs = enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            stops |= {at for at, (text, kind) in pairs if kind in special and text in STOP_TOKENS}
        return frozenset(stops)

    @cached_property
    def tokenizer_data(self) -> GgufVocabulary | None:
        model = self._keys.get("tokenizer.ggml.model", str, "")
        if not model:
            return None
        if model not in TOKENIZERS:
            raise Refused(
                f"{self.path}: tokenizer {model!r} is not supported ({', '.join(TOKENIZERS)} are)",
                try_="a checkpoint with tokenizer.json (hf:<repo>)",
            )
        tokens = self._keys.texts("tokenizer.ggml.tokens")
        types = [int(number) for number in self._keys.numbers("tokenizer.ggml.token_type")] or [1] * len(tokens)
        scores = self._keys.numbers("tokenizer.ggml.scores")
        if not tokens or len(types) != len(tokens) or len(scores) not in (0, len(tokens)):
            raise CorruptData(
                f"{self.path}: {len(tokens)} tokens, {len(types)} token types, {len(scores)} scores: not alike"
            )
        if len(tokens) > self.config.vocabulary:
            raise CorruptData(f"{self.path}: {len(tokens)} tokens, {self.config.vocabulary} rows in the embedding")
        return GgufVocabulary(
            model=model,
            pre=self._keys.get("tokenizer.ggml.pre", str, "default"),
            tokens=tokens,
            types=types,
            scores=scores or [0.0] * len(tokens),
            merges=self._keys.texts("tokenizer.ggml.merges"),
            add_bos=self._keys.get("tokenizer.ggml.add_bos_token", bool, model == "llama"),
            add_space_prefix=self._keys.get("tokenizer.ggml.add_space_prefix", bool, model == "llama"),
            unknown_id=self._keys.token("tokenizer.ggml.unknown_token_id"),
        )

    def has(self, name: str) -> bool:
        return name in self._stored

    def tensor(self, name: str) -> Floats:
        info = self._file.tensors[self._stored[name]]
        return dequantise(info.kind, self._file.rows(info.name)).reshape(info.shape)

    def raw(self, name: str) -> RawTensor:
        info = self._file.tensors[self._stored[name]]
        return RawTensor(format=info.kind.name, shape=info.shape, rows=self._file.rows(info.name))


def _config(file: GgufFile, stored: dict[str, str]) -> LlamaConfig:
    keys = _Keys(file)
    parts = keys.get("split.count", int, 1)
    if parts > 1:
        raise Refused(
            f"{file.path}: one of {parts} parts of a split GGUF, which is not supported",
            try_="llama-gguf-split --merge FIRST_PART whole.gguf",
        )
    arch = keys.need("general.architecture", str)
    family = FAMILIES.get(arch)
    if family is None:
        raise Refused(
            f"{file.path}: architecture {arch!r} is not supported ({', '.join(FAMILIES)} are)",
            try_="a model of the Llama, SmolLM, Mistral, Qwen2 or Qwen3 family",
        )
    if keys.get(f"{arch}.expert_count", int, 0):
        raise Refused(f"{file.path}: a mixture of experts, which is not supported")
    if "token_embd.weight" not in file.tensors:
        raise CorruptData(f"{file.path}: tensor token_embd.weight is missing")
    heads = keys.same_for_all(f"{arch}.attention.head_count", 0)
    hidden = keys.need(f"{arch}.embedding_length", int)
    head_dim = keys.get(f"{arch}.attention.key_length", int, hidden // heads if heads > 0 else 0)
    for key in ("attention.value_length", "rope.dimension_count"):
        other = keys.get(f"{arch}.{key}", int, head_dim)
        if other != head_dim:
            raise Refused(f"{file.path}: {arch}.{key} is {other} with heads of {head_dim}, which is not supported")
    return LlamaConfig(
        family=family,
        blocks=keys.need(f"{arch}.block_count", int),
        hidden=hidden,
        ffn=keys.same_for_all(f"{arch}.feed_forward_length", 0),
        heads=heads,
        kv_heads=keys.same_for_all(f"{arch}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocabulary=file.tensors["token_embd.weight"].shape[0],
        rms_eps=keys.need(f"{arch}.attention.layer_norm_rms_epsilon", float),
        rope_base=keys.get(f"{arch}.rope.freq_base", float, 10_000.0),
        rope_interleaved=arch == "llama",
        rope_factors=_rope_factors(file, keys, arch, head_dim),
        qkv_bias="block.0.q_bias" in stored,
        qk_norm="block.0.q_norm" in stored,
        tied_embeddings="head" not in stored,
        max_context=keys.need(f"{arch}.context_length", int),
        sliding_window=keys.get(f"{arch}.attention.sliding_window", int, 0) or None,
    )


def _rope_factors(file: GgufFile, keys: _Keys, arch: str, head_dim: int) -> tuple[float, ...]:
    """Linear scaling from the keys, or the tensor that llama.cpp writes for llama3 scaling."""
    if _ROPE_FACTORS in file.tensors:
        info = file.tensors[_ROPE_FACTORS]
        values = dequantise(info.kind, file.rows(_ROPE_FACTORS)).reshape(-1)
        return tuple(float(value) for value in values)
    scaling = keys.get(f"{arch}.rope.scaling.type", str, "none")
    factor = keys.get(f"{arch}.rope.scaling.factor", float, keys.get(f"{arch}.rope.scale_linear", float, 1.0))
    if scaling not in ("none", "linear"):
        raise Refused(f"{file.path}: rope scaling {scaling!r} is not supported (linear and llama3 are)")
    if scaling == "none" and f"{arch}.rope.scale_linear" not in file.metadata:
        return ()
    return () if factor == 1.0 else (factor,) * (head_dim // 2)
