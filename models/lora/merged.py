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

from models.cache import file_digest, write_atomic
from models.families.bert import BertConfig
from models.formats import safetensors
from models.formats.bert import HEAD_BIAS, HEAD_WEIGHT, BertFile, matrix_name, read_bert_config
from models.items.pack import pack_folder
from models.lora.adapter import HEAD_FILE
from models.lora.head import read_head
from models.lora.serving import SHOWN, check_base, kept_at, load, weights_in
from wire.errors import Refused

CONFIG_FILE: Final = "config.json"
WEIGHTS_FILE: Final = "model.safetensors"
TOKENIZER_FILE: Final = "tokenizer.json"


def merged(adapter_id: str, model: str, source: Path, digest: str, cache: Path) -> Path:
    """The folder of an encoder (in `source`, its weights with this digest) with a kept adapter. Raises Refused for an
    adapter that is not one for labels, or of another model; CorruptData; OSError when the cache can't be written."""
    kept = kept_at(adapter_id, cache)
    folder = kept / f"{model}-{adapter_id[:SHOWN]}"
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
    """The models that were made with an adapter: folders, and the nets of models.items.pictured."""
    kept = kept_at(adapter_id, cache)
    return sorted([*(path.parent for path in kept.glob(f"*/{CONFIG_FILE}")), *kept.glob("*.onnx")])


def forget(made: Path, cache: Path) -> None:
    """Remove such a model, and what was packed from it: both can be made again."""
    with contextlib.suppress(OSError):
        weights = made if made.suffix == ".onnx" else made / WEIGHTS_FILE
        shutil.rmtree(pack_folder(file_digest(weights, cache), cache), ignore_errors=True)
    if made.suffix == ".onnx":
        made.unlink(missing_ok=True)
    shutil.rmtree(made, ignore_errors=True)


def _task_module(kept: Path, config: BertConfig) -> tuple[tuple[str, ...], Any, Any]:
    """Labels, weight [labels, hidden] and bias [labels]."""
    path = kept / HEAD_FILE
    if not path.is_file():
        raise Refused(f"the adapter has no {HEAD_FILE}: it tells no labels", try_="a job with labels (docs/tuning.md)")
    head = read_head(path)
    if head.weight.shape[1] != config.hidden_size:
        raise Refused(
            f"{path}: a weight of {list(head.weight.shape)}, {config.hidden_size} columns are due",
            try_="the model that the adapter was trained for",
        )
    return head.labels, head.weight, head.bias
