"""Boards that we know by name: the code in a Jetson's device tree, the model of a Raspberry Pi.

A table for people, and for choosing which readings to expect; the raw text is always kept beside it, and a board that
is not listed is measured like any other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Literal, NamedTuple

from hwprofiles.probe import files, jetson, proc
from hwprofiles.reading import Absent, Failed, Reading

JETSONS: Final = {
    "p2180-1000": "Jetson TX1",
    "p3310-1000": "Jetson TX2",
    "p3489-0000": "Jetson TX2i",
    "p3489-0888": "Jetson TX2 4 GB",
    "p3636-0001": "Jetson TX2 NX",
    "p3448-0000": "Jetson Nano (developer kit)",
    "p3448-0002": "Jetson Nano",
    "p3448-0003": "Jetson Nano 2 GB",
    "p3668-0000": "Jetson Xavier NX (developer kit)",
    "p3668-0001": "Jetson Xavier NX 8 GB",
    "p3668-0003": "Jetson Xavier NX 16 GB",
    "p2888-0001": "Jetson AGX Xavier 16 GB",
    "p2888-0004": "Jetson AGX Xavier 32 GB",
    "p2888-0005": "Jetson AGX Xavier 64 GB",
    "p2888-0008": "Jetson AGX Xavier Industrial",
    "p3767-0000": "Jetson Orin NX 16 GB",
    "p3767-0001": "Jetson Orin NX 8 GB",
    "p3767-0003": "Jetson Orin Nano 8 GB",
    "p3767-0004": "Jetson Orin Nano 4 GB",
    "p3767-0005": "Jetson Orin Nano 8 GB (developer kit)",
    "p3701-0000": "Jetson AGX Orin (developer kit)",
    "p3701-0004": "Jetson AGX Orin 32 GB",
    "p3701-0005": "Jetson AGX Orin 64 GB",
    "p3701-0008": "Jetson AGX Orin Industrial",
}
"""Module code -> name. Of a code that is not here, its family may be in `jetson.MODULES`."""

_PI = re.compile(
    r"(Raspberry Pi (?:Zero(?: 2)?(?: W)?|Compute Module \d\S*|\d+)(?: Model [AB])?(?: Plus)?)(?: Rev .*)?"
)

Kind = Literal["jetson", "raspberry-pi", "other"]


class Known(NamedTuple):
    kind: Kind
    name: str
    """'Jetson Orin Nano 8 GB (developer kit)'; the raw text where the table has no name."""
    raw: str
    """What the board calls itself."""


def known(root: Path) -> Reading[Known] | Absent | Failed:
    """Which board it is, by its device tree or its DMI tables."""
    raw, module = proc.board(root), jetson.module(root)
    if isinstance(module, Reading):
        said = raw.value if isinstance(raw, Reading) else module.value.code
        name = JETSONS.get(module.value.code) or " ".join(filter(None, ("Jetson", module.value.family)))
        return Reading(Known("jetson", name, said), module.source)
    if not isinstance(raw, Reading):
        if files.exists(root, "etc/nv_tegra_release"):  # a container on a Jetson sees its release at most
            return Reading(Known("jetson", "Jetson", "Jetson"), "/etc/nv_tegra_release")
        return raw
    pi = _PI.fullmatch(raw.value)
    if pi or raw.value.startswith("Raspberry Pi"):
        return Reading(Known("raspberry-pi", pi[1] if pi else raw.value, raw.value), raw.source)
    return Reading(Known("other", raw.value, raw.value), raw.source)
