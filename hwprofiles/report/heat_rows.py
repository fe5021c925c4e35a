"""Temperature, clocks and power over time, energy, and speed under continued load: tables and plots. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hwprofiles.energy import token_j, token_j_above_idle
from hwprofiles.plain import clean
from hwprofiles.profile import Profile
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.report.plots import NoPlot, Plot, Point, Series
from hwprofiles.report.rows import ITEMS, Column, Table, said
from hwprofiles.samples import Course, EnergyMeasurement, EnergyRun, Moment, Sustained, Window
from hwprofiles.sustained import LEAST_WINDOWS, SLOWER, speeds
from wire.units import seconds_text

ENERGY: Final = "Energy"
SUSTAINED: Final = "Speed under continued load"


def tables(profile: Profile) -> tuple[Table, ...]:
    return (_heat(profile.course), _energy(profile.energy), _sustained(profile.sustained))


def _items(title: str, *lines: tuple[str, str]) -> Table:
    return Table(title=title, columns=ITEMS, rows=lines, headed=False)


def _heat(course: Course | Absent | Failed) -> Table:
    title = "While modules were measured"
    if not isinstance(course, Course):
        return _items(title, ("course", said(course)))
    lines = [
        (name, _range([value for moment in course.moments if (value := of(moment)) is not None], unit, factor))
        for name, of, unit, factor in (
            ("temperature", _celsius, "C", 1.0),
            ("clock", _clock, "MHz", 1e-6),
            ("clock of the GPU", _gpu_clock, "MHz", 1e-6),
            ("power", _watts, "W", 1.0),
        )
    ]
    power = course.power if not isinstance(course.power, Reading) else None
    lines = [(name, said(power) if name == "power" and power else text) for name, text in lines if text or power]
    others = course.processor_share
    return _items(
        title,
        *((name, text) for name, text in lines if text),
        ("used by others", "unknown" if others is None else f"{others:.0%} of the processor"),
    )


def _range(values: list[float], unit: str, factor: float) -> str:
    if not values:
        return ""
    first, last, low, high = (value * factor for value in (values[0], values[-1], min(values), max(values)))
    return f"{first:.4g} {unit} at first, {last:.4g} at last, {low:.4g} to {high:.4g} ({len(values)} moments)"


def _celsius(moment: Moment) -> float | None:
    return moment.celsius


def _clock(moment: Moment) -> float | None:
    return moment.clock_hz


def _gpu_clock(moment: Moment) -> float | None:
    return moment.gpu_clock_hz


def _watts(moment: Moment) -> float | None:
    return moment.watts


def _energy(found: EnergyMeasurement | Absent | Failed) -> Table:
    if not isinstance(found, EnergyMeasurement):
        return _items(ENERGY, ("joules", f"unknown, not zero: {said(found)}"))
    idle = f"{found.idle_w.value:.2f} W" if isinstance(found.idle_w, Reading) else said(found.idle_w)
    lines = [
        (
            clean(run.key),
            f"{run.phase} {run.tokens}, depth {run.stack}",
            _joules(token_j(run), run),
            _joules(token_j_above_idle(run, found.idle_w), run),
            f"{run.steps} steps in {seconds_text(run.duration_s)}",
        )
        for run in found.runs
    ]
    columns = (Column("module"), Column("step"), Column("a token"), Column("above idle"), Column("of", 2))
    title = clean(f"{ENERGY}: {found.covers}; {found.meter}, not wall; idle {idle}")
    return Table(title=title, columns=columns, rows=tuple(lines))


def _joules(joules: float | None, run: EnergyRun) -> str:
    if joules is None:
        return f"unknown: {clean(run.joules.because)}" if not isinstance(run.joules, Reading) else "unknown"
    return f"{joules * 1e3:.3g} mJ" if joules < 1 else f"{joules:.3g} J"


def _sustained(found: Sustained | Absent | Failed) -> Table:
    if not isinstance(found, Sustained):
        return _items(SUSTAINED, ("sustained", said(found)))
    step = f"{found.phase} {found.tokens} behind {found.context} rows, depth {found.stack}"
    speed = speeds(found)
    if speed is None:
        few = f"INVALID: {len(found.windows)} windows, at least {LEAST_WINDOWS} are needed"
        return _items(SUSTAINED, ("step", clean(f"{found.key}: {step}")), ("speed", few))
    ends = speed.sustained_interval_s
    known = "" if ends is None else f" (95 %: {seconds_text(ends[0])} to {seconds_text(ends[1])})"
    seen = [window.throttled for window in found.windows if window.throttled is not None]
    throttling = "unknown: " + said(found.throttling) if not seen else "not seen"
    if speed.throttled_at_s is not None:
        throttling = f"seen from {seconds_text(speed.throttled_at_s)} on"
    hot = [window.celsius for window in found.windows if window.celsius is not None]
    others = found.processor_share
    return _items(
        f"{SUSTAINED}: {seconds_text(found.windows[-1].end_s)}, {len(found.windows)} windows",
        ("step", clean(f"{found.key}: {step}")),
        ("cool", f"{seconds_text(speed.cool_s)} a step"),
        ("sustained", f"{seconds_text(speed.sustained_s)} a step{known}"),
        ("slowdown", f"{speed.slowdown:.2f} times as long{'' if speed.slowdown < SLOWER else ': slower when hot'}"),
        ("throttling", throttling),
        ("temperature", f"{hot[0]:.1f} C at first, {max(hot):.1f} at most" if hot else "unknown"),
        ("used by others", "unknown" if others is None else f"{others:.0%} of the processor"),
    )


# Plots.


def course_plots(course: Course) -> dict[str, Plot]:
    """What is known at two moments at least, by the name of the condition."""
    found = {}
    for name, unit, of, factor in (
        ("Temperature", "degrees Celsius", _celsius, 1.0),
        ("Clock", "MHz", _clock, 1e-6),
        ("Clock of the GPU", "MHz", _gpu_clock, 1e-6),
        ("Power", "W", _watts, 1.0),
    ):
        points = _points([(one.at_s, of(one)) for one in course.moments], factor)
        if len(points) >= 2:
            covers = course.covers if name == "Power" else "while modules were measured"
            found[name] = _timeline(f"{name} over time", unit, covers, points)
    return found


def _points(taken: list[tuple[float, float | None]], factor: float) -> list[Point]:
    return [Point(at_s, value * factor) for at_s, value in taken if value is not None]


def _timeline(title: str, unit: str, name: str, points: list[Point]) -> Plot:
    low, high = min(point.y for point in points), max(point.y for point in points)
    return Plot(
        title=title,
        alt=f"{clean(name)}: {points[0].y:.4g} {unit} at first, {points[-1].y:.4g} after {seconds_text(points[-1].x)}, "
        f"between {low:.4g} and {high:.4g}.",
        x_label="time since it began",
        y_label=unit,
        series=(Series(name=clean(name), points=tuple(points), marked=len(points) <= 12),),
        seconds_x=True,
    )


def energy_plot(found: EnergyMeasurement | Absent | Failed) -> Plot | NoPlot:
    """Joules a token against tokens in a step."""
    if not isinstance(found, EnergyMeasurement):
        return NoPlot(title=ENERGY, because=clean(f"unknown, not zero: {found.because}"))
    of: tuple[tuple[str, Callable[[EnergyRun], float | None]], ...] = (
        ("idle included", token_j),
        ("above idle", lambda run: token_j_above_idle(run, found.idle_w)),
    )
    series = []
    for name, joules in of:
        points = [Point(float(run.tokens), value) for run in found.runs if (value := joules(run))]
        if points:
            series.append(Series(name=name, points=tuple(sorted(points))))
    if not series:
        reasons = [run.joules.because for run in found.runs if not isinstance(run.joules, Reading)]
        return NoPlot(title=ENERGY, because=clean("; ".join(dict.fromkeys(reasons)) or "nothing was measured"))
    return Plot(
        title=ENERGY,
        alt=f"Joules for each token through the stack, {clean(found.covers)}. The table has the figures.",
        x_label="tokens in a step",
        y_label="joules a token",
        series=tuple(series),
        log_x=True,
        log_y=True,
    )


def sustained_plots(found: Sustained | Absent | Failed) -> tuple[Plot | NoPlot, ...]:
    """Time of a step over time, and temperature and clock if they were known."""
    if not isinstance(found, Sustained):
        return (NoPlot(title=SUSTAINED, because=clean(found.because)),)
    if len(found.windows) < 2:
        return (NoPlot(title=SUSTAINED, because=f"{len(found.windows)} windows"),)
    step = f"{found.key}, {found.phase} of {found.tokens}, {found.stack} stacked"
    speed = speeds(found)
    ratio = "" if speed is None else f" At the end a step takes {speed.slowdown:.2f} times as long as at first."
    plain = [Point(one.end_s, one.step_s) for one in found.windows if not one.throttled]
    throttled = [Point(one.end_s, one.step_s) for one in found.windows if one.throttled]
    shown = [Series(name=clean(step), points=tuple(plain), marked=len(plain) <= 40)] if plain else []
    if throttled:
        shown.append(Series(name="throttled", points=tuple(throttled), joined=False))
    first = Plot(
        title=SUSTAINED,
        alt=f"Median time of a step in each of {len(found.windows)} windows.{ratio}",
        x_label="time under load",
        y_label="time of a step",
        series=tuple(shown),
        seconds_x=True,
        seconds_y=True,
    )
    others = [
        _timeline(f"{name} under continued load", unit, "sustained run", points)
        for name, unit, factor, of in (
            ("Temperature", "degrees Celsius", 1.0, _window_celsius),
            ("Clock", "MHz", 1e-6, _window_clock),
        )
        if len(points := _points([(one.end_s, of(one)) for one in found.windows], factor)) >= 2
    ]
    return (first, *others)


def _window_celsius(window: Window) -> float | None:
    return window.celsius


def _window_clock(window: Window) -> float | None:
    return window.clock_hz
