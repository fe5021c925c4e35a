"""Processor clocks and the policy that sets them (cpufreq)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

_FOLDER = "sys/devices/system/cpu/cpufreq"


class Clocks(NamedTuple):
    """Of all clock domains: the fastest current clock, and the bounds that the policy allows."""

    current_hz: float
    min_hz: float
    max_hz: float


def governor(root: Path) -> Reading[str] | Absent | Failed:
    """'schedutil'; different governors of several domains are joined by ', '."""
    policies = files.listed(root, _FOLDER, "policy*")
    if not policies:
        return Absent("no cpufreq: clocks are not ours to see (a virtual machine, or fixed clocks)")
    found = [files.text(root, f"{_FOLDER}/{policy}/scaling_governor") for policy in policies]
    names = dict.fromkeys(one.value for one in found if isinstance(one, Reading))
    if not names:
        return found[0]
    return Reading(", ".join(names), f"/{_FOLDER}")


def clocks(root: Path) -> Reading[Clocks] | Absent | Failed:
    policies = files.listed(root, _FOLDER, "policy*")
    if not policies:
        return Absent("no cpufreq: clocks are not ours to see (a virtual machine, or fixed clocks)")
    columns = []
    for name in ("scaling_cur_freq", "scaling_min_freq", "scaling_max_freq"):
        found = [files.parsed(root, f"{_FOLDER}/{policy}/{name}", files.whole) for policy in policies]
        kilohertz = [one.value for one in found if isinstance(one, Reading)]
        if not kilohertz:
            first = found[0]
            return first if not isinstance(first, Reading) else Absent(f"no {name}")
        columns.append([value * 1e3 for value in kilohertz])
    current, low, high = columns
    return Reading(Clocks(max(current), min(low), max(high)), f"/{_FOLDER}")
