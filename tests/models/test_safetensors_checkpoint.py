"""Hugging Face folders: sizes, tensors and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from models.families.config import LlamaConfig
from models.formats.checkpoint import open_checkpoint
from tests.models.tiny import hf_settings, random_tensors, tiny_config, write_gguf, write_hf
from wire.errors import CorruptData, Refused, UsageError


def _changed(tmp_path: Path, **changes: Any) -> Path:
    """Give a tiny Llama folder with other settings in config.json; None removes a key."""
    config = tiny_config()
    folder = write_hf(tmp_path / "model", config, random_tensors(config))
    told = {key: value for key, value in {**hf_settings(config), **changes}.items() if value != "removed"}
    (folder / "config.json").write_text(json.dumps(told))
    return folder


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(("tied", "shards"), [(True, 1), (False, 3)])
def test_a_folder_gives_its_sizes_and_tensors(tmp_path: Path, family: Any, tied: bool, shards: int) -> None:
    config = tiny_config(family, tied_embeddings=tied)
    tensors = random_tensors(config)
    checkpoint = open_checkpoint(write_hf(tmp_path / "model", config, tensors, shards))
    assert checkpoint.config == config
    for name, expected in tensors.items():
        np.testing.assert_array_equal(checkpoint.tensor(name), expected, err_msg=name)
        assert checkpoint.raw(name) is None
    assert (checkpoint.bos_id, checkpoint.eos_id, checkpoint.stop_ids) == (1, 2, {0, 2})
    assert checkpoint.chat_template is not None
    assert checkpoint.has("head") is not tied


def test_one_file_of_a_folder_can_be_named(tmp_path: Path) -> None:
    config = tiny_config()
    folder = write_hf(tmp_path, config, random_tensors(config))
    assert open_checkpoint(folder / "model.safetensors").config == config


def test_both_formats_describe_the_same_model_but_for_the_rope_layout(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    ours = open_checkpoint(write_gguf(tmp_path / "a.gguf", config, tensors)).config
    theirs = open_checkpoint(write_hf(tmp_path / "model", config, tensors)).config
    assert (ours.rope_interleaved, theirs.rope_interleaved) == (True, False)
    assert msgspec.structs.replace(ours, rope_interleaved=False, rms_eps=theirs.rms_eps) == theirs


def test_the_digest_follows_every_file_that_matters(tmp_path: Path) -> None:
    folder = _changed(tmp_path)
    digests = {open_checkpoint(folder).digest}
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text((folder / name).read_text() + "\n")
        digests.add(open_checkpoint(folder).digest)
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": []}, "none named"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
    ],
)
def test_what_would_change_the_arithmetic_is_refused_by_name(tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(Refused, match=says):
        open_checkpoint(_changed(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": "removed"}, "hidden_size"),
        ({"hidden_size": "64"}, "Expected `int`"),
        ({"num_attention_heads": 0}, "heads"),
        ({"num_key_value_heads": 3}, "divide"),
        ({"num_hidden_layers": 1 << 40}, "blocks"),
        ({"num_hidden_layers": 5}, r"block\.4\..* is missing"),
        ({"vocab_size": 321}, "embedding has shape"),
        ({"head_dim": 15}, "even"),
        ({"rms_norm_eps": 0.0}, "rms_eps"),
        ({"rope_theta": -1.0}, "rope_base"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
    ],
)
def test_sizes_that_contradict_are_damage(tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(CorruptData, match=says):
        open_checkpoint(_changed(tmp_path, **changes))


def test_a_null_where_transformers_writes_one_is_no_setting(tmp_path: Path) -> None:
    changes = {"rope_scaling": None, "quantization_config": None, "head_dim": None, "sliding_window": None}
    assert open_checkpoint(_changed(tmp_path, **changes)).config == tiny_config()


def test_both_generations_of_rope_settings_mean_the_same(tmp_path: Path) -> None:
    old = _changed(tmp_path / "old", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    told = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    new = _changed(tmp_path / "new", rope_theta="removed", rope_parameters=told)
    assert open_checkpoint(old).config == open_checkpoint(new).config
    assert open_checkpoint(old).config.rope_factors == (2.0,) * 8


def test_llama3_scaling_keeps_fast_pairs_and_stretches_slow_ones(tmp_path: Path) -> None:
    told = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config = open_checkpoint(_changed(tmp_path, rope_scaling=told)).config
    plain = tiny_config().rope_frequencies()
    for frequency, before in zip(config.rope_frequencies(), plain, strict=True):
        turns = 64 * before / (2 * math.pi)
        if turns > 4:
            assert frequency == before
        elif turns < 1:
            assert frequency == pytest.approx(before / 8)
        else:
            mix = (turns - 1) / 3
            assert frequency == pytest.approx((1 - mix) * before / 8 + mix * before)
    assert 1.0 in config.rope_factors and 8.0 in config.rope_factors


def test_a_sliding_window_bounds_the_context_and_says_so(tmp_path: Path) -> None:
    config = tiny_config("mistral", sliding_window=64)
    config = open_checkpoint(write_hf(tmp_path, config, random_tensors(config))).config
    assert config.usable_context == 64
    config.check_context(64)
    with pytest.raises(Refused, match="sliding window of 64"):
        config.check_context(65)
    with pytest.raises(Refused, match="trained for 256"):
        config.check_context(257)


def test_qwens_window_counts_only_when_it_is_switched_on(tmp_path: Path) -> None:
    config = tiny_config("qwen2")
    folder = write_hf(tmp_path, config, random_tensors(config))
    for switched, expected in ((False, None), (True, 128)):
        told = {**hf_settings(config), "sliding_window": 128, "use_sliding_window": switched}
        (folder / "config.json").write_text(json.dumps(told))
        assert open_checkpoint(folder).config.sliding_window == expected


def test_an_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    folder = _changed(tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}})
    )
    with pytest.raises(CorruptData, match="no name of a file"):
        open_checkpoint(folder)


def test_a_folder_that_is_no_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"config\.json"):
        open_checkpoint(tmp_path)
    folder = _changed(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"0 \.safetensors files"):
        open_checkpoint(folder)
    (folder / "config.json").write_bytes(b"\xff{")
    with pytest.raises(CorruptData, match=r"config\.json"):
        open_checkpoint(folder)


def test_a_configuration_survives_the_wire() -> None:
    config = tiny_config("qwen3", rope_factors=(1.5,) * 16)
    assert msgspec.json.decode(msgspec.json.encode(config), type=LlamaConfig) == config


def test_a_configuration_from_the_wire_is_checked() -> None:
    told = msgspec.to_builtins(tiny_config())
    with pytest.raises(CorruptData, match="blocks"):
        msgspec.convert({**told, "blocks": -1}, LlamaConfig)
