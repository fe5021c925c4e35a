"""The folder of a packed model: a file of weights for each module that has some, and an index that is written last."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from models.cache import write_atomic


class PackedFile(Struct, frozen=True):
    name: str
    digest: str
    size_bytes: int

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}-{self.digest.removeprefix('sha256:')[:16]}.safetensors"


class _Index(Struct, frozen=True):
    files: list[PackedFile]


def known_files(folder: Path, names: Sequence[str]) -> list[PackedFile] | None:
    """Give the files of a finished pack whose files are all there; None if it has to be made."""
    try:
        index = msgspec.json.decode((folder / "index.json").read_bytes(), type=_Index)
        whole = all(file.path(folder).stat().st_size == file.size_bytes for file in index.files)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None  # never packed, cut off, or damaged: packing again is the answer to all of them
    return index.files if whole and [file.name for file in index.files] == list(names) else None


def write_file(folder: Path, name: str, content: bytes) -> PackedFile:
    """Raises OSError when it can't be written."""
    file = PackedFile(name, f"sha256:{hashlib.sha256(content).hexdigest()}", len(content))
    write_atomic(file.path(folder), content)
    return file


def finish(folder: Path, files: Sequence[PackedFile]) -> None:
    """Write the index: from now on the pack is known."""
    write_atomic(folder / "index.json", msgspec.json.encode(_Index(list(files))))
