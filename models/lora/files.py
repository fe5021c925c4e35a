"""An adapter as files that others load: PEFT's two, and a task module beside them if there is one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from models.families.bert import BertConfig
from models.formats.safetensors import to_bytes
from models.lora.adapter import HEAD, HEAD_FILE, AdapterSpec, Config, Floats, peft_modules, to_peft
from models.lora.serving import CONFIG, TENSORS


def adapter_files(
    config: Config, spec: AdapterSpec, model: str, factors: Mapping[str, Floats], labels: Sequence[str]
) -> dict[str, bytes]:
    """Of factors by name, which are of the model that people call so."""
    return {
        **head_file(factors, labels),
        TENSORS: to_bytes(dict(to_peft(config, factors)), {"format": "pt"}),
        CONFIG: msgspec.json.format(msgspec.json.encode(peft_settings(config, spec, model))),
    }


def peft_settings(config: Config, spec: AdapterSpec, model: str) -> dict[str, Any]:
    """adapter_config.json."""
    return {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION" if isinstance(config, BertConfig) else "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **peft_modules(config, spec),
    }


def head_file(factors: Mapping[str, Floats], labels: Sequence[str], **told: str) -> dict[str, bytes]:
    """The task module's file, with labels and what else is told in its metadata; nothing where there is none."""
    if HEAD not in factors:
        return {}
    parts = {"weight": factors[HEAD][:, :-1].copy(), "bias": factors[HEAD][:, -1].copy()}
    return {HEAD_FILE: to_bytes(parts, {"format": "pt", "labels": msgspec.json.encode(labels).decode(), **told})}
