"""The checkpoint of an encoder of the Bert family: a folder with config.json and model.safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt

from models.families.bert import BertConfig, matrix_sizes
from models.formats.safetensors import SafetensorsFile, open_safetensors
from wire.errors import CorruptData, Refused, UsageError

Floats = npt.NDArray[np.float32]

MAX_CONFIG_BYTES: Final = 1 << 20
PREFIXES: Final = ("", "bert.")
"""Before the names of tensors: checkpoints of the bare encoder have none."""
EMBEDDINGS_NORM: Final = "embeddings.LayerNorm"
BLOCK_NORMS: Final = ("attention.output.LayerNorm", "output.LayerNorm")
HEAD_WEIGHT: Final = "edgelam.head.weight"
HEAD_BIAS: Final = "edgelam.head.bias"
MATRICES: Final = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
"""Short name -> the one in a block of a file."""


def is_bert(folder: Path) -> bool:
    """Whether a folder's config.json says that it holds a Bert model."""
    try:
        return read_bert_config(folder).model_type == "bert"
    except (Refused, CorruptData, UsageError):
        return False


def read_bert_config(folder: Path) -> BertConfig:
    """Raises UsageError (none there), CorruptData, Refused (not supported)."""
    path = folder / "config.json"
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CorruptData(f"{path}: {path.stat().st_size} bytes are no configuration")
        return msgspec.json.decode(path.read_bytes(), type=BertConfig)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", try_="a folder with config.json") from error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptData(f"{path}: {error}") from error


def matrix_name(block: int, matrix: str) -> str:
    """In a file, without its prefix."""
    return f"encoder.layer.{block}.{MATRICES[matrix]}"


class BertFile:
    """The tensors of one encoder by their own names, each checked against the configuration when it is asked for.

    Raises CorruptData for one that is missing or of another shape.
    """

    def __init__(self, config: BertConfig, file: SafetensorsFile) -> None:
        self.config = config
        self._file = file
        self.prefix = next((p for p in PREFIXES if f"{p}embeddings.word_embeddings.weight" in file.tensors), "")

    @staticmethod
    def open(config: BertConfig, path: Path) -> BertFile:
        """Raises what open_safetensors raises."""
        return BertFile(config, open_safetensors(path))

    def words(self) -> Floats:
        """[vocabulary, hidden]."""
        return self.tensor("embeddings.word_embeddings.weight", self.config.vocab_size, self.config.hidden_size)

    def places(self) -> Floats:
        """[positions, hidden] what is added to a word for where it stands, with the one type that there is."""
        config, width = self.config, self.config.hidden_size
        types = self.tensor("embeddings.token_type_embeddings.weight", None, width)
        table = self.tensor("embeddings.position_embeddings.weight", config.max_position_embeddings, width)
        return np.asarray(table + types[0], np.float32)

    def linear(self, block: int, matrix: str) -> tuple[Floats, Floats]:
        """Weight [out, in] and bias [out] of a matrix by its short name."""
        out, columns = matrix_sizes(self.config)[matrix]
        name = matrix_name(block, matrix)
        return self.tensor(f"{name}.weight", out, columns), self.tensor(f"{name}.bias", out)

    def task_module(self) -> tuple[Floats, Floats] | None:
        """Weight [labels, hidden] and bias [labels], where there is one."""
        labels = len(self.config.edgelam_labels)
        if not labels:
            return None
        return self.tensor(HEAD_WEIGHT, labels, self.config.hidden_size), self.tensor(HEAD_BIAS, labels)

    def norm(self, name: str) -> tuple[Floats, Floats]:
        """Weight and bias [hidden]."""
        width = self.config.hidden_size
        return self.tensor(f"{name}.weight", width), self.tensor(f"{name}.bias", width)

    def tensor(self, name: str, *shape: int | None) -> Floats:
        """As float32, of this shape (None: any size)."""
        full = f"{self.prefix}{name}"
        if full not in self._file.tensors:
            raise CorruptData(f"{self._file.path}: no tensor {full!r}")
        values = self._file.float32(full)
        fits = values.ndim == len(shape) and all(
            size >= 1 and wanted in (None, size) for size, wanted in zip(values.shape, shape, strict=True)
        )
        if not fits:
            raise CorruptData(f"{self._file.path}: tensor {full!r} is {list(values.shape)}, {list(shape)} is due")
        return values
