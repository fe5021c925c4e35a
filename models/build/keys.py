"""Profile keys: modules with equal keys cost equal time on one device."""

from __future__ import annotations

from models.families.config import LlamaConfig
from models.graph import ModuleKind


def profile_key(config: LlamaConfig, kind: ModuleKind, precision: str, wire_dtype: str) -> str:
    """Give 'block/h576-f1536-q9-kv3-d64/int4/f16': all that decides the work of one module, and nothing else.

    Position in the model, names and values of weights don't; models of one size share their measurements.
    """
    if kind == "block":
        sizes = f"h{config.hidden}-f{config.ffn}-q{config.heads}-kv{config.kv_heads}-d{config.head_dim}"
        traits = (("interleaved", config.rope_interleaved), ("bias", config.qkv_bias), ("qknorm", config.qk_norm))
        sizes += "".join(f"-{name}" for name, has in traits if has)
    else:
        sizes = f"h{config.hidden}-v{config.vocabulary}"
    return f"{kind}/{sizes}/{precision}/{wire_dtype}"
