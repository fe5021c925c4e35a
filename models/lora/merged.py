"""A sentence encoder with a trained adapter as a checkpoint of its own: factors put into its weights, its task module
beside them.

    <cache>/adapters/<id>/<model>-<first of id>/    config.json, model.safetensors, tokenizer.json

An encoder's weights are float32, so nothing is rounded away as in packed language models; and with a task module it
gives another answer, so there is no base to share. What comes out is a model like any other that lies in a folder.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from models.cache import file_digest, write_atomic
from models.families.bert import BertConfig
from models.formats import safetensors
from models.formats.bert import HEAD_BIAS, HEAD_WEIGHT, BertFile, matrix_name, read_bert_config
from models.items.pack import pack_folder
from models.lora.adapter import HEAD_FILE
from models.lora.serving import check_base, kept_at, load, weights_in
from wire.errors import CorruptData, Refused
from wire.limits import MAX_LABELS
from wire.messages import Label

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
TOKENIZER_FILE: Final = "tokenizer.json"
_SHOWN: Final = 8
"""Letters of an adapter's id in a name."""


def merged(adapter_id: str, model: str, source: Path, digest: str, cache: Path) -> Path:
    """The folder of an encoder (in `source`, its weights with this digest) with a kept adapter. Raises Refused for an
    adapter that is not one for labels, or of another model; CorruptData; OSError when the cache can't be written."""
    kept = kept_at(adapter_id, cache)
    folder = kept / f"{model}-{adapter_id[:_SHOWN]}"
    if (folder / CONFIG_FILE).is_file():
        return folder
    check_base(kept, digest)
    config = read_bert_config(source)
    weights = weights_in(adapter_id, config, cache)
    labels, weight, bias = _task_module(kept, config)
    file = safetensors.open_safetensors(source / WEIGHTS_FILE)
    tensors: dict[str, Any] = {name: file.view(name) for name in file.tensors}
    bert = BertFile(config, file)
    tensors.update({f"{bert.prefix}{name}": values for name, values in weights.items()})
    if not weights:
        adapter = load(adapter_id, config, cache)
        for name in adapter.factors:
            if name.endswith(".a"):
                _, block, matrix, _ = name.split(".")
                long = f"{bert.prefix}{matrix_name(int(block), matrix)}.weight"
                added = adapter.scale * adapter.factors[f"{name[:-1]}b"] @ adapter.factors[name]
                tensors[long] = bert.linear(int(block), matrix)[0] + added
    tensors[f"{bert.prefix}{HEAD_WEIGHT}"], tensors[f"{bert.prefix}{HEAD_BIAS}"] = weight, bias
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.write(folder / WEIGHTS_FILE, tensors)
    shutil.copyfile(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
    # Last: a folder that has it is whole.
    told = msgspec.structs.replace(config, edgelam_labels=labels)
    write_atomic(folder / CONFIG_FILE, msgspec.json.encode(told))
    return folder


def merged_at(adapter_id: str, cache: Path) -> list[Path]:
    """The folders that were made with an adapter."""
    kept = kept_at(adapter_id, cache)
    return sorted(path.parent for path in kept.glob(f"*/{CONFIG_FILE}"))


def forget(folder: Path, cache: Path) -> None:
    """Remove such a folder, and what was packed from it: both can be made again."""
    with contextlib.suppress(OSError):
        shutil.rmtree(pack_folder(file_digest(folder / WEIGHTS_FILE, cache), cache), ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)


def _task_module(kept: Path, config: BertConfig) -> tuple[tuple[str, ...], Any, Any]:
    """Labels, weight [labels, hidden] and bias [labels]."""
    path = kept / HEAD_FILE
    if not path.is_file():
        raise Refused(f"the adapter has no {HEAD_FILE}: it tells no labels", try_="a job with labels (docs/tuning.md)")
    file = safetensors.open_safetensors(path)
    try:
        labels = msgspec.json.decode(file.metadata["labels"], type=tuple[Label, ...])
        weight, bias = (np.array(file.float32(name), np.float32) for name in ("weight", "bias"))
    except (KeyError, msgspec.MsgspecError) as error:
        raise CorruptData(f"{path}: {error}", try_="the adapter as it was written") from None
    wanted = (len(labels), config.hidden_size)
    if not 2 <= len(labels) <= MAX_LABELS or weight.shape != wanted or bias.shape != wanted[:1]:
        raise Refused(
            f"{path}: a weight of {list(weight.shape)} for {len(labels)} labels, {list(wanted)} is due",
            try_="the model that the adapter was trained for",
        )
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise CorruptData(f"{path}: has values that are no numbers")
    return labels, weight, bias
