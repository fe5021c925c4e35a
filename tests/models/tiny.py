"""Tiny random models of the Llama family, as GGUF files and as Hugging Face folders.

One set of random tensors can be written in both formats, and is then the same model: a GGUF of arch 'llama' gets its
q and k rows permuted on the way, as llama.cpp's converter does. The files are written by other people's libraries
(gguf, safetensors, tokenizers), so that our readers don't only agree with ourselves.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from msgspec import structs
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from models.families.config import Family, LlamaConfig, tensor_shapes

Floats = npt.NDArray[np.float32]

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (
    *("Ġ t", "h e", "Ġt he", "i n", "Ġ a", "e r", "o n", "r e", "Ġa n", "Ġan d", "c a", "ca t", "Ġ w", "o r", "Ġw or"),
    *("l d", "Ġwor ld", "H e", "l l", "He ll", "Hell o", "Ġ i", "Ġi s", "o u", "y ou", "s er", "u ser", "u s"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_GGUF_NAMES = {
    **{"attention_norm": "attn_norm.weight", "q": "attn_q.weight", "k": "attn_k.weight", "v": "attn_v.weight"},
    **{"o": "attn_output.weight", "q_bias": "attn_q.bias", "k_bias": "attn_k.bias", "v_bias": "attn_v.bias"},
    **{"q_norm": "attn_q_norm.weight", "k_norm": "attn_k_norm.weight", "ffn_norm": "ffn_norm.weight"},
    **{"gate": "ffn_gate.weight", "up": "ffn_up.weight", "down": "ffn_down.weight"},
}
_HF_NAMES = {
    **{"attention_norm": "input_layernorm.weight", "ffn_norm": "post_attention_layernorm.weight"},
    **{name: f"self_attn.{name}_proj.weight" for name in "qkvo"},
    **{f"{name}_bias": f"self_attn.{name}_proj.bias" for name in "qkv"},
    **{f"{name}_norm": f"self_attn.{name}_norm.weight" for name in "qk"},
    **{name: f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}


def byte_letters() -> list[str]:
    """Give the 256 letters that stand for bytes in a byte-level vocabulary, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def vocabulary_tokens() -> list[str]:
    """Specials, the 256 bytes, what the merges make."""
    made = dict.fromkeys("".join(merge.split()) for merge in MERGES)
    return [*SPECIALS, *byte_letters(), *(token for token in made)]


def tiny_config(family: Family = "llama", **changes: Any) -> LlamaConfig:
    """Give a configuration of 4 blocks and about 200,000 parameters in Hugging Face's rope layout (half-split)."""
    config = LlamaConfig(
        family=family,
        blocks=4,
        hidden=64,
        ffn=96,
        heads=4,
        kv_heads=2,
        head_dim=32 if family == "qwen3" else 16,
        vocabulary=320,
        rms_eps=1e-5,
        rope_base=10_000.0,
        rope_interleaved=False,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        tied_embeddings=True,
        max_context=256,
    )
    return structs.replace(config, **changes)


def random_tensors(config: LlamaConfig, seed: int = 0) -> dict[str, Floats]:
    """Give every tensor by canonical name, scaled so that hidden states neither vanish nor explode."""
    draw = np.random.default_rng(seed)
    tensors: dict[str, Floats] = {}
    for name, shape in tensor_shapes(config).items():
        values = draw.standard_normal(shape, np.float32)
        if name.endswith("norm"):
            tensors[name] = 1 + values * np.float32(0.1)
        elif name.endswith("bias"):
            tensors[name] = values * np.float32(0.1)
        else:
            tensors[name] = values / np.float32(shape[-1] ** 0.5)
    return tensors


def permuted(rows: Floats, heads: int) -> Floats:
    """Reorder q or k rows (or bias) from half-split to interleaved rope: row j + head_dim/2 follows row j."""
    return np.ascontiguousarray(rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2)).reshape(rows.shape)


def write_gguf(path: Path, config: LlamaConfig, tensors: dict[str, Floats], quantised: str = "F32") -> Path:
    """Write a half-split model as GGUF, matrices quantised ('F32', 'F16', 'Q8_0', 'Q4_1', ..), norms in F32."""
    arch = "llama" if config.family in ("llama", "mistral") else config.family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.blocks)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    if config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    _add_vocabulary(writer)
    if config.rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(config.rope_factors, np.float32))
    kind = gguf.GGMLQuantizationType[quantised]
    for name, tensor in tensors.items():
        short = name.rpartition(".")[2]
        if arch == "llama" and short in ("q", "k", "q_bias", "k_bias"):
            tensor = permuted(tensor, config.heads if short.startswith("q") else config.kv_heads)  # noqa: PLW2901
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), tensor)
        else:
            writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """'block.3.q' -> 'blk.3.attn_q.weight'."""
    whole = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "head": "output.weight"}
    if name in whole:
        return whole[name]
    _, index, short = name.split(".")
    return f"blk.{index}.{_GGUF_NAMES[short]}"


def _add_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens = vocabulary_tokens()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def write_hf(folder: Path, config: LlamaConfig, tensors: dict[str, Floats], shards: int = 1) -> Path:
    """Write a half-split model as a Hugging Face folder, float32, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_settings(config)))
    (folder / "tokenizer.json").write_text(tiny_tokenizer().to_str())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": CHAT_TEMPLATE, "bos_token": SPECIALS[1], "eos_token": SPECIALS[2]})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    named = {hf_name(name): np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(named, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = dict(list(named.items())[shard::shards])
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def hf_name(name: str) -> str:
    """'block.3.q' -> 'model.layers.3.self_attn.q_proj.weight'."""
    whole = {"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
    if name in whole:
        return whole[name]
    _, index, short = name.split(".")
    return f"model.layers.{index}.{_HF_NAMES[short]}"


def hf_settings(config: LlamaConfig) -> dict[str, Any]:
    """Give config.json as transformers writes it."""
    return {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.blocks,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied_embeddings,
        "max_position_embeddings": config.max_context,
        "sliding_window": config.sliding_window,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def tiny_tokenizer() -> Tokenizer:
    """Give the tokenizer of both formats, built with the `tokenizers` library."""
    vocabulary = {token: number for number, token in enumerate(vocabulary_tokens())}
    pairs = [(left, right) for left, right in (merge.split() for merge in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer
