"""Makes a step find the machine as a stage in service finds it: weights in memory, not in the cache, after a pause.

A token passes all stages before it comes back to one; by then its weights have left the cache, and the processor has
slept. A step repeated at once ran up to three times as fast as the same step in service (one block of 2 MB: 0.12
against 0.38 ms), so a profile of hot steps would promise what no deployment keeps.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Final

import numpy as np

PAUSE_S: Final = 0.003
"""About one hop."""

LEAST_BYTES: Final = 8 << 20
MOST_BYTES: Final = 64 << 20
"""Twice the last cache level is swept, within these bounds: 64 MB take 4 to 16 ms per step."""

_SIZE = re.compile(r"^([0-9]+)([KM]?)$")


def sweep_bytes(root: Path = Path("/")) -> int:
    """How much memory to run through so that the caches hold nothing else; the least where no size can be read."""
    found = [LEAST_BYTES]
    for file in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            size = _SIZE.match(file.read_text(encoding="ascii").strip())
        except (OSError, UnicodeDecodeError):
            continue
        if size:
            found.append(2 * int(size[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[size[2]])
    return min(MOST_BYTES, max(found))


class Cold:
    """Call it before a step."""

    def __init__(self, count: int) -> None:
        self._swept = np.ones(count, np.uint8)

    def __call__(self) -> None:
        self._swept.max()
        time.sleep(PAUSE_S)
