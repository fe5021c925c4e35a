"""Profile -> its plots, pure: each drawn from what was measured, or absent with the reason."""

from __future__ import annotations

from hwprofiles import stats
from hwprofiles.plain import clean
from hwprofiles.profile import LinkMeasurement, ModuleMeasurement, Profile, Samples
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.report.ceiling_rows import roofline
from hwprofiles.report.heat_rows import course_plots, energy_plot, sustained_plots
from hwprofiles.report.plots import NoPlot, Plot, Point, Series
from hwprofiles.report.verdict import run_because
from hwprofiles.report.ways import way_plot
from hwprofiles.samples import Course
from wire.units import seconds_text


def plots(profile: Profile) -> tuple[Plot | NoPlot, ...]:
    """In the order of the report: modules, ceilings, link, ways, heat, clocks, power, continued load, energy."""
    held = profile.conditions
    over_time = course_plots(profile.course) if isinstance(profile.course, Course) else {}
    ends = {
        "Temperature": ("degrees Celsius", held.temperature_c_before, held.temperature_c_after, 1.0),
        "Clock": ("MHz", held.clock_hz_before, held.clock_hz_after, 1e-6),
    }
    return (
        *(latency(module) for module in profile.modules),
        roofline(profile),
        round_trips(profile.link),
        *((way_plot(profile.pairs),) if profile.pairs else ()),
        *(over_time.get(title) or _ends(profile, title, *ends[title]) for title in ends),
        *(plot for title, plot in over_time.items() if title not in ends),
        *sustained_plots(profile.sustained),
        energy_plot(profile.energy),
    )


def latency(module: ModuleMeasurement) -> Plot | NoPlot:
    """Time of a step against its tokens, one series per context and depth."""
    where = "" if module.engine == "onnxruntime" else f" on {module.engine}"
    title = clean(f"Latency against tokens: {module.key}{where}")
    tokens = sorted({timing.tokens for timing in module.timings if timing.samples.samples_s})
    if len(tokens) < 2:
        return NoPlot(title=title, because="timed at one number of tokens only" if tokens else "nothing was timed")
    by_series: dict[tuple[int, int], list[Point]] = {}
    for timing in sorted(module.timings, key=lambda timing: timing.tokens):
        if timing.samples.samples_s:
            by_series.setdefault((timing.stack, timing.context), []).append(
                _point(float(timing.tokens), timing.samples)
            )
    series = tuple(
        Series(name=f"{stack} stacked, behind {context} rows", points=tuple(points))
        for (stack, context), points in sorted(by_series.items())
    )
    points = [point for one in series for point in one.points]
    return Plot(
        title=title,
        alt=f"Median time of a step with its 95 % interval, for {tokens[0]} to {tokens[-1]} tokens in a step: "
        f"from {seconds_text(min(point.y for point in points))} to {seconds_text(max(point.y for point in points))}. "
        "The tables below have the figures.",
        x_label="tokens in a step",
        y_label="time of a step",
        series=series,
        log_x=True,
        log_y=True,
        seconds_y=True,
        x_ticks=tuple(float(count) for count in tokens) if len(tokens) <= 8 else (),
    )


def _point(x: float, samples: Samples) -> Point:
    low, high = stats.median_interval(samples.samples_s) or (None, None)
    return Point(x, stats.median(samples.samples_s), low, high, bool(run_because(samples)))


def round_trips(link: LinkMeasurement | Absent | Failed) -> Plot | NoPlot:
    """Which share of round trips took at most so long."""
    title = "Link: round trip"
    if not isinstance(link, LinkMeasurement):
        return NoPlot(title=title, because=clean(link.because))
    ordered = sorted(link.round_trip.samples_s)
    if len(ordered) < 2:
        return NoPlot(title=title, because=f"{len(ordered)} samples")
    points = tuple(Point(value, (at + 1) / len(ordered) * 100) for at, value in enumerate(ordered))
    invalid = "; INVALID" if run_because(link.round_trip) else ""
    return Plot(
        title=title,
        alt=f"Share of {len(ordered)} round trips that took at most so long: the fastest {seconds_text(ordered[0])}, "
        f"the median {seconds_text(stats.median(ordered))}, the slowest {seconds_text(ordered[-1])}{invalid}.",
        x_label=f"round trip of {link.round_trip_payload_bytes} bytes to the broker and back{invalid}",
        y_label="% took at most so long",
        series=(Series(name=clean(f"{len(ordered)} round trips to {link.broker}"), points=points, marked=False),),
        seconds_x=True,
    )


def _ends(
    profile: Profile,
    title: str,
    unit: str,
    before: Reading[float] | Absent | Failed,
    after: Reading[float] | Absent | Failed,
    factor: float,
) -> Plot | NoPlot:
    """A condition before and after, where nothing was read between."""
    title = f"{title} over time"
    if not isinstance(before, Reading):
        return NoPlot(title=title, because=clean(before.because))
    if not isinstance(after, Reading):
        return NoPlot(title=title, because=clean(after.because))
    first, last = before.value * factor, after.value * factor
    return Plot(
        title=title,
        alt=f"{first:.6g} {unit} before and {last:.6g} {unit} after {seconds_text(profile.conditions.duration_s)} of "
        "measuring. What was between was not read.",
        x_label="time since the measurement began",
        y_label=unit,
        series=(
            Series(
                name=clean(f"{after.source}; read before and after only"),
                points=(Point(0.0, first), Point(profile.conditions.duration_s, last)),
                joined=False,
            ),
        ),
        seconds_x=True,
    )
