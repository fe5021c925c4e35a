"""Energy counters of x86 processors (RAPL). The kernel lets only root read them since 2020."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

_FOLDER: Final = "sys/class/powercap"
ROOT_ONLY: Final = "only root may read energy counters (chmod o+r on them allows others to)"


class Counter(NamedTuple):
    name: str
    microjoules: int
    wraps_at_microjoules: int
    """The counter goes back to 0 behind this value."""


def counters(root: Path) -> Reading[tuple[Counter, ...]] | Absent | Failed:
    """One counter per processor package. 'psys', which contains the packages, is left out, and so are the parts of a
    package: none may be added to another."""
    found = []
    for name_path in files.matches(root, _FOLDER, "*rapl*/name"):
        folder = name_path.rpartition("/")[0]
        if not re.search(r"/intel-rapl:\d+$", folder):  # 'intel-rapl:0:1' is a part, 'intel-rapl-mmio:0' the same again
            continue
        name = files.text(root, name_path)
        if not isinstance(name, Reading) or not name.value.startswith("package"):
            continue
        energy = files.parsed(root, f"{folder}/energy_uj", files.whole)
        limit = files.parsed(root, f"{folder}/max_energy_range_uj", files.whole)
        if isinstance(energy, Failed):
            return Failed(f"{energy.because}: {ROOT_ONLY}") if energy.because.startswith("EACCES") else energy
        if not isinstance(energy, Reading) or not isinstance(limit, Reading):
            return Failed(f"/{folder} has no counter or no range")
        found.append(Counter(name.value, energy.value, limit.value))
    if not found:
        return Absent("no energy counters of the processor (RAPL)")
    return Reading(tuple(found), f"/{_FOLDER}")


def used_j(before: tuple[Counter, ...], after: tuple[Counter, ...]) -> float:
    """Joules between two readings less than one wrap apart; raise ValueError if they are of different packages."""
    if [one.name for one in before] != [one.name for one in after]:
        raise ValueError("different packages")
    total = 0
    for first, second in zip(before, after, strict=True):
        grown = second.microjoules - first.microjoules
        total += grown if grown >= 0 else grown + first.wraps_at_microjoules
    return total / 1e6
