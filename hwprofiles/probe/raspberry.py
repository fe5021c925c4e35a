"""What only a Raspberry Pi tells: its power rails (Pi 5) and whether its supply is weak."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.probe.commands import Runner
from hwprofiles.probe.ina3221 import Rail
from hwprofiles.reading import Absent, Failed, Reading

ADC_COMMAND: Final = ("vcgencmd", "pmic_read_adc")
NOT_REGISTERED: Final = "Command not registered"
"""What boards without a power management chip of that kind answer."""

_LINE = re.compile(r"^\s*(\w{1,32})_([AV])\s+(?:current|volt)\(\d{1,3}\)=(-?\d{1,6}\.\d{1,10})[AV]\s*$", re.MULTILINE)

SUPPLY_RAIL: Final = "EXT5V"
"""The 5 V input behind its protection: a healthy supply shows about 4.9 V. Its current is not measured."""


class Pmic(NamedTuple):
    rails: tuple[Rail, ...]
    """Those with both a voltage and a current."""
    volts: dict[str, float]


def pmic(run: Runner) -> Reading[Pmic] | Absent | Failed:
    """Rails of the power management chip, current and voltage paired by name. Only for a Raspberry Pi."""
    said = run(ADC_COMMAND)
    if isinstance(said, Failed) and NOT_REGISTERED in said.because:
        return Absent("this board's firmware measures no power")
    if not isinstance(said, Reading):
        return said
    if NOT_REGISTERED in said.value:
        return Absent("this board's firmware measures no power")
    found = parse_pmic(said.value)
    if not found.rails:
        return Failed(f"{said.source} says {said.value[: files.MAX_QUOTED]!r}")
    return Reading(found, said.source)


def parse_pmic(printed: str) -> Pmic:
    """The numbers in brackets are channels of a converter and pair nothing: VDD_CORE is 7 and 15."""
    amperes: dict[str, float] = {}
    volts: dict[str, float] = {}
    for name, unit, value in _LINE.findall(printed):
        (amperes if unit == "A" else volts)[name] = float(value)
    rails = tuple(Rail(name, amperes[name] * volts[name]) for name in amperes if name in volts)
    return Pmic(rails, volts)


def under_voltage(root: Path) -> Reading[bool] | Absent | Failed:
    """True if the supply was found too low since the driver last looked (hwmon rpi_volt)."""
    for name_path in files.matches(root, "sys/class/hwmon", "hwmon*/name"):
        name = files.text(root, name_path)
        if isinstance(name, Reading) and name.value == "rpi_volt":
            alarm = f"{name_path.rpartition('/')[0]}/in0_lcrit_alarm"
            return files.parsed(root, alarm, lambda text: bool(int(text)))
    return Absent("no rpi_volt in /sys/class/hwmon")
