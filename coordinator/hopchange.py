"""Whether the hops of a ring became slower or faster, and whose link it is. Pure: windows in, changes out.

The first windows of a ring are its measure: how much its hops take together is seen exactly, and each is taken to have
its planned share of that. Then

    slower      when the sum and one hop rose by LEAST_S and that hop takes SLOWER times as long, WINDOWS in a row,
    faster      the same way down, FASTER_WINDOWS in a row,
    from the beginning, when the sum is STALE times what was planned: the boards' figures are of before.

What clocks drift apart sums to nothing round the ring: that part is followed slowly and never judged.

A board's link carries the hop that comes and the one that goes. Where both changed, and not all of the ring, it is its
link. Else it can't be told from here whose it is, and the boards at the ends are the ones to ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from coordinator.laps import Gaps

WINDOWS: Final = 3
FASTER_WINDOWS: Final = 5
SLOWER: Final = 2.0
LEAST_S: Final = 0.003
"""Schedulers of busy boards scatter by a millisecond or two."""

FIRST_WINDOWS: Final = 2
STALE: Final = 2.0
STALE_S: Final = 0.010
"""Beyond what hops of healthy boards take longer in service than measured."""

FOLLOW: Final = 0.1
"""Of each window's drift: over some 20 s, in which clocks drift apart by a millisecond at most."""

PART: Final = 0.3
"""A hop took part in a change that is at least so large a part of the largest one."""


class HopChange(NamedTuple):
    """`seconds` that each hop takes more than before (less, if below 0); `boards` of the ring, by their stage, whose
    links it is for sure, and those `unsure` of which one or more must be."""

    seconds: tuple[float, ...]
    boards: tuple[int, ...]
    unsure: tuple[int, ...]

    def of(self, board: int) -> float:
        """Of the hops of a board, the one that changed more."""
        return max((self.seconds[board - 1], self.seconds[board]), key=abs)


class HopWatch:
    """One ring in one epoch. `promised_s` are the plan's hops."""

    def __init__(self, promised_s: Sequence[float]) -> None:
        self._promised_s = tuple(promised_s)
        self._first: list[Gaps] = []
        self._base: Gaps = ()
        self._hop_s: Gaps = ()
        self._changes: list[Gaps] = []

    def saw(self, gaps: Gaps) -> HopChange | None:
        """Take a window; what it shows, together with those before it."""
        if not self._base:
            return self._begin(gaps)
        change = tuple(now - base for now, base in zip(gaps, self._base, strict=True))
        if not self._is_change(change) or (self._changes and sum(change) * sum(self._changes[0]) < 0):
            self._changes.clear()
            self._follow(change)
            return None
        self._changes.append(change)
        if len(self._changes) < (WINDOWS if sum(change) > 0 else FASTER_WINDOWS):
            return None
        # The change may have fallen into the first of these windows.
        seen = self._changes[1:]
        seconds = tuple(sorted(values)[len(values) // 2] for values in zip(*seen, strict=True))
        self._changes.clear()
        self._base = tuple(base + more for base, more in zip(self._base, seconds, strict=True))
        self._hop_s = tuple(max(LEAST_S / 4, hop + more) for hop, more in zip(self._hop_s, seconds, strict=True))
        return whose(seconds)

    def _begin(self, gaps: Gaps) -> HopChange | None:
        self._first.append(gaps)
        if len(self._first) < FIRST_WINDOWS:
            return None
        self._base = tuple(min(values) for values in zip(*self._first, strict=True))
        total_s, planned_s, count = sum(self._base), sum(self._promised_s), len(self._base)
        more_s = (total_s - planned_s) / count
        self._hop_s = tuple(max(LEAST_S / 4, promised + more_s) for promised in self._promised_s)
        if total_s >= STALE * planned_s and total_s - planned_s >= STALE_S:
            return HopChange((more_s,) * count, (), tuple(range(count)))
        return None

    def _is_change(self, change: Gaps) -> bool:
        sign = 1 if sum(change) > 0 else -1
        largest = max(range(len(change)), key=lambda hop: sign * change[hop])
        before_s, more_s = self._hop_s[largest], change[largest]
        # Of the sum alone it is known that no clock had a part in it.
        if min(sign * more_s, sign * sum(change)) < LEAST_S:
            return False
        return before_s + more_s >= SLOWER * before_s if sign > 0 else before_s + more_s <= before_s / SLOWER

    def _follow(self, change: Gaps) -> None:
        mean = sum(change) / len(change)
        self._base = tuple(base + FOLLOW * (more - mean) for base, more in zip(self._base, change, strict=True))


def whose(seconds: Sequence[float]) -> HopChange:
    """Whose links a change of the hops is of: hop i leads from board i to the next, the last one to the first."""
    count, sign = len(seconds), 1 if sum(seconds) > 0 else -1
    largest_s = max(sign * value for value in seconds)
    part = [sign * value >= max(PART * largest_s, LEAST_S / 2) for value in seconds]
    boards: tuple[int, ...] = ()
    if count > 2 and not all(part):
        boards = tuple(board for board in range(count) if part[board - 1] and part[board])
    covered = {hop for board in boards for hop in ((board - 1) % count, board)}
    ends = {end for hop in range(count) if part[hop] and hop not in covered for end in (hop, (hop + 1) % count)}
    return HopChange(tuple(seconds), boards, tuple(sorted(ends - set(boards))))
