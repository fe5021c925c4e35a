"""Profiles that are not believed: those that a board's work has never borne out. Pure.

A board that became slow kept its word once; coordinator.slowness judges it. One whose first windows of work all take
several times as long as its profile says has never kept it: the profile was measured under other conditions, mended by
hand, or is of another board. Such a profile is not believed until the board has measured itself anew, also after a
restart of the coordinator, and its seconds are multiplied by what was found. The stored document stays what it is.

    doubted     the first WINDOWS windows of a profile in a row each take TIMES as long, or longer
    believed    one window takes less than half of that: from then on it may become slow, not a liar
    again       a board whose profile is not believed works for KEPT_WINDOWS in a row as the profile says after all
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from statistics import median
from typing import Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from coordinator.planning.slowed import Slowed
from coordinator.promised import SHORTEST_STEP_S, Ratio, Work
from hwprofiles.profile import Profile

TIMES: Final = 4.0
"""A throttled board loses two thirds at most, and in a ring steps take half as long again as a quick measuring says."""

WINDOWS: Final = 3
KEPT_WINDOWS: Final = 10
KEPT: Final = 1.25
"""Times as long as the profile says, at most."""

MOST_TIMES: Final = 1000.0
MAX_KEPT: Final = 256
"""Boards remembered; a site has no more devices."""


class Distrust(Struct, frozen=True, kw_only=True):
    """A profile that is not believed: whose, which (a digest of its modules), and how many times as long steps took."""

    device: str
    modules: str
    times: float
    since_unix: float

    @property
    def because(self) -> str:
        """Behind the name of a board: 'took 9.8 times as long as its profile says, ...'."""
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since_unix))
        return f"took {self.times:.1f} times as long as its profile says (found on {since})"


class Verdict(NamedTuple):
    """What changed about the profile of a board."""

    device: str
    kind: Literal["doubted", "kept", "measured"]
    """Not believed from now on; believed since it was kept after all; or since there is another one."""
    distrust: Distrust


def modules_digest(profile: Profile) -> str:
    """Equal while nothing of the modules was measured anew; links may change."""
    return f"sha256:{hashlib.sha256(msgspec.json.encode(profile.modules)).hexdigest()}"


def claimed(work: Work, step_s: float | None) -> Ratio | None:
    """How many times as long a window's steps took as promised. Unlike coordinator.promised.ratio_of it takes promises
    of next to nothing: that a step of 4 ms and more was to take none is no matter of what is around it."""
    if step_s is None or step_s <= 0 or work.busy_s <= 0 or not 0 < work.steps <= work.rows:
        return None
    if step_s < SHORTEST_STEP_S and work.busy_s / work.rows < TIMES * SHORTEST_STEP_S:
        return None
    return Ratio(work.busy_s / (work.rows * step_s), work.busy_s / (work.steps * step_s))


class _Board(Struct):
    modules: str
    believed: bool = False
    first: list[float] = []
    kept: int = 0


class Trust:
    """All boards of a site. `known`: those whose profiles were not believed before."""

    def __init__(self, known: Mapping[str, Distrust]) -> None:
        self._distrusts = dict(known)
        self._boards: dict[str, _Board] = {}

    def of(self, device: str) -> Distrust | None:
        return self._distrusts.get(device)

    def times(self, device: str) -> float:
        """By how much what a profile promises is to be multiplied."""
        found = self._distrusts.get(device)
        return found.times if found is not None else 1.0

    @property
    def all(self) -> Mapping[str, Distrust]:
        return self._distrusts

    def profiled(self, device: str, modules: str) -> Verdict | None:
        """A device's profile is heard of; one that was measured anew is believed until it is found wrong, too."""
        board = self._boards.get(device)
        if board is None or board.modules != modules:
            self._boards[device] = _Board(modules)
        found = self._distrusts.get(device)
        if found is None or found.modules == modules:
            return None
        return self._believe(found, "measured")

    def saw(self, device: str, ratio: Ratio, common: float, now_unix: float) -> Verdict | None:
        """Take a window of a board, by its profile as it is; `common`: what the others of its deployment take alike."""
        board = self._boards.get(device)
        if board is None or board.believed:
            return None
        found = self._distrusts.get(device)
        if found is not None:
            board.kept = board.kept + 1 if ratio.most <= KEPT * common else 0
            if board.kept < KEPT_WINDOWS:
                return None
            board.believed = True
            return self._believe(found, "kept")
        times = ratio.least / common
        if times < TIMES:
            board.first.clear()
            board.believed = times < TIMES / 2
            return None
        board.first = [*board.first, min(MOST_TIMES, times)]
        if len(board.first) < WINDOWS or (device not in self._distrusts and len(self._distrusts) >= MAX_KEPT):
            return None
        board.kept = 0
        doubt = Distrust(device=device, modules=board.modules, times=median(board.first), since_unix=now_unix)
        self._distrusts[device] = doubt
        return Verdict(device, "doubted", doubt)

    def _believe(self, found: Distrust, kind: Literal["kept", "measured"]) -> Verdict:
        del self._distrusts[found.device]
        return Verdict(found.device, kind, found)


def with_doubt(slow: Slowed | None, doubt: Distrust | None) -> Slowed | None:
    """How a planner shall reckon with a board: what its profile was wrong by, and what it became slower by."""
    if doubt is None:
        return slow
    if slow is None:
        return Slowed(times=doubt.times, because=doubt.because)
    return Slowed(times=doubt.times * slow.times, because=f"{doubt.because}, and now {slow.because}")
