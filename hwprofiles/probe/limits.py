"""Limits of control groups, which psutil and /proc/meminfo don't show: memory, processor quota, processor set.

Both versions of cgroups, alone or side by side (v1 controllers on a system that also mounts v2). A limit of any group
between ours and the top holds for us, so all visible ones are read and the tightest wins. In a container the top that
we can see is our own mount; v1's memory.stat tells of limits above it, v2 does not.

Pure functions of a tree: /proc/self/cgroup says which group, /proc/self/mountinfo where groups are mounted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

UNLIMITED_FROM_BYTES: Final = 1 << 60
"""v1 writes 'no limit' as the largest multiple of the page size below 2^63."""

MEMORY_GROUPS_OFF: Final = (
    "the kernel's memory groups are off, so MemoryMax= has no effect "
    "(Raspberry Pi: add cgroup_enable=memory to the kernel's command line)"
)


class Quota(NamedTuple):
    """`cores` of processor time in each period of `period_s`."""

    cores: float
    period_s: float


class Group(NamedTuple):
    """Where one controller's groups are: from our own group to the top that is visible, relative to the root."""

    version: int
    folders: tuple[str, ...]


class _Mount(NamedTuple):
    version: int
    root: str
    point: str
    controllers: frozenset[str]


def group_of(root: Path, controller: str) -> Group | Absent | Failed:
    """Find our group for 'memory', 'cpu' or 'cpuset'. v1 wins where both are mounted: a controller is in one only."""
    mounts = files.text(root, "proc/self/mountinfo")
    groups = files.text(root, "proc/self/cgroup")
    for found in (mounts, groups):
        if not isinstance(found, Reading):
            return found
    if not isinstance(mounts, Reading) or not isinstance(groups, Reading):
        raise AssertionError("unreachable")
    paths = dict(_group_paths(groups.value))
    for mount in sorted(_mounts(mounts.value), key=lambda mount: mount.version):
        if mount.version == 1 and controller in mount.controllers and controller in paths:
            return Group(1, _folders(mount, paths[controller]))
        if mount.version == 2 and "" in paths and _v2_controls(root, mount, controller):
            return Group(2, _folders(mount, paths[""]))
    return Absent(f"no control groups for {controller}")


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    """Lines are: id parent device root mount-point options [optional ..] - type source super-options."""
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        dash = fields.index("-", 6)
        if len(fields) < dash + 4 or fields[dash + 1] not in ("cgroup", "cgroup2") or not fields[4].startswith("/"):
            continue
        version = 1 if fields[dash + 1] == "cgroup" else 2
        yield _Mount(version, _plain(fields[3]), _plain(fields[4]), frozenset(fields[dash + 3].split(",")))


def _plain(field: str) -> str:
    """Undo the octal escapes of mountinfo (a space is written \\040)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _group_paths(cgroup: str) -> Iterator[tuple[str, str]]:
    """Lines are: hierarchy:controllers:path; v2 has no controllers, which gives the key ''."""
    for line in cgroup.splitlines():
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator:
            for controller in controllers.split(","):
                yield controller, path


def _folders(mount: _Mount, path: str) -> tuple[str, ...]:
    """Our group's folder and its parents up to the mount point, relative to '/'.

    A mount shows the hierarchy from `mount.root` down. A group outside of it (a container that sees the host's path,
    or '/..' across a namespace) has no visible folder: the mount's top is then the nearest that is.
    """
    group, top = PurePosixPath(path), PurePosixPath(mount.root)
    inside = group.relative_to(top) if group.is_relative_to(top) and ".." not in group.parts else PurePosixPath()
    point = PurePosixPath(mount.point).relative_to("/")
    return tuple(str(point / step) for step in (inside, *inside.parents)) if inside.parts else (str(point),)


def _v2_controls(root: Path, mount: _Mount, controller: str) -> bool:
    point = mount.point.lstrip("/")
    found = files.text(root, f"{point}/cgroup.controllers")
    return isinstance(found, Reading) and controller in found.value.split()


def memory_limit(root: Path) -> Reading[int] | Absent | Failed:
    """The tightest memory limit in bytes, and the file that sets it."""
    group = group_of(root, "memory")
    if isinstance(group, Absent):
        return Absent(MEMORY_GROUPS_OFF if files.exists(root, "proc/self/cgroup") else group.because)
    if isinstance(group, Failed):
        return group
    if group.version == 1:
        found = [files.parsed(root, f"{folder}/memory.limit_in_bytes", _bytes) for folder in group.folders]
        found += [files.parsed(root, f"{folder}/memory.stat", _hierarchical_bytes) for folder in group.folders[:1]]
    else:
        # Above memory.high a group is not killed but slowed to a crawl: no stage may be planned beyond it.
        names = ("memory.max", "memory.high")
        found = [files.parsed(root, f"{folder}/{name}", _bytes) for folder in group.folders for name in names]
    limits = [limit for limit in found if isinstance(limit, Reading) and limit.value < UNLIMITED_FROM_BYTES]
    if limits:
        return min(limits, key=lambda limit: limit.value)
    failed = [limit for limit in found if isinstance(limit, Failed)]
    return failed[0] if failed else Absent("no control group limits memory")


def _bytes(text: str) -> int:
    limit = UNLIMITED_FROM_BYTES if text == "max" else files.whole(text)
    if limit < 0:
        raise ValueError(text)
    return limit


def _hierarchical_bytes(text: str) -> int:
    found = re.search(r"^hierarchical_memory_limit (\d{1,20})$", text, re.MULTILINE)
    return int(found[1]) if found else UNLIMITED_FROM_BYTES


def processor_quota(root: Path) -> Reading[Quota] | Absent | Failed:
    """The tightest processor quota, and the file that sets it."""
    group = group_of(root, "cpu")
    if not isinstance(group, Group):
        return group
    reader = _quota_v1 if group.version == 1 else _quota_v2
    found = [reader(root, folder) for folder in group.folders]
    quotas = [quota for quota in found if isinstance(quota, Reading)]
    if quotas:
        return min(quotas, key=lambda quota: quota.value.cores)
    failed = [quota for quota in found if isinstance(quota, Failed)]
    return failed[0] if failed else Absent("no control group limits processor time")


def _quota_v1(root: Path, folder: str) -> Reading[Quota] | Absent | Failed:
    quota = files.parsed(root, f"{folder}/cpu.cfs_quota_us", files.whole)
    period = files.parsed(root, f"{folder}/cpu.cfs_period_us", files.whole)
    if not isinstance(quota, Reading):
        return quota
    if quota.value <= 0:
        return Absent(f"no quota in {quota.source}")
    if not isinstance(period, Reading):
        return period
    return _quota(quota.value, period.value, quota.source)


def _quota_v2(root: Path, folder: str) -> Reading[Quota] | Absent | Failed:
    found = files.text(root, f"{folder}/cpu.max")
    if not isinstance(found, Reading):
        return found
    quota, _, period = found.value.partition(" ")
    if quota == "max":
        return Absent(f"no quota in {found.source}")
    try:
        return _quota(files.whole(quota), files.whole(period), found.source)
    except ValueError:
        return Failed(f"{found.source} holds {found.value[: files.MAX_QUOTED]!r}")


def _quota(quota_us: int, period_us: int, source: str) -> Reading[Quota] | Failed:
    if quota_us <= 0 or period_us <= 0:
        return Failed(f"{source} holds {quota_us} of {period_us} us")
    return Reading(Quota(quota_us / period_us, period_us / 1e6), source)


def processor_set(root: Path) -> Reading[tuple[int, ...]] | Absent | Failed:
    """Processors that our cpuset group may use."""
    group = group_of(root, "cpuset")
    if not isinstance(group, Group):
        return group
    names = ("cpuset.effective_cpus", "cpuset.cpus") if group.version == 1 else ("cpuset.cpus.effective",)
    for folder in group.folders:
        for name in names:
            found = files.parsed(root, f"{folder}/{name}", files.number_list)
            if isinstance(found, Failed) or (isinstance(found, Reading) and found.value):
                return found
    return Absent("no control group limits which processors are used")
