"""What power is measured of: rails, and a total that says what it covers.

A total is never added to its parts, and a part is never taken for the total. Where a board has no rail for its whole
input, the sum of the rails is named as such; where the rails are not a known set, there is no total.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from msgspec import Struct

from hwprofiles.probe import boards, ina3221, raspberry
from hwprofiles.probe.commands import Runner
from hwprofiles.probe.ina3221 import Rail
from hwprofiles.probe.tegrastats import Stats
from hwprofiles.reading import Absent, Failed, Reading

TOTAL_RAILS: Final = {
    "VDD_IN": "module input VDD_IN",
    "POM_5V_IN": "module input POM_5V_IN",
    "VIN": "board input VIN",
}
"""Rails that contain the others, with what they cover."""

SUMS: Final = (
    frozenset({"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}),  # AGX Xavier
    frozenset({"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}),  # AGX Orin: VIN_SYS_5V0 is no total there
    frozenset({"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"}),  # AGX Thor without VIN
)
"""Rails that no rail contains and that may be added up."""

WITHIN_OTHERS: Final = frozenset({"VDDQ_VDD2_1V8AO"})
"""Rails fed by another that is listed: shown, and never added."""

PMIC_COVERS: Final = "sum of PMIC rails, not input power (5 V input and USB devices are not in it)"


class Power(Struct, frozen=True, kw_only=True):
    """Watts at one moment."""

    rails_w: dict[str, float]
    total_w: Reading[float] | Absent | Failed
    covers: str
    """What the total is of; '' where there is none."""


def of_rails(rails: tuple[Rail, ...], source: str) -> Power:
    """Name the total of a set of on-board rails, or say why there is none."""
    known = {rail.name: rail.watts for rail in rails}
    for name, covers in TOTAL_RAILS.items():
        if name in known:
            return Power(rails_w=known, total_w=Reading(known[name], source), covers=f"{covers}, on-board sensor")
    parts = {name: watts for name, watts in known.items() if name not in WITHIN_OTHERS}
    if frozenset(parts) in SUMS:
        covers = f"sum of rails {' + '.join(parts)}, on-board sensor"
        return Power(rails_w=known, total_w=Reading(sum(parts.values()), source), covers=covers)
    because = f"rails {', '.join(known)} are not a known set: what they add up to is not known"
    return Power(rails_w=known, total_w=Absent(because), covers="")


def power(root: Path, run: Runner, stats: Stats | None = None) -> Reading[Power] | Absent | Failed:
    """Power now: INA3221 rails, a Pi's PMIC, else the rails of a line of tegrastats where one was read.

    x86 has energy counters instead (`rapl`), and a GPU its own meter (`nvidia`).
    """
    rails = ina3221.rails(root)
    if isinstance(rails, Reading):
        return Reading(of_rails(rails.value, rails.source), rails.source)
    if stats is not None and stats.rails_w:
        found = tuple(Rail(name, watts) for name, watts in stats.rails_w.items())
        return Reading(of_rails(found, "tegrastats"), "tegrastats")
    board = boards.known(root)
    if not isinstance(board, Reading) or board.value.kind != "raspberry-pi":
        return rails
    pmic = raspberry.pmic(run)
    if not isinstance(pmic, Reading):
        return pmic
    known = {rail.name: rail.watts for rail in pmic.value.rails}
    total = Reading(sum(known.values()), pmic.source)
    return Reading(Power(rails_w=known, total_w=total, covers=PMIC_COVERS), pmic.source)
