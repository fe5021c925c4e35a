"""Tests that need a machine to themselves, on one that others use too: who was disturbed tries again.

Where the machine got slower for some seconds, the coordinator finds a board slow that nobody had slowed, rightly; where
it stood still, answers pause that nothing had happened to. So what fails is tried again if there are signs of that, and
only then; what holds is believed, disturbed or not.

    `undisturbed`    trials that say how fast something is, each on a site of its own (test_throttle)
    `once_more`      all tests on a site that a file shares (conftest)
"""

from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median
from typing import Final, NamedTuple

from benchmarks.quiet import stolen_s
from tests.e2e.site import Site
from wire.errors import EdgelamError

TRIALS_AT_MOST: Final = 3
PERIOD_S: Final = 0.05
WINDOW_S: Final = 2.0
"""As long as the windows of work by which boards are judged."""

STILL_S: Final = 0.2
"""Later than planned by so much: the machine stood still, and what waits for an answer may have given up."""

UNSTEADY: Final = 1.3
"""The slowest window of a steady machine takes less than so many times as long as its fastest."""

WORK: Final = bytes(1 << 20)


STOLEN: Final = 0.1
"""Of a processor, in a window, that the owner of a virtual machine gave to others."""


class Look(NamedTuple):
    """A piece of work: when it was to begin, how late it began, how long it took, and what had been stolen by then."""

    due_s: float
    late_s: float
    took_s: float
    stolen_s: float


class Machine:
    """How fast this machine is as long as this is open, as a small piece of work (1 ms of each 50) sees it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.seen: list[Look] = []

    def __enter__(self) -> Machine:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            due_s = time.monotonic() + PERIOD_S
            if self._stop.wait(PERIOD_S):
                return
            begin_s = time.monotonic()
            hashlib.sha256(WORK).digest()  # without Python's lock
            self.seen.append(Look(due_s, begin_s - due_s, time.monotonic() - begin_s, stolen_s()))


def _windows(seen: list[Look]) -> list[list[Look]]:
    windows: dict[int, list[Look]] = {}
    for look in seen:
        windows.setdefault(int(look.due_s / WINDOW_S), []).append(look)
    return list(windows.values())


def standstill(seen: list[Look]) -> str:
    """When nothing ran for so long that who waits for an answer may have given up; '' if never."""
    longest_s = max((look.late_s + look.took_s for look in seen), default=0.0)
    if longest_s > STILL_S:
        return f"the machine stood still for {longest_s:.2f} s"
    stolen_most_s = max((window[-1].stolen_s - window[0].stolen_s for window in _windows(seen)), default=0.0)
    if stolen_most_s > STOLEN * WINDOW_S:
        return f"{stolen_most_s:.1f} s of {WINDOW_S:.0f} were given to others by the machine's host"
    return ""


def unsteadiness(seen: list[Look]) -> str:
    """What `Machine` saw that a trial of speed may fail of, '' if nothing."""
    if still := standstill(seen):
        return still
    medians = sorted(
        median(look.late_s + look.took_s for look in window) for window in _windows(seen) if len(window) > 10
    )
    if medians and medians[-1] > UNSTEADY * medians[0]:
        return f"the machine was {medians[-1] / medians[0]:.1f} times as slow for a while as at another time"
    return ""


class Trial:
    """One try: a site of its own, and the boards of it that were slowed on purpose."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.slowed: set[str] = set()

    def slow(self, board: str, share: float) -> None:
        self.slowed.add(board)
        self.site.boards.slow(board, share)

    def others_slow(self) -> str:
        """What the coordinator said of boards that nobody had slowed."""
        notices = self.site.get("/v1/notices")["notices"]
        texts = [notice["text"] for notice in notices if notice["code"] == "device-slow"]
        return "; ".join(text for text in texts if text.split(" ", 1)[0] not in self.slowed)


def undisturbed(start: Callable[[int], AbstractContextManager[Site]], attempt: Callable[[Trial], None]) -> None:
    """Have `attempt` hold on a site that `start(number)` makes; again, where the machine disturbed it."""
    for number in range(1, TRIALS_AT_MOST + 1):
        with start(number) as site, Machine() as machine:
            trial = Trial(site)
            try:
                attempt(trial)
                return
            except (AssertionError, EdgelamError) as failure:
                why = trial.others_slow() or unsteadiness(machine.seen)
                if not why or number == TRIALS_AT_MOST:
                    raise
                warnings.warn(f"trial {number} failed, disturbed: {why}; it was: {failure}", stacklevel=2)


def once_more(call: Callable[[], None], settle: Callable[[], None]) -> str:
    """Call a test; again after `settle`, if it failed where the machine stood still. Gives what disturbed it, or ''."""
    with Machine() as machine:
        try:
            call()
            return ""
        except Exception as failure:
            why = standstill(machine.seen)
            if not why:
                raise
            print(f"disturbed ({why}), it failed: {failure!r}")
    settle()
    call()
    return why
