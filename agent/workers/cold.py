"""Makes a step find the machine as a stage in service finds it: weights in memory, not in the cache, after a pause.

A token passes all stages before it comes back to one; by then its weights have left the cache, and the processor has
slept. A step repeated at once ran up to three times as fast as the same step in service (one block of 2 MB: 0.12
against 0.38 ms), so a profile of hot steps would promise what no deployment keeps.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import numpy as np

from hwprofiles.probe import caches
from hwprofiles.reading import Reading

PAUSE_S: Final = 0.003
"""About one hop."""

LEAST_BYTES: Final = 8 << 20
MOST_BYTES: Final = 64 << 20
"""Twice the last cache level is swept, within these bounds: 64 MB take 4 to 16 ms per step."""


def sweep_bytes(root: Path = Path("/")) -> int:
    """How much memory to run through so that the caches hold nothing else; the least where no size can be read."""
    found = caches.last_cache_bytes(root)
    return min(MOST_BYTES, max(LEAST_BYTES, 2 * found.value if isinstance(found, Reading) else 0))


class Cold:
    """Call it before a step."""

    def __init__(self, count: int) -> None:
        self._swept = np.ones(count, np.uint8)

    def __call__(self) -> None:
        self._swept.max()
        time.sleep(PAUSE_S)
