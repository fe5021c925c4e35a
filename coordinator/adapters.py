"""Adapters that answers may have: what people call them, and the copies that deployments are made with."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import msgspec

from coordinator.journal import DeployRequest
from models.lora.serving import CONFIG, is_kept, keep
from wire.errors import UsageError
from wire.ids import is_name
from wire.limits import ADAPTER_ID, MAX_ADAPTERS


class AdapterShelf:
    """`jobs` is the folder with one folder for each job; `cache` is where copies are kept."""

    def __init__(self, jobs: Path, cache: Path) -> None:
        self._jobs = jobs
        self._cache = cache

    async def find(self, text: str) -> str:
        """The id of an adapter: of a job by its name, as it is now; of a folder in PEFT's layout; of a copy by its id.
        Raises UsageError, Refused, OSError."""
        return await asyncio.to_thread(self._find, text)

    def _find(self, text: str) -> str:
        if re.match(ADAPTER_ID, text) and is_kept(text, self._cache):
            return text
        if is_name(text) and (self._jobs / text).is_dir():
            if not (self._jobs / text / CONFIG).is_file():
                raise UsageError(f"job {text} has no adapter yet: no round is over", try_=f"edgelam tune status {text}")
            return keep(self._jobs / text, self._cache)
        if _is_folder(text):
            return keep(Path(text), self._cache)
        raise UsageError(
            f"no adapter {text!r}: no job of that name, and no folder",
            try_="a job (edgelam tune status), or a folder in PEFT's layout",
        )


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


def joined(before: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """What was deployed and what is wanted, the latter last; of too many the earliest are left out."""
    kept = tuple(adapter for adapter in before if adapter not in wanted)
    return (*kept[max(0, len(kept) + len(wanted) - MAX_ADAPTERS) :], *wanted)
