"""What makes one model of the Llama family differ from another: sizes, rope, norms, biases.

Readers of checkpoints (models.formats) make a `LlamaConfig`; graph builders and engines read it. It holds no path and
no weight, travels as JSON, and can't exist with sizes that contradict each other.
"""

from __future__ import annotations

import math
from typing import Final, Literal

from msgspec import Struct

from wire.errors import CorruptData, Refused

Family = Literal["llama", "mistral", "qwen2", "qwen3"]

# Caps on what a file may claim. Each is well above the largest published model of these families (Llama 3.1 405B:
# 126 blocks, 16384 wide, 53248 in the feed-forward layer, 128 heads, 128256 tokens), and small enough to compute with.
MAX_BLOCKS: Final = 512
MAX_WIDTH: Final = 1 << 20
MAX_HEADS: Final = 1024
MAX_HEAD_DIM: Final = 1024
MAX_VOCABULARY: Final = 1 << 22
MAX_CONTEXT: Final = 1 << 24


class LlamaConfig(Struct, frozen=True, kw_only=True):
    """Pre-norm decoder: RMS norm, rotary positions, grouped-query attention, SwiGLU.

    Raises CorruptData when made (or decoded) with impossible sizes.
    """

    family: Family
    blocks: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    """Rows of q are heads * head_dim, which need not equal `hidden` (Qwen3)."""
    vocabulary: int
    rms_eps: float
    rope_base: float
    rope_interleaved: bool
    """True: dimensions 2j and 2j+1 rotate together (q and k rows as llama.cpp permutes them for arch 'llama').
    False: j and j + head_dim/2 do (Hugging Face files, and Qwen in GGUF)."""
    rope_factors: tuple[float, ...] = ()
    """Empty, or head_dim/2 divisors: pair j turns by position * rope_base**(-2j/head_dim) / rope_factors[j] radians.
    Linear and llama3 rope scaling come as these."""
    qkv_bias: bool = False
    """q, k and v have a bias (Qwen2)."""
    qk_norm: bool = False
    """RMS norm over head_dim on q and on k, before rope (Qwen3)."""
    tied_embeddings: bool = False
    """The head is the embedding matrix."""
    max_context: int = 2048
    """Tokens the model was trained for."""
    sliding_window: int | None = None
    """Tokens an attention row sees, if fewer than all; see `usable_context`."""

    def __post_init__(self) -> None:
        counts = (
            ("blocks", self.blocks, MAX_BLOCKS),
            ("hidden", self.hidden, MAX_WIDTH),
            ("ffn", self.ffn, MAX_WIDTH),
            ("heads", self.heads, MAX_HEADS),
            ("kv_heads", self.kv_heads, MAX_HEADS),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("vocabulary", self.vocabulary, MAX_VOCABULARY),
            ("max_context", self.max_context, MAX_CONTEXT),
        )
        for name, value, most in counts:
            if not 1 <= value <= most:
                raise CorruptData(f"model configuration: {name} is {value}, must be 1 to {most}")
        if self.heads % self.kv_heads:
            raise CorruptData(f"model configuration: {self.heads} heads don't divide by {self.kv_heads} kv_heads")
        if self.head_dim % 2:
            raise CorruptData(f"model configuration: head_dim is {self.head_dim}, rope needs an even one")
        if not 0.0 < self.rms_eps < 1.0:
            raise CorruptData(f"model configuration: rms_eps is {self.rms_eps}, must be above 0 and below 1")
        if not 1.0 < self.rope_base < math.inf:
            raise CorruptData(f"model configuration: rope_base is {self.rope_base}, must be finite and above 1")
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise CorruptData(
                f"model configuration: {len(self.rope_factors)} rope factors, head_dim needs {self.head_dim // 2}"
            )
        if not all(0.0 < factor < math.inf for factor in self.rope_factors):
            raise CorruptData("model configuration: a rope factor is not finite and above 0")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise CorruptData(f"model configuration: sliding_window is {self.sliding_window}")

    @property
    def q_width(self) -> int:
        """Rows of q, columns of o."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Rows of k and of v."""
        return self.kv_heads * self.head_dim

    def rope_frequencies(self) -> tuple[float, ...]:
        """Radians per position for each of the head_dim/2 pairs, in double precision."""
        plain = (self.rope_base ** (-2 * pair / self.head_dim) for pair in range(self.head_dim // 2))
        if not self.rope_factors:
            return tuple(plain)
        return tuple(frequency / factor for frequency, factor in zip(plain, self.rope_factors, strict=True))

    @property
    def usable_context(self) -> int:
        """Tokens we may run: up to the sliding window, in which windowed and full attention are the same."""
        if self.sliding_window is None:
            return self.max_context
        return min(self.max_context, self.sliding_window)

    def check_context(self, context_tokens: int) -> None:
        """Raise Refused, with the reason, if a context of `context_tokens` is more than the model does (with us)."""
        if context_tokens <= self.usable_context:
            return
        if context_tokens <= self.max_context:
            raise Refused(
                f"context of {context_tokens} tokens: this model attends in a sliding window of {self.sliding_window} "
                f"tokens, which is not supported beyond the window",
                try_=f"a context of {self.usable_context} tokens or less",
            )
        raise Refused(
            f"context of {context_tokens} tokens: the model was trained for {self.max_context}",
            try_=f"a context of {self.usable_context} tokens or less",
        )


def block_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Give the tensors of one block by short name ('q', 'ffn_norm') with their shapes; matrices are [out, in]."""
    hidden, ffn, q_width, kv_width = config.hidden, config.ffn, config.q_width, config.kv_width
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (hidden,),
        "q": (q_width, hidden),
        "k": (kv_width, hidden),
        "v": (kv_width, hidden),
        "o": (hidden, q_width),
        "ffn_norm": (hidden,),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
    }
    if config.qkv_bias:
        shapes |= {"q_bias": (q_width,), "k_bias": (kv_width,), "v_bias": (kv_width,)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    return shapes


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Give every tensor that a checkpoint of this configuration has: canonical name -> shape.

    'embedding' [vocabulary, hidden], 'block.{i}.' + the names of `block_shapes`, 'final_norm' [hidden], and 'head'
    [vocabulary, hidden] unless tied.
    """
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocabulary, config.hidden)}
    of_block = block_shapes(config)
    for index in range(config.blocks):
        shapes |= {f"block.{index}.{name}": shape for name, shape in of_block.items()}
    shapes["final_norm"] = (config.hidden,)
    if not config.tied_embeddings:
        shapes["head"] = (config.vocabulary, config.hidden)
    return shapes


def matrix_size(config: LlamaConfig, matrix: str) -> tuple[int, int]:
    """Give (out, in) of a product of a block, 'embedding' or 'head'; q, k and v are one product 'qkv'."""
    sizes = {
        "qkv": (config.q_width + 2 * config.kv_width, config.hidden),
        "o": (config.hidden, config.q_width),
        "gate": (config.ffn, config.hidden),
        "up": (config.ffn, config.hidden),
        "down": (config.hidden, config.ffn),
        "embedding": (config.vocabulary, config.hidden),
        "head": (config.vocabulary, config.hidden),
    }
    return sizes[matrix]
