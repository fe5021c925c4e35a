"""What the kernel and the distribution say about board, processor, memory and load."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

ARM_PARTS: Final = {
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x4E, 0x003): "NVIDIA Denver 2",
    (0x4E, 0x004): "NVIDIA Carmel",
}
"""(implementer, part) of /proc/cpuinfo: 64-bit ARM kernels print no model name. Only processors of boards we serve."""

DMI_FILLERS: Final = ("to be filled by o.e.m.", "default string", "system manufacturer", "system product name", "none")
"""What vendors leave in the DMI tables when they write nothing."""


class MemoryInfo(NamedTuple):
    total_bytes: int
    available_bytes: int


def cpu_model(root: Path) -> Reading[str] | Absent | Failed:
    """'Intel(R) N150', or 'Cortex-A76 (0x41/0xd0b)' on ARM; several kinds of core are joined by ' + '."""
    return files.parsed(root, "proc/cpuinfo", _cpu_model)


def _cpu_model(text: str) -> str:
    names = dict.fromkeys(re.findall(r"^model name\s*:\s*(\S.*?)\s*$", text, re.MULTILINE))
    if not names:
        implementers = re.findall(r"^CPU implementer\s*:\s*(0x[0-9a-fA-F]+)", text, re.MULTILINE)
        parts = re.findall(r"^CPU part\s*:\s*(0x[0-9a-fA-F]+)", text, re.MULTILINE)
        names = dict.fromkeys(_arm_name(*pair) for pair in zip(implementers, parts, strict=False))
    if not names:
        raise ValueError("neither model name nor CPU part")
    return " + ".join(names)


def _arm_name(implementer: str, part: str) -> str:
    name = ARM_PARTS.get((int(implementer, 16), int(part, 16)), "ARM core")
    return f"{name} ({implementer.lower()}/{part.lower()})"


def memory(root: Path) -> Reading[MemoryInfo] | Absent | Failed:
    """Memory of the whole host: limits of a group are not in it (see `limits`)."""
    return files.parsed(root, "proc/meminfo", _memory)


def _memory(text: str) -> MemoryInfo:
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d{1,15}) kB$", text, re.MULTILINE))
    try:
        return MemoryInfo(int(kilobytes["MemTotal"]) * 1024, int(kilobytes["MemAvailable"]) * 1024)
    except KeyError as error:
        raise ValueError(f"no {error}") from None


def load(root: Path) -> Reading[float] | Absent | Failed:
    """Processes that ran or waited to run, averaged over the last minute."""
    return files.parsed(root, "proc/loadavg", lambda text: float(text.split()[0]) if text else float("empty"))


def kernel(root: Path) -> Reading[str] | Absent | Failed:
    return files.text(root, "proc/sys/kernel/osrelease")


def arch(root: Path) -> str:
    """'aarch64', 'x86_64'; for a recorded tree what was recorded, 'unknown' if nothing was."""
    if root == Path("/"):
        return os.uname().machine
    found = files.text(root, "proc/sys/kernel/arch")
    return found.value if isinstance(found, Reading) else "unknown"


def distribution(root: Path) -> Reading[str] | Absent | Failed:
    """'Debian GNU/Linux 12 (bookworm)'."""
    return files.parsed(root, "etc/os-release", _pretty_name)


def _pretty_name(text: str) -> str:
    found = re.search(r"^PRETTY_NAME=(?P<quote>[\"']?)(?P<name>.+?)(?P=quote)$", text, re.MULTILINE)
    if not found:
        raise ValueError("no PRETTY_NAME")
    return found["name"]


def board(root: Path) -> Reading[str] | Absent | Failed:
    """Model by the device tree (NUL-terminated there), else maker and product by DMI."""
    model = files.text(root, "proc/device-tree/model")
    if not isinstance(model, Absent):
        return model
    names: list[str] = []
    for field in ("sys_vendor", "product_name"):
        found = files.text(root, f"sys/class/dmi/id/{field}")
        if isinstance(found, Reading) and found.value and found.value.lower() not in DMI_FILLERS:
            names.append(found.value)
    if not names:
        return Absent("neither /proc/device-tree/model nor a name in /sys/class/dmi/id")
    return Reading(" ".join(names), "/sys/class/dmi/id")


def online_cores(root: Path) -> Reading[tuple[int, ...]] | Absent | Failed:
    return files.parsed(root, "sys/devices/system/cpu/online", _some_numbers)


def affinity(root: Path) -> Reading[tuple[int, ...]] | Absent | Failed:
    """Processors that this process may run on: what sched_getaffinity answers, cpuset groups included."""
    if root == Path("/"):
        return Reading(tuple(sorted(os.sched_getaffinity(0))), "sched_getaffinity")
    return files.parsed(root, "proc/self/status", _allowed_list)


def _allowed_list(text: str) -> tuple[int, ...]:
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)$", text, re.MULTILINE)
    if not found:
        raise ValueError("no Cpus_allowed_list")
    return _some_numbers(found[1])


def _some_numbers(text: str) -> tuple[int, ...]:
    numbers = files.number_list(text)
    if not numbers:
        raise ValueError("empty")
    return numbers
