"""Recordings on disk: a folder, or a .tar.gz of one. Nothing of an archive from elsewhere is believed: only plain files
and folders inside it are taken, and no more than a recording may hold.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from hwprofiles.record import MAX_ENTRIES, MAX_RECORDING_BYTES, SOURCE, Recording, source_text
from wire.errors import CorruptData, UsageError

SUFFIXES: Final = (".tar.gz", ".tgz")


def write(recording: Recording, output: Path, now_unix: float) -> None:
    """Write a folder, or an archive if `output` ends in .tar.gz. Raises UsageError if something is there already."""
    contents = {**recording.contents, SOURCE: source_text(recording, now_unix).encode()}
    try:
        if output.name.endswith(SUFFIXES):
            with tarfile.open(output, "x:gz") as archive:
                _fill(archive, contents, recording.folders, now_unix)
            return
        output.mkdir(parents=True)
        for folder in recording.folders:
            (output / folder).mkdir(parents=True, exist_ok=True)
        for path, data in contents.items():
            target = output / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    except FileExistsError:
        raise UsageError(f"{output} is there already", try_="--output with another name") from None
    except OSError as error:
        raise UsageError(
            f"can't write {output}: {error.strerror or error}", try_="--output in a folder of yours"
        ) from None


def _fill(archive: tarfile.TarFile, contents: dict[str, bytes], folders: tuple[str, ...], now_unix: float) -> None:
    """Without owners: they would name the user."""
    for folder in sorted(folders):
        entry = tarfile.TarInfo(folder)
        entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, int(now_unix)
        archive.addfile(entry)
    for path, data in sorted(contents.items()):
        entry = tarfile.TarInfo(path)
        entry.size, entry.mtime = len(data), int(now_unix)
        archive.addfile(entry, io.BytesIO(data))


@contextlib.contextmanager
def opened(recording: Path) -> Iterator[Path]:
    """Give the folder of a recording; an archive is unpacked into a temporary one for as long as the block lasts."""
    if recording.is_dir():
        yield recording
        return
    if not recording.is_file():
        raise UsageError(f"no recording at {recording}", try_="edgelam-agent record --output DIR on the board")
    with tempfile.TemporaryDirectory(prefix="edgelam-replay-") as folder:
        try:
            with tarfile.open(recording, "r:gz") as archive:
                _unpack(archive, Path(folder))
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise CorruptData(f"{recording}: not a recording: {error}", try_="record the board again") from None
        yield Path(folder)


def _unpack(archive: tarfile.TarFile, folder: Path) -> None:
    entries, left_bytes = 0, MAX_RECORDING_BYTES
    for entry in archive:
        path = PurePosixPath(entry.name)
        entries, left_bytes = entries + 1, left_bytes - entry.size
        if entries > MAX_ENTRIES or left_bytes < 0:
            raise tarfile.TarError("larger than any recording")
        if path.is_absolute() or ".." in path.parts or not (entry.isreg() or entry.isdir()):
            raise tarfile.TarError(f"holds {entry.name[:60]!r}, which no recording has")
        target = folder / path
        if entry.isdir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        data = archive.extractfile(entry)
        if data is not None:
            target.write_bytes(data.read(entry.size))
