"""Which Jetson it is: module, system on a chip, L4T release. Nothing here needs a program or root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

MODULES: Final = {"p3767": "Orin NX or Orin Nano", "p3701": "AGX Orin"}
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
    # 'nvidia,p3768-0000+p3767-0005-super' is carrier + module; 'nvidia,p3767-0005' is the module alone.
    matches = [re.match(r"nvidia,(?:p\d{4}-\d{4}\+)?(p\d{4}-\d{4})", name) for name in names]
    code = next((match[1] for match in matches if match), "")
    return Reading(Module(code, chips[0], MODULES.get(code.partition("-")[0], "")), found.source)


def l4t_release(root: Path) -> Reading[str] | Absent | Failed:
    """'R36.4.3' from the first line of /etc/nv_tegra_release."""
    return files.parsed(root, "etc/nv_tegra_release", _release)


def _release(text: str) -> str:
    found = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    if not found:
        raise ValueError("not an L4T release line")
    return f"R{found[1]}.{found[2]}"
