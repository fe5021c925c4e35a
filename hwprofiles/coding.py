"""What a board takes to turn hidden states into the form of a codec and back, from what it measured of itself. Pure.

Each codec was timed at one row and at a chunk of them, of one width. Between the two, and for other widths, time is
taken to grow with the numbers turned: a fixed part of each call, and so much for each number.
"""

from __future__ import annotations

from typing import Final

from hwprofiles.measure import StopRule
from hwprofiles.samples import Codings
from hwprofiles.stats import median

RULE: Final = StopRule(target=0.25, max_samples=40, time_budget_s=0.04, give_up_s=2.0)
"""Sixteen runs: under a second in all. Coding is a small part of a hop, so it need not be known closely."""


def coding_s(found: Codings, codec: str, wire_dtype: str, rows: int, width: int) -> float | None:
    """Seconds to code and decode so many rows of so many numbers; None if that codec has no valid times."""
    points = sorted(
        (timing.rows * found.width, median(timing.samples.samples_s))
        for timing in found.timings
        if timing.codec == codec and timing.wire_dtype == wire_dtype and timing.samples.valid
    )
    if len(points) < 2:
        return None
    (few, few_s), (many, many_s) = points[0], points[-1]
    each_s = max(0.0, many_s - few_s) / (many - few)
    return max(0.0, few_s + (rows * width - few) * each_s)
