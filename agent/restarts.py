"""When a stage whose worker died may be started again. Pure."""

from __future__ import annotations

from collections import deque
from typing import Final

MAX_DEATHS: Final = 5
WITHIN_S: Final = 300.0
FIRST_PAUSE_S: Final = 1.0
"""After the second death, and doubled with each further one: 0, 1, 2, 4 s. Whoever waits for an answer waits for a
worker that died once. A stage that dies five times in five minutes waits for a new epoch."""


class Deaths:
    """The deaths of one stage in one epoch."""

    def __init__(self) -> None:
        self._at_s: deque[float] = deque(maxlen=MAX_DEATHS)
        self.total = 0
        self.gave_up = False

    def died(self, now_s: float, *, curable: bool = True) -> None:
        self.total += 1
        while self._at_s and now_s - self._at_s[0] > WITHIN_S:
            self._at_s.popleft()
        self._at_s.append(now_s)
        self.gave_up = not curable or len(self._at_s) >= MAX_DEATHS

    @property
    def until_s(self) -> float:
        """Not before this."""
        if not self._at_s:
            return 0.0
        if len(self._at_s) == 1:
            return self._at_s[0]
        return self._at_s[-1] + FIRST_PAUSE_S * 2.0 ** (len(self._at_s) - 2)
