"""Files that devices fetch by digest: packed modules (in the cache) and stage graphs (in the state folder)."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Collection
from pathlib import Path

from coordinator.config import write_atomically
from coordinator.journal import Journal
from wire.messages import ArtifactRef

LOG = logging.getLogger("edgelam.artifacts")

PRUNE_AFTER_S = 3600.0
"""Far longer than a graph waits for the plan that will refer to it, or a device needs to hear of a new plan."""


class Artifacts:
    """Digest -> file. Registered in the journal, so that a restarted coordinator still serves what is deployed."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder = folder
        self._journal = journal
        self._files: dict[str, tuple[int, Path]] = {}
        self.handed_bytes = 0
        """Bytes of files that were sent to devices."""

    def open(self) -> None:
        self._files = {
            digest: (size, path) for digest, (size, path) in self._journal.artifacts().items() if path.is_file()
        }

    def add_file(self, digest: str, path: Path, name: str) -> ArtifactRef:
        """Register a file that exists; its digest is the packer's word."""
        size = path.stat().st_size
        if self._files.get(digest) != (size, path):
            self._journal.save_artifact(digest, size, path)
            self._files[digest] = (size, path)
        return ArtifactRef(digest=digest, size_bytes=size, name=name)

    def add_bytes(self, data: bytes, name: str) -> ArtifactRef:
        """Store `data` under its digest and register it."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        path = self.folder / digest.removeprefix("sha256:")
        if not path.is_file() or path.stat().st_size != len(data):
            write_atomically(path, data)
        else:
            os.utime(path)  # asked for again: as good as new for `prune`
        return self.add_file(digest, path, name)

    def handed(self, count_bytes: int) -> None:
        """So many bytes of a file went to a device."""
        self.handed_bytes += count_bytes

    def path_of(self, digest: str) -> Path | None:
        entry = self._files.get(digest)
        return entry[1] if entry and entry[1].is_file() else None

    def prune(self, keep: Collection[str], now_unix: float) -> int:
        """Forget what is not in `keep` (digests), and remove its file if it is one of ours; give the bytes removed.

        Files that were written or asked for in the last PRUNE_AFTER_S stay: a device may be fetching them for the plan
        that has just been replaced, or for one that is just being made. Packed modules stay in the cache.
        """
        before_unix = now_unix - PRUNE_AFTER_S
        removed_bytes = 0
        for digest, (_, path) in list(self._files.items()):
            if digest not in keep and not (path.parent == self.folder and _newer(path, before_unix)):
                self._journal.forget_artifact(digest)
                del self._files[digest]
        known = {path for _, path in self._files.values()}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path in known or _newer(path, before_unix):
                continue
            try:
                size = path.stat().st_size
                path.unlink()
            except OSError as error:
                LOG.warning("%s can't be removed: %s", path, error.strerror)
            else:
                removed_bytes += size
        return removed_bytes


def _newer(path: Path, than_unix: float) -> bool:
    try:
        return path.stat().st_mtime > than_unix
    except FileNotFoundError:
        return False
