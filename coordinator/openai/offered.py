"""Which models a request may name, as OpenAI's clients list them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coordinator.journal import DeploymentRecord
from coordinator.shelf import canonical
from models.cache import models_dir
from models.catalog import HUB_PREFIX, entries, find, is_cached, resolve

Json = dict[str, Any]


def offered(records: Iterable[DeploymentRecord], cache: Path) -> list[Json]:
    """What is in force, then what is in the cache. A path is served too, and listed once it is in force."""
    found = {record.request.model: Path(record.checkpoint) for record in records}
    for name in [*(entry.name for entry in entries() if is_cached(entry, cache)), *_from_hub(cache)]:
        found.setdefault(name, resolve(name, cache))
    return [_row(name, path) for name, path in found.items()]


def offered_as(name: str, records: Iterable[DeploymentRecord], cache: Path) -> Json:
    """The model of this name, alias or path; raise UnknownModel."""
    model = canonical(name)
    for record in records:
        if record.request.model == model:
            return _row(model, Path(record.checkpoint))
    return _row(model, resolve(model, cache))


def _from_hub(cache: Path) -> list[str]:
    folder = models_dir(cache) / "hf"
    names = []
    for revision in sorted(folder.glob("*/*")) if folder.is_dir() else ():
        owner, _, name = revision.parent.name.partition("--")
        if name and revision.is_dir() and not revision.name.startswith("."):
            names.append(f"{HUB_PREFIX}{owner}/{name}" + ("" if revision.name == "main" else f"@{revision.name}"))
    return names


def _row(name: str, path: Path) -> Json:
    """`created` is when the checkpoint's file was; 0 if it is gone (what is packed of it still serves)."""
    entry = find(name)
    owner = entry.package if entry else "local"
    if name.startswith(HUB_PREFIX):
        owner = name.removeprefix(HUB_PREFIX).partition("/")[0]
    try:
        created = int(path.stat().st_mtime)
    except OSError:
        created = 0
    return {"id": name, "object": "model", "created": created, "owned_by": owner}
