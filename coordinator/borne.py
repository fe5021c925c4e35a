"""How far work bears out what boards measured: the last windows of each board, in one figure. Pure.

Beside the stored document, never in it. Only windows of steps of single rows count: of others it is not known which
part of the time a row took (coordinator.promised). What is found is shown, and does not enter a price: in a ring all
boards take longer than alone, and a planner that corrected those that work, and not those that rest, would move what
runs to whoever rests (docs/decisions/0014-slow-boards.md).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from statistics import median
from typing import Final

from msgspec import Struct

from coordinator.promised import Ratio

KEPT_WINDOWS: Final = 30
"""A minute of work."""
LEAST_WINDOWS: Final = 3
ALIKE: Final = 1.05
"""By rows and by steps: at most so far apart where nearly all steps had a single row."""


class BorneOut(Struct, frozen=True, kw_only=True):
    """Steps took `times` as long as the profile says, as the median of so many windows."""

    times: float
    windows: int

    @property
    def text(self) -> str:
        return f"steps take {self.times:.2f} of what it measured (last {self.windows} windows of work)"


class Borne:
    """All boards of a site."""

    def __init__(self) -> None:
        self._windows: dict[str, deque[float]] = {}

    def saw(self, device: str, ratio: Ratio) -> None:
        if ratio.most <= ALIKE * ratio.least:
            self._windows.setdefault(device, deque(maxlen=KEPT_WINDOWS)).append(ratio.most)

    def forget(self, devices: Collection[str]) -> None:
        """These are gone, or have another profile."""
        for device in devices:
            self._windows.pop(device, None)

    def of(self, device: str) -> BorneOut | None:
        """None while it has hardly worked."""
        seen = self._windows.get(device, ())
        return BorneOut(times=median(seen), windows=len(seen)) if len(seen) >= LEAST_WINDOWS else None
