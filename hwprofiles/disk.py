"""The disk under the cache folder: how fast weights come from it, and go onto it.

16 MB at the most are written, into a file that has no name, so that nothing stays behind however this ends, and none on
a disk that is nearly full. What the kernel still holds of it is forgotten before it is read.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Final

import numpy as np

from hwprofiles.measure import StopRule, why_invalid
from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.samples import DiskMeasurement, Samples

CHUNK_BYTES: Final = 2 << 20
"""A matrix of a small model."""
CHUNKS: Final = 8
"""Eight are the fewest whose median has a useful interval (6), and more; 16 MB a time do not wear a card."""
TIME_BUDGET_S: Final = 1.5
"""No chunk is begun after it: a slow card gets fewer."""
LEAST_CHUNKS: Final = 3
RULE: Final = StopRule(min_samples=LEAST_CHUNKS, least_samples=LEAST_CHUNKS)
LEAST_FREE_BYTES: Final = 256 << 20
LEAST_FREE_SHARE: Final = 0.05
"""With less room on it, a disk is nearly full and is left alone."""
IN_MEMORY: Final = ("tmpfs", "ramfs")


def measure_disk(folder: Path, root: Path = Path("/")) -> DiskMeasurement | Absent | Failed:
    """Write and read some megabytes in `folder`, which must exist."""
    try:
        kind = filesystem(folder, root)
        refused = _why_not(folder, kind)
        if refused:
            return Absent(refused)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            write = _write(file.fileno())
            read = _read(file.fileno(), len(write))
    except OSError as error:
        return Failed(f"{folder}: {(error.strerror or str(error)).lower()}")
    return DiskMeasurement(
        folder=str(folder)[:1024], filesystem=kind, chunk_bytes=CHUNK_BYTES, write=_run(write), read=_run(read)
    )


def _why_not(folder: Path, kind: str) -> str:
    if kind in IN_MEMORY:
        return f"{folder} is in memory ({kind}), not on a disk"
    room = os.statvfs(folder)
    free, whole = room.f_bavail * room.f_frsize, room.f_blocks * room.f_frsize
    if free < LEAST_FREE_BYTES or free < LEAST_FREE_SHARE * whole:
        return f"only {free >> 20} MB are free in {folder}: nothing is written to a disk that is nearly full"
    return ""


def _write(file: int) -> list[float]:
    """Seconds for each chunk until it is on the disk."""
    chunk = np.random.default_rng(1).bytes(CHUNK_BYTES)  # zeros may never reach a disk that compresses
    return list(_timed(lambda at: _all_written(file, chunk, at)))


def _all_written(file: int, chunk: bytes, at: int) -> None:
    done = 0
    while done < len(chunk):
        done += os.pwrite(file, memoryview(chunk)[done:], at * CHUNK_BYTES + done)
    os.fdatasync(file)


def _read(file: int, chunks: int) -> list[float]:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # without reading ahead, which would serve the next chunk
    return list(_timed(lambda at: _all_read(file, at), chunks))


def _all_read(file: int, at: int) -> None:
    done = 0
    while done < CHUNK_BYTES:
        got = os.pread(file, CHUNK_BYTES - done, at * CHUNK_BYTES + done)
        if not got:
            raise OSError(5, "what was written is not there")
        done += len(got)


def _timed(work: Callable[[int], None], most: int = CHUNKS) -> Iterator[float]:
    began_s = perf_counter()
    for at in range(most):
        if at >= LEAST_CHUNKS and perf_counter() - began_s > TIME_BUDGET_S:
            return
        start_s = perf_counter()
        work(at)
        yield perf_counter() - start_s


def _run(taken: list[float]) -> Samples:
    invalid = why_invalid(taken, RULE)
    because = f"{len(taken)} chunks" if len(taken) == CHUNKS else f"time budget of {TIME_BUDGET_S:g} s is over"
    return Samples(
        samples_s=tuple(taken), warmup=0, stopped_because=because, valid=not invalid, invalid_because=invalid
    )


def filesystem(folder: Path, root: Path = Path("/")) -> str:
    """'ext4', 'tmpfs'...: of the innermost mount that the folder is in; 'unknown' if the kernel does not say."""
    found = files.text(root, "proc/self/mounts")
    where, kind = Path("/"), "unknown"
    inside = folder.resolve()
    for line in found.value.splitlines() if isinstance(found, Reading) else ():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mount = Path(fields[1].replace("\\040", " "))
        if inside.is_relative_to(mount) and len(mount.parts) >= len(where.parts):
            where, kind = mount, fields[2][:64]
    return kind
