"""Where this user's files live: fetched models, digests of big files.

Everything in the cache can be deleted at any time and is fetched or computed again. Nothing else is written outside
the folders a user names.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

READ_BYTES: Final = 1 << 20
"""One read while hashing: large enough that the read calls don't show, small enough for any board."""


def cache_dir() -> Path:
    """Give $EDGELAM_CACHE, else $XDG_CACHE_HOME/edgelam, else ~/.cache/edgelam. It need not exist."""
    if chosen := os.environ.get("EDGELAM_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "edgelam"
    return Path.home() / ".cache" / "edgelam"


def models_dir(cache: Path) -> Path:
    """Folder of fetched models inside a cache."""
    return cache / "models"


def hash_file(path: Path) -> str:
    """Give 'sha256:<hex>' of a file's content. Reads all of it: seconds for a large model."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


class _Remembered(Struct, frozen=True, kw_only=True):
    path: str
    size_bytes: int
    mtime_ns: int
    inode: int
    digest: str


def remembered_digests(cache: Path) -> list[tuple[str, str]]:
    """Give (digest, path) of every file whose digest is remembered; the file may be gone or another by now."""
    found = []
    for note in (cache / "digests").glob("*.json"):
        try:
            known = msgspec.json.decode(note.read_bytes(), type=_Remembered)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue  # damaged: it says nothing
        found.append((known.digest, known.path))
    return found


def file_digest(path: Path, cache: Path | None) -> str:
    """Give 'sha256:<hex>' of a file's content, remembered in `cache` until path, size, mtime or inode change."""
    if cache is None:
        return hash_file(path)
    whole = path.resolve()
    state = whole.stat()
    note = cache / "digests" / f"{hashlib.sha256(os.fsencode(whole)).hexdigest()}.json"
    try:
        known = msgspec.json.decode(note.read_bytes(), type=_Remembered)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        known = None  # never written, or damaged: hashing again is the answer to both
    fresh = _Remembered(
        path=str(whole), size_bytes=state.st_size, mtime_ns=state.st_mtime_ns, inode=state.st_ino, digest=""
    )
    if known is not None and msgspec.structs.replace(known, digest="") == fresh:
        return known.digest
    digest = hash_file(whole)
    try:
        write_atomic(note, msgspec.json.encode(msgspec.structs.replace(fresh, digest=digest)))
    except OSError:
        return digest  # a cache that can't be written costs time, nothing else
    return digest


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that others see all of it or nothing; makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
