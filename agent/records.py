"""The small files an agent remembers itself by, all in its state folder, each replaced in one step.

lock            held while an agent runs: one agent per state folder
epoch           highest epoch that was acted upon; older orders are refused, also after a restart
broker          where the coordinator was last seen
profile.json    the last measured profile
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from wire.errors import Refused, UsageError
from wire.limits import MAX_CONTROL_BYTES

LOG = logging.getLogger("edgelam.records")
S = TypeVar("S", bound=Struct)


class LastBroker(Struct, frozen=True, kw_only=True):
    """Where the control connection last was up, and of which site."""

    site: str
    url: str
    http: str = ""


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, on disk: whoever reads sees the old or the new file. Raise OSError."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Records:
    """The state folder of one running agent; raise Refused where another agent runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UsageError(f"state folder {folder}: {error.strerror}", try_="--state-dir DIR") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise Refused(
                f"another agent (process {other}) runs with the state folder {folder}",
                try_="end it, or give this one its own --name and --state-dir",
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        self.epoch = self._read_epoch()

    def close(self) -> None:
        """Let go of the folder. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def advance_epoch(self, epoch: int) -> None:
        """Remember `epoch` before acting upon it. Raise OSError: then nothing may be done."""
        if epoch > self.epoch:
            write_atomically(self.folder / "epoch", f"{epoch}\n".encode())
            self.epoch = epoch

    def save(self, name: str, document: Struct) -> None:
        """Keep a document; a full disk costs only the memory of it."""
        try:
            write_atomically(self.folder / name, msgspec.json.encode(document))
        except OSError as error:
            LOG.warning("%s: not saved: %s", self.folder / name, error.strerror)

    def load(self, name: str, kind: type[S]) -> S | None:
        """Give a document; None if there is none or it can't be read."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                data = file.read(4 * MAX_CONTROL_BYTES)
            return msgspec.json.decode(data, type=kind)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            LOG.warning("%s: set aside, as it can't be read: %s", path, error)
            return None

    def _read_epoch(self) -> int:
        try:
            return max(0, int((self.folder / "epoch").read_text(encoding="ascii")))
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            LOG.warning("%s: can't be read (%s); any epoch is taken", self.folder / "epoch", error)
            return 0
