"""What the cache holds of models, and getting rid of it. Everything here can be fetched or packed again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from models.cache import models_dir, remembered_digests
from wire.errors import UsageError

DIGEST_CHARACTERS = 32
"""Of the checkpoint's digest in the name of a pack (models.build.pack)."""


class Stored(Struct, frozen=True, kw_only=True):
    """A folder of the cache. `name` is its path in the cache, `of` which checkpoint it was packed from ('' if that is
    no longer known, and for checkpoints)."""

    name: str
    kind: str
    """'checkpoint', 'pack' or 'adapter'."""
    of: str
    size_bytes: int


def stored(cache: Path) -> list[Stored]:
    """Give all checkpoints, packs and copies of adapters in a cache, by name."""
    checkpoints = models_dir(cache)
    folders = [path for path in _folders(checkpoints) if path.name != "hf"]
    folders += [revision for repository in _folders(checkpoints / "hf") for revision in _folders(repository)]
    found = [_stored(cache, path, "checkpoint", "") for path in folders]
    files = {digest.removeprefix("sha256:")[:DIGEST_CHARACTERS]: path for digest, path in remembered_digests(cache)}
    for pack in _folders(cache / "packs"):
        digest, _, _ = pack.name.partition("-")
        found.append(_stored(cache, pack, "pack", Path(files[digest]).name if digest in files else ""))
    found += [_stored(cache, path, "adapter", "") for path in _folders(cache / "adapters")]
    return sorted(found, key=lambda entry: entry.name)


def remove(cache: Path, name: str) -> Stored:
    """Remove a folder that `stored` names; raise UsageError for any other name, OSError if it can't be removed.

    It is renamed first: whoever looks meanwhile finds all of it or nothing.
    """
    entry = next((entry for entry in stored(cache) if entry.name == name), None)
    if entry is None:
        raise UsageError(f"{name!r} is not in the cache ({cache})", try_="a name of: edgelam model cache")
    folder = cache / name
    going = folder.with_name(f".{folder.name}.removed")
    if going.exists():
        shutil.rmtree(going)
    folder.rename(going)
    shutil.rmtree(going)
    return entry


def _folders(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())


def _stored(cache: Path, folder: Path, kind: str, of: str) -> Stored:
    size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    return Stored(name=str(folder.relative_to(cache)), kind=kind, of=of, size_bytes=size)
