"""Engines that were built on this board, kept on its disk: building takes minutes, loading seconds.

A file's name is the digest of all that it depends on: board, version of the builder, graph, weights, shapes. It begins
with the digest of its content: what a crash or a full disk left is found out before anybody loads it, since a builder's
own reader may crash on it. The folder holds at most so many bytes; what was used longest ago goes first.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from models.cache import write_atomic
from models.engine.base import EngineFailed

LOG = logging.getLogger("edgelam.engines")

FORMAT: Final = "edgelam.built/1"
LOOK_AGAIN_S: Final = 2.0
_HEAD: Final = FORMAT.encode() + b"\n"

MOST_BYTES: Final = 8 * 1024**3
"""Of all that is kept: the stages of a few models of a few billion weights."""


class BuiltFrom(Struct, frozen=True, kw_only=True):
    """All that an engine depends on. Equal ones are exchangeable."""

    board: str
    builder: str
    """Name and version."""
    graph: str
    weights: tuple[str, ...]
    """Digests."""
    shapes: str
    format: str = FORMAT

    @property
    def key(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


class BuiltEngines:
    """The engines in a folder, which need not exist."""

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = folder
        self._most_bytes = most_bytes

    def get(self, of: BuiltFrom) -> bytes | None:
        """The engine; None if there is none, or if it is damaged: then it is removed."""
        path = self._path(of)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        digest, content = data[len(_HEAD) : len(_HEAD) + 32], data[len(_HEAD) + 32 :]
        if data.startswith(_HEAD) and content and hashlib.sha256(content).digest() == digest:
            return content
        LOG.warning("%s is damaged: it is removed and built again", path)
        self.forget(of)
        return None

    def put(self, of: BuiltFrom, engine: bytes) -> None:
        """Keep an engine, in one piece or not at all. A disk that is full costs building again, nothing else."""
        try:
            write_atomic(self._path(of), _HEAD + hashlib.sha256(engine).digest() + engine)
            self._prune(keep=self._path(of))
        except OSError as error:
            LOG.warning("the built engine can't be kept in %s: %s", self.folder, error)

    def forget(self, of: BuiltFrom) -> None:
        self._path(of).unlink(missing_ok=True)

    @contextmanager
    def turn(self, say: Callable[[str], None] = lambda _: None) -> Iterator[None]:
        """Wait until nobody else on this board builds: one build alone may take most of its memory. `say` hears now and
        then that we wait: who is silent for long would be taken for hanging."""
        with ExitStack() as held:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context((self.folder / ".building").open("w"))
                while not _locked(lock.fileno()):
                    say("waits for another engine that is built")
                    time.sleep(LOOK_AGAIN_S)
            except OSError as error:
                raise EngineFailed(f"no engine can be built in {self.folder}: {error.strerror}") from error
            yield

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder to build in, on the same disk, for whoever has the turn; what a killed builder left is removed."""
        for left in self.folder.glob(".building-*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".building-", dir=self.folder) as folder:
            yield Path(folder)

    def _path(self, of: BuiltFrom) -> Path:
        return self.folder / f"{of.key}.engine"

    def _prune(self, keep: Path) -> None:
        kept = sorted(self.folder.glob("*.engine"), key=lambda path: path.stat().st_mtime, reverse=True)
        room = self._most_bytes - keep.stat().st_size
        for path in kept:
            if path == keep:
                continue
            room -= path.stat().st_size
            if room < 0:
                path.unlink(missing_ok=True)


def _locked(descriptor: int) -> bool:
    """Take the lock, if nobody has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
