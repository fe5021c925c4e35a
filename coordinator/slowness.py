"""Whether boards keep what their profiles promise; the judge, with hysteresis. Pure: windows and times in, changes out.

A board gets too hot, or somebody else's program runs on it, and its steps take longer than it measured. Each window of
work (coordinator.promised) says how many times as long. The judge keeps, per board, how many `times` as long a planner
shall reckon, 1 for most boards always, and changes that

    upwards     when SLOWER_WINDOWS in a row are at least SLOWER times that,
    downwards   when all windows of a dwell, and FASTER_WINDOWS at least, are at most 1 / SLOWER of that, or WELL;
                a board that became slow again has to be well for twice as long as the last time,
    to 1        when no window said for a while that the board is slow: it has no stage any more, or makes steps of so
                many rows that they say nothing. The while doubles in the same way. And when it has measured itself
                anew, which is the caller's to say.

What scatters within a band narrower than SLOWER changes nothing, wherever the band lies.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from coordinator.planning.slowed import Slowed
from coordinator.promised import Ratio

SLOWER: Final = 1.5
"""Times as long as reckoned with: profiles and stages agree within a few per cent, a throttled board loses a third to
two thirds."""

SLOWER_WINDOWS: Final = 3
"""Six seconds of work: longer than what a garbage collection, a flush of a card or a fan takes."""

WELL: Final = 1.25
"""At most so many times as long as its profile says is as fast as its profile: a plan is worth no move for less."""

FASTER_WINDOWS: Final = 5
SURE: Final = 0.8
"""A board that became faster is reckoned with as fast as it was in so large a share of the dwell, at the least."""

DWELL_S: Final = 30.0
"""A board cools within seconds once it rests, and is hot again within seconds once it works."""

LONGEST_DWELL_S: Final = 1800.0
FORGET_S: Final = 300.0
LONGEST_FORGET_S: Final = 3600.0

MOST_TIMES: Final = 20.0
"""Beyond it a board is as good as stopped, and what a stopped board is has other signs."""

CALM_S: Final = 7200.0
"""Who was well for so long begins anew with short dwells."""

Kind = Literal["slower", "faster", "well", "forgotten"]


class Change(NamedTuple):
    """A board is to be reckoned with otherwise than before."""

    device: str
    kind: Kind
    times: float
    """From now on; 1 if it is well or forgotten."""
    before: float
    waited_s: float = 0.0
    """How long a forgotten one had not been seen to be slow."""


@dataclass(slots=True)
class _Board:
    times: float = 1.0
    since_unix: float = 0.0
    worse: list[float] = field(default_factory=list)
    better: list[float] = field(default_factory=list)
    better_since_s: float = 0.0
    relapses: int = 0
    """How often it became slow after it had become faster."""
    became_faster: bool = False
    seen_s: float = 0.0
    """When a window last said that it is as slow as reckoned with, nearly."""
    well_s: float = 0.0


class Slowness:
    """All boards of a site. `now_s` is monotonic and never falls; `now_unix` is for people."""

    def __init__(self) -> None:
        self._boards: dict[str, _Board] = {}

    def saw(self, device: str, ratio: Ratio, now_s: float, now_unix: float) -> Change | None:
        """Take a window of a board."""
        board = self._boards.setdefault(device, _Board())
        if ratio.least >= board.times / SLOWER:
            board.seen_s = now_s
        if ratio.least >= SLOWER * board.times:
            board.worse = [*board.worse, min(MOST_TIMES, ratio.least)][-SLOWER_WINDOWS:]
        else:
            board.worse.clear()
        if board.times > 1 and ratio.most <= max(WELL, board.times / SLOWER):
            if not board.better:
                board.better_since_s = now_s
            board.better.append(ratio.most)
        else:
            board.better.clear()
        if len(board.worse) >= SLOWER_WINDOWS and max(board.worse[1:]) > board.times:
            return self._slower(device, board, now_unix)
        dwell_s = min(LONGEST_DWELL_S, DWELL_S * 2**board.relapses)
        if len(board.better) >= FASTER_WINDOWS and now_s - board.better_since_s >= dwell_s:
            return self._faster(device, board, now_s)
        return None

    def tick(self, now_s: float) -> list[Change]:
        """Call every second or so: boards that were not seen to be slow any more are given another chance."""
        changes = []
        for device, board in self._boards.items():
            wait_s = min(LONGEST_FORGET_S, FORGET_S * 2**board.relapses)
            if board.times > 1 and now_s - board.seen_s >= wait_s:
                changes.append(self._reset(device, board, "forgotten", now_s))
            elif board.times == 1 and now_s - board.well_s >= CALM_S:
                board.relapses, board.became_faster = 0, False
        return changes

    def measured_anew(self, device: str, now_s: float) -> Change | None:
        """Its profile says what it is now, so nothing is to be added to that."""
        board = self._boards.get(device)
        if board is None:
            return None
        board.worse.clear()
        board.better.clear()
        return self._reset(device, board, "well", now_s) if board.times > 1 else None

    def of(self, device: str) -> Slowed | None:
        """How a planner shall reckon with a board; None if its profile is right."""
        board = self._boards.get(device)
        if board is None or board.times <= 1:
            return None
        since = time.strftime("%H:%M", time.localtime(board.since_unix))
        return Slowed(times=board.times, because=f"runs at {1 / board.times:.2f} of its profile since {since}")

    @property
    def slow(self) -> Mapping[str, float]:
        """Slow boards, and how many times as long they take."""
        return {device: board.times for device, board in self._boards.items() if board.times > 1}

    def _slower(self, device: str, board: _Board, now_unix: float) -> Change:
        # The change may have fallen into the first of these windows, and into the one before it.
        before, board.times = board.times, max(board.worse[1:])
        if before <= 1:
            board.since_unix = now_unix
        if board.became_faster:
            board.relapses, board.became_faster = board.relapses + 1, False
        board.worse.clear()
        board.better.clear()
        return Change(device, "slower", board.times, before)

    def _faster(self, device: str, board: _Board, now_s: float) -> Change:
        times = sorted(board.better)[int(SURE * (len(board.better) - 1))]
        if times <= WELL:
            return self._reset(device, board, "well", now_s)
        before, board.times = board.times, times
        board.became_faster = True
        board.worse.clear()
        board.better.clear()
        return Change(device, "faster", board.times, before)

    def _reset(self, device: str, board: _Board, kind: Kind, now_s: float) -> Change:
        before, board.times = board.times, 1.0
        board.became_faster, board.well_s = True, now_s
        board.worse.clear()
        board.better.clear()
        return Change(device, kind, 1.0, before, now_s - board.seen_s)
