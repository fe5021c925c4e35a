"""Files that devices fetch by digest: packed modules (in the cache) and stage graphs (in the state folder)."""

from __future__ import annotations

import hashlib
from pathlib import Path

from coordinator.config import write_atomically
from coordinator.journal import Journal
from wire.messages import ArtifactRef


class Artifacts:
    """Digest -> file. Registered in the journal, so that a restarted coordinator still serves what is deployed."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self.folder = folder
        self._journal = journal
        self._files: dict[str, tuple[int, Path]] = {}

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
        return self.add_file(digest, path, name)

    def path_of(self, digest: str) -> Path | None:
        entry = self._files.get(digest)
        return entry[1] if entry and entry[1].is_file() else None
