"""Power rails of a Jetson, by its INA3221 sensors: hwmon (JetPack 5 and later) or iio (JetPack 4).

A rail needs a label and a current; inputs 4 to 7 of the sensor are shunt voltages and their sum, which are no rails.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

_DEVICES: Final = "sys/bus/i2c/devices"
_NOT_RAILS: Final = ("NC", "sum of shunt voltages")
CHANNELS: Final = (1, 2, 3)


class Rail(NamedTuple):
    name: str
    watts: float


def rails(root: Path) -> Reading[tuple[Rail, ...]] | Absent | Failed:
    """All rails of all sensors, in the order of the sensors' addresses. One rail that fails fails them all: a sum
    without it would be taken for the whole."""
    found: list[Rail] = []
    sources: list[str] = []
    for name_path in files.matches(root, _DEVICES, "*/name"):
        name = files.text(root, name_path)
        if not isinstance(name, Reading) or "ina3221" not in name.value:
            continue
        device = name_path.rpartition("/")[0]
        for reader in (_hwmon, _iio):
            got = reader(root, device)
            if isinstance(got, Failed):
                return got
            if got:
                found.extend(got)
                sources.append(f"/{device}")
                break
    if not found:
        return Absent("no INA3221 power sensor")
    return Reading(tuple(found), ", ".join(sources))


def _hwmon(root: Path, device: str) -> list[Rail] | Failed:
    found = []
    for label_path in files.matches(root, device, "hwmon/hwmon*/in*_label"):
        number = re.search(r"in(\d+)_label$", label_path)
        if not number or int(number[1]) not in CHANNELS:
            continue
        folder = label_path.rpartition("/")[0]
        names = (f"{folder}/in{number[1]}_input", f"{folder}/curr{number[1]}_input")
        rail = _rail(root, label_path, *names)
        if isinstance(rail, Failed):
            return rail
        if rail is not None:
            found.append(rail)
    return found


def _iio(root: Path, device: str) -> list[Rail] | Failed:
    found = []
    for label_path in files.matches(root, device, "iio:device*/rail_name_*"):
        folder, _, name = label_path.rpartition("/")
        number = name.rpartition("_")[2]
        rail = _rail(root, label_path, f"{folder}/in_voltage{number}_input", f"{folder}/in_current{number}_input")
        if isinstance(rail, Failed):
            return rail
        if rail is not None:
            found.append(rail)
    return found


def _rail(root: Path, label_path: str, millivolts_path: str, milliamperes_path: str) -> Rail | Failed | None:
    """None for a channel that is no rail."""
    label = files.text(root, label_path)
    if isinstance(label, Failed):
        return label
    if isinstance(label, Absent) or not label.value or label.value in _NOT_RAILS:
        return None
    millivolts = files.parsed(root, millivolts_path, files.whole)
    milliamperes = files.parsed(root, milliamperes_path, files.whole)
    for reading in (millivolts, milliamperes):
        if isinstance(reading, Failed):
            return reading
    if not isinstance(millivolts, Reading) or not isinstance(milliamperes, Reading):
        return None
    return Rail(label.value, millivolts.value * milliamperes.value / 1e6)
