"""Sizes of the processor's caches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

_FOLDER: Final = "sys/devices/system/cpu/cpu0/cache"
_SIZE: Final = re.compile(r"^([0-9]{1,9})([KM]?)$")
_FACTORS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20}


def last_cache_bytes(root: Path) -> Reading[int] | Absent | Failed:
    """The largest cache of the first core: behind it is memory. Virtual machines and old kernels may not tell."""
    sizes = []
    for name in files.listed(root, _FOLDER, "index*"):
        found = files.text(root, f"{_FOLDER}/{name}/size")
        size = _SIZE.match(found.value) if isinstance(found, Reading) else None
        if size:
            sizes.append(int(size[1]) * _FACTORS[size[2]])
    return Reading(max(sizes), f"/{_FOLDER}") if sizes else Absent(f"no sizes in /{_FOLDER}")
