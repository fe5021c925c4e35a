"""Adapters that answers may have: what people call them, and the copies that deployments are made with."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from coordinator.journal import DeployRequest
from models.lora.adapter import HEAD_FILE
from models.lora.serving import CONFIG, PROVENANCE, TENSORS, is_kept, keep
from wire.errors import UsageError
from wire.ids import is_name
from wire.limits import ADAPTER_ID

MOST_KNOWN: Final = 256
"""Names whose files need not be read again while nobody has written them."""


class _Known(NamedTuple):
    state: tuple[tuple[str, int, int], ...]
    adapter: str


class AdapterShelf:
    """`jobs` is the folder with one folder for each job; `cache` is where copies are kept."""

    def __init__(self, jobs: Path, cache: Path) -> None:
        self._jobs = jobs
        self._cache = cache
        self._known: dict[str, _Known] = {}
        """By what people call them."""
        self.superseded: set[str] = set()
        """Adapters in whose places later ones of the same name came."""
        self._lock = threading.Lock()

    async def find(self, text: str) -> str:
        """The id of an adapter: of a job by its name, as it is now; of a folder in PEFT's layout; of a copy by its id.
        Raises UsageError, Refused, OSError."""
        return await asyncio.to_thread(self._find_alone, text)

    def _find_alone(self, text: str) -> str:
        with self._lock:
            return self._find(text)

    def _find(self, text: str) -> str:
        if re.fullmatch(ADAPTER_ID, text) and is_kept(text, self._cache):
            return text
        folder = self._folder(text)
        known, state = self._known.get(text), _state_of(folder)
        if known is not None and known.state == state and is_kept(known.adapter, self._cache):
            self.superseded.discard(known.adapter)
            return known.adapter
        adapter = keep(folder, self._cache)
        if known is not None and known.adapter != adapter:
            self.superseded.add(known.adapter)
        self.superseded.discard(adapter)
        self._known[text] = _Known(state, adapter)
        while len(self._known) > MOST_KNOWN:
            del self._known[next(iter(self._known))]
        return adapter

    def _folder(self, text: str) -> Path:
        if is_name(text) and (self._jobs / text).is_dir():
            if not any((self._jobs / text / name).is_file() for name in (CONFIG, HEAD_FILE)):
                raise UsageError(f"job {text} has no adapter yet: no round is over", try_=f"edgelam tune status {text}")
            return self._jobs / text
        if _is_folder(text):
            return Path(text)
        raise UsageError(
            f"no adapter {text!r}: no job of that name, and no folder",
            try_="a job (edgelam tune status), or a folder in PEFT's layout",
        )


def _state_of(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when a file of an adapter does."""
    found = []
    for name in (CONFIG, TENSORS, PROVENANCE, HEAD_FILE):
        with contextlib.suppress(OSError):
            told = (folder / name).stat()
            found.append((name, told.st_mtime_ns, told.st_size))
    return tuple(found)


def _is_folder(text: str) -> bool:
    try:
        return "\0" not in text and Path(text).is_dir()
    except OSError:  # too long for a path
        return False


def answers(record: DeployRequest, request: DeployRequest) -> bool:
    """Whether what was deployed for one request answers another: the same, with all adapters of that."""
    return alike(record, request) and set(request.adapters) <= set(record.adapters)


def alike(one: DeployRequest, other: DeployRequest) -> bool:
    """Whether two requests differ in their adapters at most."""
    return msgspec.structs.replace(one, adapters=()) == msgspec.structs.replace(other, adapters=())
