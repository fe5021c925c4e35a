"""Limits by the kernel: a processor quota and a memory limit for one board, in cgroup v1 or v2.

The quota's period is 10 ms: with the default of 100 ms a board answers short bursts at full speed, and a measured
profile would be wrong. A quota still does not slow a step that is shorter than its share of a period: it is for
saturated loads (prefill, many requests, training) and for real out-of-memory kills. Steps of any length are slowed by
the agent's own emulation. One thread per board, or the quota is spent by threads that wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from pathlib import Path
from typing import Final

from msgspec import Struct

from wire.errors import Refused

PERIOD_US: Final = 10_000
MIN_QUOTA_US: Final = 1_000
"""The kernel's least; a tenth of a core at a period of 10 ms."""

MAX_TOTAL_SHARE: Final = 0.75
"""Above this share of the machine's cores boards slow each other down, and latency means nothing."""

REMOVE_S: Final = 3.0


class Unavailable(Refused):
    """This machine, or this user, can't make such a group; the text says why."""


class Hierarchy(Struct, frozen=True, kw_only=True):
    """Where groups are made: two folders in v1, one and the same in v2."""

    version: int
    cpu: Path
    memory: Path


def hierarchy(mounts: str | None = None) -> Hierarchy:
    """Find a hierarchy that has both controllers; raise Unavailable. `mounts` is the text of /proc/mounts."""
    text = Path("/proc/mounts").read_text() if mounts is None else mounts
    v1: dict[str, Path] = {}
    v2: Path | None = None
    for line in text.splitlines():
        _, folder, kind, options, *_ = line.split()
        if kind == "cgroup":
            v1.update({name: Path(folder) for name in ("cpu", "memory") if name in options.split(",")})
        elif kind == "cgroup2":
            v2 = Path(folder)
    if v2 is not None and {"cpu", "memory"} <= set(_read(v2 / "cgroup.controllers").split()):
        return Hierarchy(version=2, cpu=v2, memory=v2)
    if len(v1) == 2:
        return Hierarchy(version=1, cpu=v1["cpu"], memory=v1["memory"])
    raise Unavailable("no cgroup hierarchy with the controllers cpu and memory is mounted", try_="emulated limits")


class Group:
    """One board's group. Made by `create`, removed by `remove`."""

    def __init__(self, version: int, cpu: Path, memory: Path) -> None:
        self._version = version
        self._cpu = cpu
        self._memory = memory

    @property
    def folders(self) -> tuple[Path, ...]:
        return (self._cpu,) if self._cpu == self._memory else (self._cpu, self._memory)

    @property
    def members_files(self) -> tuple[Path, ...]:
        """Files to which a process writes "0" to enter the group before it becomes the board's agent."""
        return tuple(folder / "cgroup.procs" for folder in self.folders)

    def limit(self, cores: float, memory_bytes: int) -> None:
        """Set both limits; also live, to imitate throttling. A quota below 0.1 core becomes 0.1."""
        quota_us = max(int(cores * PERIOD_US), MIN_QUOTA_US)
        if self._version == 2:
            (self._cpu / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")
            (self._memory / "memory.max").write_text(str(memory_bytes))
            return
        (self._cpu / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (self._cpu / "cpu.cfs_quota_us").write_text(str(quota_us))
        (self._memory / "memory.limit_in_bytes").write_text(str(memory_bytes))

    def add(self, pid: int) -> None:
        for path in self.members_files:
            path.write_text(str(pid))

    def oom_kills(self) -> int:
        """How many processes of the group the kernel killed for want of memory."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        counts = dict(line.split(maxsplit=1) for line in _read(self._memory / name).splitlines())
        return int(counts.get("oom_kill", "0"))

    def remove(self) -> None:
        for folder in self.folders:
            remove_group(folder)


def create(name: str, cores: float, memory_bytes: int, where: Hierarchy | None = None) -> Group:
    """Make a group with both limits; raise Unavailable with the reason, leaving nothing behind."""
    found = where or hierarchy()
    group = Group(found.version, found.cpu / name, found.memory / name)
    try:
        if found.version == 2:
            (found.cpu / "cgroup.subtree_control").write_text("+cpu +memory")
        for folder in group.folders:
            folder.mkdir()
        group.limit(cores, memory_bytes)
    except OSError as error:
        group.remove()
        raise Unavailable(
            f"can't make control group {name}: {error.strerror} ({error.filename})",
            try_="run as root, or use emulated limits",
        ) from None
    return group


def remove_group(folder: Path) -> None:
    """Remove a group, killing what is left in it. A group that does not exist is removed already."""
    deadline = time.monotonic() + REMOVE_S
    while True:
        for pid in _read(folder / "cgroup.procs").split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            # Busy until the last member is reaped by its parent.
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise Unavailable(f"can't remove control group {folder}: {error.strerror}") from None
            time.sleep(0.02)
        else:
            return


def overcommitted(total_cores: float, machine_cores: float) -> str:
    """A warning if the quotas of all boards are too many for this machine, else ''."""
    if total_cores <= machine_cores * MAX_TOTAL_SHARE:
        return ""
    return (
        f"the boards' quotas add up to {total_cores:g} cores and this machine has {machine_cores:g}: above "
        f"{MAX_TOTAL_SHARE:.0%} of it boards slow each other down; use fewer or slower boards"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
