"""Which engines are installed, without importing them: an import costs seconds and 100 MB.

Installed is not working: that an engine loads and computes is proved by the worker that measures with it.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

ENGINES: Final[dict[str, tuple[str, ...]]] = {
    "onnxruntime": ("onnxruntime", "onnxruntime_gpu"),
    "torch": ("torch",),
    "tensorrt": ("tensorrt",),
}
"""Engine (its import name) -> names of the distributions that install it, as in <name>-<version>.dist-info."""

RECORDED: Final = "engines.json"
"""Engines of the board that a recorded tree is of."""

_INFO = re.compile(r"(?P<name>.+?)-(?P<version>[^-]+)(?:-.*)?\.(?:dist|egg)-info")


def _found_folder(name: str) -> str | None:
    """Where a top-level package lies, without importing it; None if there is none or it is an empty namespace."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent)


def engines(
    paths: Sequence[str] | None = None, find: Callable[[str], str | None] = _found_folder
) -> dict[str, Reading[str] | Absent | Failed]:
    """Version of each engine that can be imported. `paths`: where to look for distributions, sys.path by default.

    Folder names are read instead of importlib.metadata, which would cost a supervisor 7 MB.
    """
    versions = _versions(sys.path if paths is None else paths)
    return {engine: _engine(engine, names, versions, find) for engine, names in ENGINES.items()}


def engines_of(root: Path) -> dict[str, Reading[str] | Absent | Failed]:
    """Engines of this machine, or of a recorded one."""
    if root == Path("/"):
        return engines()
    said = files.text(root, RECORDED)
    if not isinstance(said, Reading):
        return {engine: Absent("engines were not recorded") for engine in ENGINES}
    try:
        return msgspec.json.decode(said.value, type=dict[str, Reading[str] | Absent | Failed])
    except (msgspec.DecodeError, RecursionError) as error:
        return {engine: Failed(f"{RECORDED}: {error}") for engine in ENGINES}


def _engine(
    engine: str, names: tuple[str, ...], versions: dict[str, str], find: Callable[[str], str | None]
) -> Reading[str] | Absent | Failed:
    try:
        folder = find(engine)
    except (ImportError, ValueError) as error:
        return Failed(f"{engine}: {error}")
    if folder is None:
        return Absent(f"{engine} is not installed")
    known = [versions[name] for name in names if name in versions]
    return Reading(known[0] if known else "of unknown version", folder)


def _versions(paths: Sequence[str]) -> dict[str, str]:
    """Distribution -> version for the distributions of ENGINES; earlier paths win, as they do for imports."""
    wanted = {name for names in ENGINES.values() for name in names}
    found: dict[str, str] = {}
    for path in paths:
        try:
            entries = [entry.name for entry in Path(path or ".").iterdir() if entry.name.endswith("-info")]
        except OSError:
            continue  # sys.path may name zip files and folders that are gone: nothing is installed there
        for entry in sorted(entries):
            info = _INFO.fullmatch(entry)
            if info and (name := re.sub(r"[-.]+", "_", info["name"]).lower()) in wanted:
                found.setdefault(name, info["version"])
    return found
