"""Stop strings: text up to the first one, however it comes in pieces. Pure.

A text that could still become a stop string is held back, so nothing is shown that has to be taken back. Where the
text is cut does not depend on the pieces: the stop string that is complete first counts, of two that are complete at
the same letter the longer one.
"""

from __future__ import annotations

from collections.abc import Sequence


class Cut:
    """`push` pieces, `flush` at the end; once `found`, everything that comes is dropped."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """Give the text that is safe to show now."""
        if self.found:
            return ""
        text = self._held + piece
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        kept = self._open_end(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """Give what was held back: the text is over, and no stop string can be completed any more."""
        text, self._held = self._held, ""
        return text

    def _open_end(self, text: str) -> int:
        """How many letters at the end are the beginning of a stop string."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stops), default=0))
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
