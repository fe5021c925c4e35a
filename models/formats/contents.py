"""What a checkpoint holds, whatever its file format: sizes, tensors under canonical names, a tokenizer's data.

Canonical names are those of `models.families.config.tensor_shapes`; matrices are [out, in].
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from models.families.config import LlamaConfig, tensor_shapes
from wire.errors import CorruptData, Refused

Floats = npt.NDArray[np.float32]

STOP_TOKENS: Final = frozenset(
    {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>", "<|end|>", "</s>"}
)
"""Special tokens that end an answer in the chat formats of these families. Checkpoints often name but one of theirs."""


class RawTensor(Struct, frozen=True, kw_only=True):
    """A tensor as its file stores it, so that a quantised one can be carried on bit by bit."""

    format: str
    """ggml name: 'Q8_0', 'Q4_1', 'F32' .."""
    shape: tuple[int, ...]
    rows: npt.NDArray[np.uint8]
    """[rows, bytes of a row], a read-only view."""


class GgufVocabulary(Struct, frozen=True, kw_only=True):
    """The tokenizer data of a GGUF file; the lists have one entry per token."""

    model: str
    """'gpt2' (byte-level BPE with merges) or 'llama' (SentencePiece BPE with scores)."""
    pre: str
    """Pre-tokenizer by llama.cpp's name: 'smollm', 'qwen2' .."""
    tokens: list[str]
    types: list[int]
    """1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte."""
    scores: list[float]
    merges: list[str]
    """'left right' by rank."""
    add_bos: bool
    add_space_prefix: bool
    unknown_id: int | None


class TokenizerJson(Struct, frozen=True, kw_only=True):
    """The text of a tokenizer.json file (the `tokenizers` library's own format)."""

    text: str


TokenizerData = GgufVocabulary | TokenizerJson


class Checkpoint(Protocol):
    """An open checkpoint. Files are mapped: a tensor costs memory when asked for, not before."""

    @property
    def path(self) -> Path: ...

    @property
    def name(self) -> str:
        """For people; not unique."""

    @property
    def licence(self) -> str | None:
        """As the checkpoint says; None when it doesn't."""

    @property
    def digest(self) -> str:
        """'sha256:<hex>' over content. Read from the cache, or computed at the first use (seconds per GB)."""

    @property
    def config(self) -> LlamaConfig: ...

    @property
    def tokenizer_data(self) -> TokenizerData | None: ...

    @property
    def chat_template(self) -> str | None:
        """Jinja source."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None:
        """The token that chat templates mean by eos_token."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""

    def has(self, name: str) -> bool: ...

    def tensor(self, name: str) -> Floats:
        """Give a tensor as float32, [out, in] for matrices. Raises KeyError for a name that `has` denies."""

    def raw(self, name: str) -> RawTensor | None:
        """Give a tensor's stored blocks, or None if the format has none (safetensors)."""


def check_tensors(path: Path, config: LlamaConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Compare what a checkpoint has (canonical name -> shape) with what its configuration needs.

    Raises CorruptData for a missing tensor or a wrong shape, Refused for a tensor that this family doesn't have: to
    leave it out silently would give a model that answers, wrongly.
    """
    needed = tensor_shapes(config)
    for name, shape in needed.items():
        if name not in found:
            raise CorruptData(f"{path}: tensor {name} is missing", try_="fetch or convert the checkpoint again")
        if found[name] != shape:
            raise CorruptData(f"{path}: tensor {name} has shape {list(found[name])}, the sizes say {list(shape)}")
    for name in found:
        if name not in needed and not (name == "head" and config.tied_embeddings):
            raise Refused(f"{path}: tensor {name} is not part of a {config.family} model as it is supported here")
