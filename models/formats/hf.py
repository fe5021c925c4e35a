"""config.json of a Hugging Face folder as a LlamaConfig.

Read as both generations of `transformers` write it: rope_theta and rope_scaling at the top, or both inside
rope_parameters. What would change the arithmetic and is not supported is refused by name, never ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from msgspec import UNSET, Struct, UnsetType

from models.families.config import Family, LlamaConfig
from wire.errors import CorruptData, Refused, UsageError

ARCHITECTURES: Final[dict[str, Family]] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
MAX_JSON_BYTES: Final = 64 * 1024 * 1024
"""tokenizer.json of a 150,000-token vocabulary has 11 MB."""
MISTRAL_WINDOW: Final = 4096
"""What transformers takes for a Mistral whose config.json doesn't mention the sliding window."""
QWEN3_HEAD_DIM: Final = 128
"""What transformers takes for a Qwen3 whose config.json doesn't mention head_dim."""

T = TypeVar("T")


class _Rope(Struct, frozen=True):
    """rope_scaling or rope_parameters; `type` is the older spelling of `rope_type`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None


class HfConfig(Struct, frozen=True):
    """The keys of config.json that we act on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    architectures: list[str] | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_scaling: _Rope | None = None
    rope_parameters: _Rope | None = None
    partial_rotary_factor: float | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    sliding_window: int | UnsetType | None = UNSET
    use_sliding_window: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    quantization_config: dict[str, object] | None = None


class _Architectures(Struct, frozen=True):
    architectures: list[str] | None = None


def read_config(path: Path) -> HfConfig:
    """Read config.json; the architecture first, because other architectures have other keys."""
    if not path.exists():
        raise UsageError(
            f"{path}: no such file", try_="a folder with config.json, tokenizer.json and .safetensors files"
        )
    content = bounded(path)
    _family(path, decode(path, content, _Architectures).architectures)
    return decode(path, content, HfConfig)


def llama_config(path: Path, settings: HfConfig) -> LlamaConfig:
    """Turn the keys of `path` (for messages) into a LlamaConfig. Raises Refused for what would be ignored."""
    family = _family(path, settings.architectures)
    wants = {
        f"hidden_act {settings.hidden_act!r}": settings.hidden_act != "silu",
        "attention_bias": settings.attention_bias and family != "qwen2",
        "mlp_bias": settings.mlp_bias,
        f"partial_rotary_factor {settings.partial_rotary_factor}": settings.partial_rotary_factor not in (None, 1.0),
        "quantised weights (quantization_config)": settings.quantization_config is not None,
    }
    for what, present in wants.items():
        if present:
            raise Refused(f"{path}: {what} is not supported")
    heads = settings.num_attention_heads
    head_dim = settings.head_dim
    if head_dim is None:
        head_dim = QWEN3_HEAD_DIM if family == "qwen3" else settings.hidden_size // heads if heads > 0 else 0
    rope = settings.rope_parameters or settings.rope_scaling or _Rope()
    rope_base = rope.rope_theta or settings.rope_theta or 10_000.0
    return LlamaConfig(
        family=family,
        blocks=settings.num_hidden_layers,
        hidden=settings.hidden_size,
        ffn=settings.intermediate_size,
        heads=heads,
        kv_heads=heads if settings.num_key_value_heads is None else settings.num_key_value_heads,
        head_dim=head_dim,
        vocabulary=settings.vocab_size,
        rms_eps=settings.rms_norm_eps,
        rope_base=rope_base,
        rope_interleaved=False,
        rope_factors=_rope_factors(path, rope, rope_base, head_dim),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=settings.tie_word_embeddings,
        max_context=settings.max_position_embeddings,
        sliding_window=_sliding_window(family, settings),
    )


def _family(path: Path, architectures: list[str] | None) -> Family:
    name = architectures[0] if architectures else "none named"
    family = ARCHITECTURES.get(name)
    if family is None:
        raise Refused(
            f"{path}: architecture {name!r} is not supported ({', '.join(ARCHITECTURES)} are)",
            try_="a model of the Llama, SmolLM, Mistral, Qwen2 or Qwen3 family",
        )
    return family


def _sliding_window(family: Family, settings: HfConfig) -> int | None:
    if family == "llama" or (family in ("qwen2", "qwen3") and not settings.use_sliding_window):
        return None
    if settings.sliding_window is UNSET:
        return MISTRAL_WINDOW
    return settings.sliding_window


def _rope_factors(path: Path, rope: _Rope, rope_base: float, head_dim: int) -> tuple[float, ...]:
    kind = rope.rope_type or rope.type or "default"
    if kind == "default":
        return ()
    if kind not in ("linear", "llama3"):
        raise Refused(f"{path}: rope scaling {kind!r} is not supported (linear and llama3 are)")
    if rope.factor is None:
        raise CorruptData(f"{path}: rope scaling {kind!r} without its factor")
    if kind == "linear":
        return (rope.factor,) * (head_dim // 2)
    low, high, trained = rope.low_freq_factor, rope.high_freq_factor, rope.original_max_position_embeddings
    if low is None or high is None or not trained or not 0 < low < high or not 0 < rope.factor < math.inf:
        raise CorruptData(f"{path}: llama3 rope scaling without factors that make sense")
    return tuple(
        _llama3_factor(rope.factor, low, high, trained * rope_base ** (-2 * pair / head_dim) / (2 * math.pi))
        for pair in range(head_dim // 2)
    )


def _llama3_factor(factor: float, low: float, high: float, turns: float) -> float:
    """Divisor of a frequency that made `turns` turns over the trained context: slow pairs stretch by `factor`, fast
    ones not at all, those between `low` and `high` turns by a mix of both frequencies (Llama 3.1)."""
    if turns > high:
        return 1.0
    if turns < low:
        return factor
    mix = (turns - low) / (high - low)
    return 1.0 / ((1.0 - mix) / factor + mix)


def bounded(path: Path) -> bytes:
    """Read a JSON file, up to MAX_JSON_BYTES."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CorruptData(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    return path.read_bytes()


def decode(path: Path, content: bytes, kind: type[T]) -> T:
    """Decode JSON as `kind`; raise CorruptData with the file's name."""
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptData(f"{path}: {error}") from error
