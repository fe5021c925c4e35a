"""A Hugging Face folder as a checkpoint: config.json, safetensors in one file or shards, tokenizer.json."""

from __future__ import annotations

import hashlib
import re
from functools import cached_property
from pathlib import Path
from typing import Final, TypeVar

from msgspec import Struct

from models.cache import file_digest
from models.formats.contents import STOP_TOKENS, Floats, RawTensor, TokenizerJson, check_tensors
from models.formats.hf import HfConfig, bounded, decode, llama_config, read_config
from models.formats.safetensors import SafetensorsFile, open_safetensors
from wire.errors import CorruptData, UsageError

INDEX: Final = "model.safetensors.index.json"

_WHOLE_NAMES: Final = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
}
_BLOCK_NAMES: Final = {
    "input_layernorm.weight": "attention_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
_OF_BLOCK: Final = re.compile(r"^model\.layers\.(\d{1,6})\.(.+)$", re.ASCII)
_NO_WEIGHT: Final = "rotary_emb.inv_freq"
"""A buffer that old files carry; it follows from the configuration."""

T = TypeVar("T")


class _Generation(Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


class _NamedTemplate(Struct, frozen=True):
    name: str
    template: str


class _Content(Struct, frozen=True):
    """A token as older tokenizer_config.json files spell it."""

    content: str


class _TokenizerConfig(Struct, frozen=True):
    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _Content | None = None
    eos_token: str | _Content | None = None


class _AddedToken(Struct, frozen=True):
    id: int
    content: str


class _TokenizerFile(Struct, frozen=True):
    added_tokens: list[_AddedToken] = []


class _Index(Struct, frozen=True):
    weight_map: dict[str, str]


def canonical_name(stored: str) -> str:
    """'model.layers.3.self_attn.q_proj.weight' -> 'block.3.q'. An unknown name is given back as it is."""
    found = _OF_BLOCK.match(stored)
    if found:
        short = _BLOCK_NAMES.get(found[2])
        return stored if short is None else f"block.{int(found[1])}.{short}"
    return _WHOLE_NAMES.get(stored, stored)


class SafetensorsCheckpoint:
    """A Checkpoint (see models.formats.contents) in a folder."""

    def __init__(
        self, path: Path, settings: HfConfig, stored: dict[str, tuple[SafetensorsFile, str]], cache: Path | None
    ) -> None:
        self.path = path
        self.config = llama_config(path / "config.json", settings)
        self._settings = settings
        self._stored = stored
        self._cache = cache

    @classmethod
    def open(cls, folder: Path, only: str | None, cache: Path | None) -> SafetensorsCheckpoint:
        """Open a folder; with `only`, take the weights from that file of it."""
        settings = read_config(folder / "config.json")
        stored: dict[str, tuple[SafetensorsFile, str]] = {}
        for shard in [only] if only else _shards(folder):
            file = open_safetensors(folder / shard)
            for name in file.tensors:
                if name.endswith(_NO_WEIGHT):
                    continue
                canonical = canonical_name(name)
                if canonical in stored:
                    raise CorruptData(f"{folder}: tensor {name!r} in two files")
                stored[canonical] = (file, name)
        checkpoint = cls(folder, settings, stored, cache)
        found = {name: file.tensors[at].shape for name, (file, at) in stored.items()}
        check_tensors(folder, checkpoint.config, found)
        return checkpoint

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def licence(self) -> str | None:
        return None

    @cached_property
    def digest(self) -> str:
        """Over the digests of config.json, tokenizer.json and the weight files, by name."""
        names = {"config.json"} | {file.path.name for file, _ in self._stored.values()}
        if (self.path / "tokenizer.json").exists():
            names.add("tokenizer.json")
        lines = (f"{file_digest(self.path / name, self._cache)}  {name}\n" for name in sorted(names))
        return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"

    @cached_property
    def tokenizer_data(self) -> TokenizerJson | None:
        text = _optional(self.path / "tokenizer.json")
        return None if text is None else TokenizerJson(text=_utf8(self.path / "tokenizer.json", text))

    @cached_property
    def chat_template(self) -> str | None:
        beside = self.path / "chat_template.jinja"
        text = _optional(beside)
        if text is not None:
            return _utf8(beside, text)
        template = self._tokenizer_config.chat_template
        if isinstance(template, list):
            named = {one.name: one.template for one in template}
            return named.get("default")
        return template

    @property
    def bos_id(self) -> int | None:
        return self._token(self._tokenizer_config.bos_token, self._settings.bos_token_id)

    @property
    def eos_id(self) -> int | None:
        told = self._settings.eos_token_id
        return self._token(self._tokenizer_config.eos_token, _first(told))

    def _token(self, text: str | _Content | None, otherwise: int | None) -> int | None:
        """The tokenizer's own word for a token, as an id; else what config.json says."""
        wanted = text.content if isinstance(text, _Content) else text
        return next((token.id for token in self._added if token.content == wanted), otherwise)

    @cached_property
    def _added(self) -> list[_AddedToken]:
        return _read(self.path / "tokenizer.json", _TokenizerFile, _TokenizerFile()).added_tokens

    @cached_property
    def _tokenizer_config(self) -> _TokenizerConfig:
        return _read(self.path / "tokenizer_config.json", _TokenizerConfig, _TokenizerConfig())

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        stops: set[int] = set()
        for told in (
            self._settings.eos_token_id,
            _read(self.path / "generation_config.json", _Generation, _Generation()).eos_token_id,
        ):
            stops |= set(told) if isinstance(told, list) else set() if told is None else {told}
        return frozenset(stops | {token.id for token in self._added if token.content in STOP_TOKENS})

    def has(self, name: str) -> bool:
        return name in self._stored and not (name == "head" and self.config.tied_embeddings)

    def tensor(self, name: str) -> Floats:
        if not self.has(name):
            raise KeyError(name)
        file, stored = self._stored[name]
        return file.float32(stored)

    def raw(self, name: str) -> RawTensor | None:
        if not self.has(name):
            raise KeyError(name)
        return None


def _shards(folder: Path) -> list[str]:
    """Names of the weight files of a folder."""
    index = folder / INDEX
    if index.exists():
        names = sorted(set(decode(index, bounded(index), _Index).weight_map.values()))
        for name in names:
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise CorruptData(f"{index}: {name!r} is no name of a file beside it")
        return names
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    if len(names) == 1:
        return names
    raise UsageError(
        f"{folder}: {len(names)} .safetensors files and neither model.safetensors nor {INDEX}",
        try_="a folder with the weights of one model, or the path of one .safetensors file",
    )


def _read(path: Path, kind: type[T], default: T) -> T:
    content = _optional(path)
    return default if content is None else decode(path, content, kind)


def _optional(path: Path) -> bytes | None:
    return bounded(path) if path.exists() else None


def _utf8(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CorruptData(f"{path}: not UTF-8 text") from error


def _first(told: int | list[int] | None) -> int | None:
    if isinstance(told, list):
        return told[0] if told else None
    return told
