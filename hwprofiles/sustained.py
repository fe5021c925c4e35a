"""Speed under continued load: the same step for seconds or minutes, in windows, until the board is as hot as it gets.

A board that throttles is a result and not an error: cool and sustained figures stand side by side, and are never mixed
with those that were measured in short runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, NamedTuple

from hwprofiles import stats
from hwprofiles.samples import MAX_MOMENTS, Sustained, Window

WINDOWS: Final = 120
LEAST_WINDOW_S: Final = 0.5
COOL_SHARE: Final = 0.05
"""The first windows, and two at the least: before a heat sink is warm."""
LEAST_WINDOWS: Final = 6
"""Fewer do not give an interval of the sustained figure."""
SLOWER: Final = 1.10
"""A sustained step that takes so many times as long as a cool one is slower by more than boards jitter."""


class Look(NamedTuple):
    """What the sensors say at the end of a window."""

    celsius: float | None
    clock_hz: float | None
    throttled: bool | None


def run(
    step: Callable[[], float],
    seconds: float,
    look: Callable[[], Look],
    told: Callable[[float], None] = lambda done_s: None,  # noqa: ARG005
    clock: Callable[[], float] = time.monotonic,
) -> tuple[Window, ...]:
    """Windows of steps for so many seconds. `told` hears how many seconds are done, window by window."""
    length_s = max(LEAST_WINDOW_S, seconds / WINDOWS)
    began_s = clock()
    found: list[Window] = []
    while (start_s := clock() - began_s) < seconds and len(found) < MAX_MOMENTS:
        taken: list[float] = []
        while not taken or clock() - began_s - start_s < length_s:
            taken.append(step())
        end_s, seen = clock() - began_s, look()
        found.append(
            Window(
                end_s=round(end_s, 3),
                steps=len(taken),
                step_s=stats.median(taken),
                celsius=seen.celsius,
                clock_hz=seen.clock_hz,
                throttled=seen.throttled,
            )
        )
        told(end_s)
    return tuple(found)


class Speeds(NamedTuple):
    """Medians over windows, with 95 % intervals where windows suffice."""

    cool_s: float
    sustained_s: float
    sustained_interval_s: tuple[float, float] | None
    slowdown: float
    """Sustained over cool: above 1 the board became slower."""
    throttled_at_s: float | None
    """When a window was first seen throttled."""


def speeds(found: Sustained) -> Speeds | None:
    """None where the run was too short to tell cool from sustained."""
    windows = found.windows
    if len(windows) < LEAST_WINDOWS or min(window.step_s for window in windows) <= 0:
        return None
    cool = [window.step_s for window in windows[: max(2, round(len(windows) * COOL_SHARE))]]
    last = [window.step_s for window in windows[-max(2, len(windows) // 3) :]]
    seen = [window.end_s for window in windows if window.throttled]
    return Speeds(
        cool_s=stats.median(cool),
        sustained_s=stats.median(last),
        sustained_interval_s=stats.median_interval(last),
        slowdown=stats.median(last) / stats.median(cool),
        throttled_at_s=seen[0] if seen else None,
    )
