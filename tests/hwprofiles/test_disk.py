"""The disk is measured with few megabytes, leaves nothing behind, and keeps off disks that are nearly full."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from hwprofiles import disk
from hwprofiles.reading import Absent, Failed
from hwprofiles.samples import DiskMeasurement


def mounts(folder: Path, *lines: str) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/mounts").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return mounts(tmp_path / "root", "/dev/mmcblk0p2 / ext4 rw 0 0")


def test_it_writes_and_reads_sixteen_megabytes_and_leaves_nothing(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    written: list[int] = []
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: written.append(real(file, data, at)) or written[-1])
    found = disk.measure_disk(cache, root)
    assert isinstance(found, DiskMeasurement) and found.filesystem == "ext4"
    assert 3 <= len(found.write.samples_s) <= 8 and len(found.read.samples_s) <= len(found.write.samples_s)
    assert sum(written) == len(found.write.samples_s) * disk.CHUNK_BYTES <= 16 << 20
    assert list(cache.iterdir()) == []


def test_a_file_in_memory_is_no_disk(tmp_path: Path) -> None:
    root = mounts(tmp_path / "root", "/dev/sda1 / ext4 rw 0 0", f"tmpfs {tmp_path} tmpfs rw 0 0")
    found = disk.measure_disk(tmp_path, root)
    assert isinstance(found, Absent) and "in memory (tmpfs)" in found.because


def test_the_innermost_mount_counts(tmp_path: Path) -> None:
    inner = tmp_path / "a b"
    inner.mkdir()
    root = mounts(tmp_path / "root", "x / ext4 rw 0 0", f"y {str(inner).replace(' ', chr(92) + '040')} vfat rw 0 0")
    assert disk.filesystem(inner, root) == "vfat" and disk.filesystem(tmp_path, root) == "ext4"
    assert disk.filesystem(inner, tmp_path / "nothing") == "unknown"


@pytest.mark.parametrize(("free_mb", "whole_mb"), [(100, 1000), (400, 10_000)])
def test_nothing_is_written_to_a_disk_that_is_nearly_full(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, free_mb: int, whole_mb: int
) -> None:
    class Room:
        f_frsize, f_bavail, f_blocks = 1 << 20, free_mb, whole_mb

    def written(*given: Any) -> int:
        raise AssertionError("something was written")

    monkeypatch.setattr(os, "statvfs", lambda folder: Room)
    monkeypatch.setattr(os, "pwrite", written)
    found = disk.measure_disk(tmp_path, root)
    assert isinstance(found, Absent) and f"only {free_mb} MB are free" in found.because


def test_a_slow_card_gets_fewer_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(disk, "perf_counter", lambda: float(next(clock)))
    assert len(list(disk._timed(lambda at: None))) == disk.LEAST_CHUNKS


def test_a_folder_that_is_not_there_is_a_failure_with_the_reason(tmp_path: Path, root: Path) -> None:
    found = disk.measure_disk(tmp_path / "nowhere", root)
    assert isinstance(found, Failed) and "no such file" in found.because
