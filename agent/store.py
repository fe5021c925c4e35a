"""Files known by their content: weights and graphs, fetched once, checked once per boot, never half there.

    <cache>/artifacts/<sha256 in hex>          complete files
    <cache>/artifacts/<sha256 in hex>.part     what has come so far; resumed, also by the next boot

A file counts as present only after its digest was computed in this boot: cards rot, and a power cut leaves holes. The
size limit holds for complete files and parts together; what no stage uses goes first, the longest unused before others.
All methods may be called from any thread; `verify` and `adopt` take the time of reading the file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from agent.records import sync_folder
from wire.errors import CorruptData, Refused
from wire.messages import ArtifactRef
from wire.units import bytes_text

LOG = logging.getLogger("edgelam.store")
READ_BYTES: Final = 1 << 20
SPARE_BYTES: Final = 32 << 20
"""Left free on the disk, so that logs and state can still be written."""


def _free_bytes(folder: Path) -> int:
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize


class StoreFull(Refused):
    """The limit or the disk has no room, even without all that may be removed."""


class Store:
    """`used` gives the digests that stages use or are about to; they are never evicted."""

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        used: Callable[[], Collection[str]] = tuple,
        free_bytes: Callable[[Path], int] = _free_bytes,
    ) -> None:
        self.folder = folder / "artifacts"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.limit_bytes = limit_bytes
        self._used = used
        self._free_bytes = free_bytes
        self._verified: set[str] = set()
        self._mutex = threading.Lock()

    def path_of(self, digest: str) -> Path:
        return self.folder / digest.removeprefix("sha256:")

    def part_of(self, digest: str) -> Path:
        return self.path_of(digest).with_suffix(".part")

    @property
    def present(self) -> frozenset[str]:
        """Digests that are stored and were verified in this boot."""
        with self._mutex:
            return frozenset(self._verified)

    @property
    def held_bytes(self) -> int:
        """Bytes of everything stored, parts too."""
        return sum(size for _, _, size in self._files())

    def verify(self, ref: ArtifactRef) -> bool:
        """Read the file, if there is one, and compare its digest; a damaged one is removed."""
        with self._mutex:
            if ref.digest in self._verified:
                return True
        path = self.path_of(ref.digest)
        try:
            with path.open("rb") as file:
                digest = digest_of(file)
        except FileNotFoundError:
            return False
        except OSError as error:
            LOG.warning("%s: %s; it is fetched again", path.name, error)
            path.unlink(missing_ok=True)
            return False
        if digest != ref.digest:
            LOG.warning("%s: the file is damaged; it is fetched again", path.name)
            path.unlink(missing_ok=True)
            return False
        self._mark(ref.digest)
        return True

    def forget(self, digest: str) -> None:
        """Have the file checked again before it is used: a worker could not read it."""
        with self._mutex:
            self._verified.discard(digest)

    def touch(self, digests: Collection[str]) -> None:
        """These are used now: evicted last."""
        for digest in digests:
            try:
                os.utime(self.path_of(digest))
            except OSError:
                self.forget(digest)

    def make_room(self, ref: ArtifactRef) -> None:
        """Evict until `ref` fits beside what is used, counting what has come of it already; raise StoreFull."""
        part = self.part_of(ref.digest)
        had_bytes = part.stat().st_size if part.exists() else 0
        files = sorted(self._files(), key=lambda entry: entry[1])
        needed_bytes = ref.size_bytes - had_bytes
        over_limit = sum(size for _, _, size in files) + needed_bytes - self.limit_bytes
        over_disk = needed_bytes + SPARE_BYTES - self._free_bytes(self.folder)
        used = {self.path_of(digest).name for digest in self._used()} | {part.name, part.stem}
        for path, _, size in files:
            if max(over_limit, over_disk) <= 0:
                return
            if path.name in used or path.stem in used:
                continue
            LOG.info("evicting %s (%s)", path.name, bytes_text(size))
            path.unlink(missing_ok=True)
            self.forget(f"sha256:{path.stem}")
            over_limit -= size
            over_disk -= size
        if over_limit > 0:
            raise StoreFull(
                f"no room for {bytes_text(ref.size_bytes)} in a cache limited to {bytes_text(self.limit_bytes)}",
                try_="a larger --cache-limit, or fewer blocks on this device",
            )
        if over_disk > 0:
            raise StoreFull(
                f"disk of {self.folder} is full: {bytes_text(over_disk)} short of {bytes_text(ref.size_bytes)}",
                try_="free some space, or another --cache-dir",
            )

    def adopt(self, ref: ArtifactRef, digest: str) -> Path:
        """Make the complete part of `ref`, whose content has `digest`, a stored file; raise CorruptData, OSError."""
        part = self.part_of(ref.digest)
        if digest != ref.digest:
            part.unlink(missing_ok=True)
            raise CorruptData(f"artifact {ref.name or ref.digest[:20]}: what came has another digest")
        path = self.path_of(ref.digest)
        part.replace(path)
        sync_folder(self.folder)
        self._mark(ref.digest)
        return path

    def _mark(self, digest: str) -> None:
        with self._mutex:
            self._verified.add(digest)

    def _files(self) -> list[tuple[Path, float, int]]:
        """(path, last use, bytes) of everything stored."""
        found = []
        for path in self.folder.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((path, status.st_mtime, status.st_size))
        return found


def digest_of(file: object) -> str:
    """sha256:<hex> of what is left in an open binary file. Yields between pieces: a heartbeat goes before a check."""
    state = hashlib.sha256()
    while piece := file.read(READ_BYTES):  # type: ignore[attr-defined]
        state.update(piece)
        time.sleep(0)
    return f"sha256:{state.hexdigest()}"
