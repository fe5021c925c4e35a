"""What only a Jetson tells: module, system on a chip, L4T release, power modes, load and clock of its GPU.

Nothing here needs root, and only the power modes need a program.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.probe.commands import Runner
from hwprofiles.reading import Absent, Failed, Reading

MODULES: Final = {
    "p2180": "TX1",
    "p3310": "TX2",
    "p3489": "TX2",
    "p3636": "TX2 NX",
    "p3448": "Nano",
    "p3668": "Xavier NX",
    "p2888": "AGX Xavier",
    "p3767": "Orin NX or Orin Nano",
    "p3701": "AGX Orin",
    "p3834": "AGX Thor",
}
"""Families of module codes; the rest of the code tells the variant."""


class Module(NamedTuple):
    code: str
    """'p3767-0005'"""
    soc: str
    """'tegra234'"""
    family: str
    """'Orin NX or Orin Nano', or '' for a code that is not in the table."""


def module(root: Path) -> Reading[Module] | Absent | Failed:
    """Module and chip by the device tree's list of compatible names; Absent on anything but a Jetson."""
    found = files.text(root, "proc/device-tree/compatible")
    if not isinstance(found, Reading):
        return found
    names = found.value.split("\0")
    chips = [name.removeprefix("nvidia,") for name in names if re.fullmatch(r"nvidia,tegra\w+", name)]
    if not chips:
        return Absent("not a Jetson: no nvidia,tegra in /proc/device-tree/compatible")
    # 'nvidia,p3768-0000+p3767-0005-super' is carrier + module; a carrier's own code is in no family.
    codes = [code for name in names for code in re.findall(r"(?<![\w.])p\d{4}-\d{4}", name)]
    code = next((code for code in codes if code.partition("-")[0] in MODULES), codes[-1] if codes else "")
    return Reading(Module(code, chips[0], MODULES.get(code.partition("-")[0], "")), found.source)


def l4t_release(root: Path) -> Reading[str] | Absent | Failed:
    """'R36.4.3' from the first line of /etc/nv_tegra_release."""
    return files.parsed(root, "etc/nv_tegra_release", _release)


def _release(text: str) -> str:
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    if not found:
        raise ValueError("not an L4T release line")
    return f"R{found[1]}.{found[2]}"


class PowerMode(NamedTuple):
    name: str
    """'MAXN_SUPER', '15W'"""
    number: int | None


def power_mode(run: Runner) -> Reading[PowerMode] | Absent | Failed:
    """The mode that nvpmodel has set: it decides which cores run and how fast."""
    said = run(("nvpmodel", "-q"))
    if not isinstance(said, Reading):
        return said
    found = re.search(r"^NV Power Mode: *(\S.{0,63}?) *$(?:\s*(\d{1,3})\s*$)?", said.value, re.MULTILINE)
    if not found:
        return Failed(f"{said.source} says {said.value[: files.MAX_QUOTED]!r}")
    return Reading(PowerMode(found[1], int(found[2]) if found[2] else None), said.source)


def power_modes(run: Runner) -> Reading[tuple[str, ...]] | Absent | Failed:
    """Names of all modes in the order of their numbers: firmware that is too old offers fewer."""
    said = run(("nvpmodel", "-p", "--verbose"))
    if not isinstance(said, Reading):
        return said
    found = re.findall(r"POWER_MODEL\s+ID=(\d{1,3})\s+NAME=(\S{1,64})", said.value)
    if not found:
        return Failed(f"{said.source} says {said.value[: files.MAX_QUOTED]!r}")
    return Reading(tuple(name for _, name in sorted(found, key=lambda mode: int(mode[0]))), said.source)


class GpuClock(NamedTuple):
    load: float | None
    """Share of time that it works, 0 to 1; None where the kernel does not say."""
    current_hz: float
    min_hz: float
    max_hz: float


def gpu(root: Path) -> Reading[GpuClock] | Absent | Failed:
    """Load and clock of the Jetson's GPU by devfreq: '57000000.gpu', '17000000.ga10b', or 'gpu-gpc-0' on a Thor.

    The entry may be missing early at boot; ask again later.
    """
    folder = next(
        (
            path
            for pattern in ("*.gpu", "*.ga10b", "*.gv11b", "*.gp10b", "*.gm20b", "gpu-gpc-*")
            for path in files.matches(root, "sys/class/devfreq", pattern)
        ),
        None,
    )
    if folder is None:
        return Absent("no GPU in /sys/class/devfreq")
    clocks = [files.parsed(root, f"{folder}/{name}", files.whole) for name in ("cur_freq", "min_freq", "max_freq")]
    values = [clock.value for clock in clocks if isinstance(clock, Reading)]
    if len(values) < len(clocks):
        return next(clock for clock in clocks if not isinstance(clock, Reading))
    load = files.parsed(root, f"{folder}/device/load", files.whole)
    current, low, high = map(float, values)
    share = load.value / 1000 if isinstance(load, Reading) else None
    return Reading(GpuClock(share, current, low, high), f"/{folder}")
