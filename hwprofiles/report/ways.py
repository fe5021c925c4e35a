"""The ways to other boards, as a report shows them: a line each, and how their round trips scatter. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Final

from hwprofiles import pairs, stats
from hwprofiles.plain import clean
from hwprofiles.profile import Goodput, PairMeasurement
from hwprofiles.report.plots import MOST_SERIES, NoPlot, Plot, Point, Series
from hwprofiles.report.verdict import way_because, way_name
from wire.units import rate_text, seconds_text

COLUMNS: Final = (
    "to", "through", "measured (UTC)", "round trip p50", "p90", "jitter", "lost", "late", "there", "back", "verdict",
)  # fmt: skip
THROUGH: Final = {"direct": "the boards' own brokers", "central": "the site's broker"}


def way_line(pair: PairMeasurement) -> tuple[str, ...]:
    """One line under COLUMNS; '-' where samples are too few to say."""
    trips_s = pair.round_trip.samples_s
    measured_at = datetime.fromtimestamp(min(max(pair.measured_at_unix, 0.0), 4e9), timezone.utc)
    because = way_because(pair)
    return (
        clean(pair.peer),
        THROUGH[pair.way],
        f"{measured_at:%Y-%m-%d %H:%M}",
        _seconds(stats.median(trips_s) if trips_s else None),
        _seconds(stats.percentile(trips_s, 0.9) if trips_s else None),
        _seconds(pairs.jitter_s(trips_s)),
        f"{pair.lost} of {pair.sent}",
        f"{pair.late} of {pair.sent}",
        _rate(pair.there),
        _rate(pair.back),
        f"INVALID: {clean('; '.join(because))}" if because else "VALID",
    )


def way_plot(ways: Sequence[PairMeasurement]) -> Plot | NoPlot:
    """Which share of round trips to each board took at most so long."""
    title = "Ways to other boards: round trip"
    drawn = [pair for pair in ways if len(pair.round_trip.samples_s) > 1][:MOST_SERIES]
    if not drawn:
        return NoPlot(title=title, because="no way to another board was measured from this one")
    slowest_s = max(max(pair.round_trip.samples_s) for pair in drawn)
    return Plot(
        title=title,
        alt=f"Share of the round trips to each of {len(drawn)} boards that took at most so long; the slowest of all "
        f"{seconds_text(slowest_s)}. The table of ways has the figures.",
        x_label="round trip of a small message to another board and back",
        y_label="% took at most so long",
        series=tuple(_series(pair) for pair in drawn),
        seconds_x=True,
    )


def _series(pair: PairMeasurement) -> Series:
    ordered = sorted(pair.round_trip.samples_s)
    points = tuple(Point(value, (at + 1) / len(ordered) * 100) for at, value in enumerate(ordered))
    invalid = "; INVALID" if way_because(pair) else ""
    return Series(name=clean(f"{way_name(pair)}, {len(ordered)} round trips{invalid}"), points=points, marked=False)


def _seconds(value: float | None) -> str:
    return "-" if value is None else seconds_text(value)


def _rate(goodput: Goodput) -> str:
    rate = pairs.bytes_per_s(goodput)
    return "-" if rate is None else rate_text(rate)
