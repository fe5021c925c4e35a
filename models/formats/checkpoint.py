"""The door to checkpoints: a path in, a `Checkpoint` out, whatever the format."""

from __future__ import annotations

from pathlib import Path

from models.formats.contents import (
    Checkpoint,
    GgufVocabulary,
    RawTensor,
    TokenizerData,
    TokenizerJson,
)
from models.formats.gguf_checkpoint import GgufCheckpoint
from models.formats.hf_checkpoint import SafetensorsCheckpoint
from wire.errors import UsageError

__all__ = ["Checkpoint", "GgufVocabulary", "RawTensor", "TokenizerData", "TokenizerJson", "open_checkpoint"]


def open_checkpoint(path: Path, cache: Path | None = None) -> Checkpoint:
    """Open a .gguf file, a .safetensors file beside its config.json, or a folder with config.json and safetensors.

    `cache` is where digests of big files are remembered; None hashes every time. Raises UsageError (not there, or not
    a checkpoint), CorruptData (damaged), Refused (not supported, said by name).
    """
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder", try_="edgelam model list")
    if path.is_dir():
        return SafetensorsCheckpoint.open(path, None, cache)
    if path.suffix == ".gguf":
        return GgufCheckpoint.open(path, cache)
    if path.suffix == ".safetensors":
        return SafetensorsCheckpoint.open(path.parent, path.name, cache)
    raise UsageError(
        f"{path}: not a checkpoint by its name",
        try_="a .gguf file, a .safetensors file, or a folder with config.json and .safetensors files",
    )
