"""A virtual board that gets hot: a file says which share of its speed it has now. Bad or missing text is all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

LEAST_SHARE: Final = 0.05
"""A slower worker would be taken for a hanging one (agent.hanging)."""

MAX_BYTES: Final = 64


class Throttle:
    """`path` '' is a board that keeps its speed."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None

    def share(self) -> float:
        """The share of its speed that the board has now, LEAST_SHARE to 1."""
        if self._path is None:
            return 1.0
        try:
            with self._path.open("rb") as file:
                share = float(file.read(MAX_BYTES))
        except (OSError, ValueError):
            return 1.0
        return min(1.0, max(LEAST_SHARE, share)) if share > 0 else 1.0
