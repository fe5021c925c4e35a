"""Plots as SVG that stands by itself: no script, no font, nothing fetched, and no meaning in colour.

Everything is drawn in the colour of the text around it. Series differ by marker and by dashes, INVALID points are
crossed out and said so, and each plot says in words what it shows (`alt`).
"""

from __future__ import annotations

from html import escape
from math import ceil, floor, isfinite, log10
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

WIDTH: Final = 640
HEIGHT: Final = 300
LEFT: Final = 84
RIGHT: Final = 16
TOP: Final = 12
BOTTOM: Final = 46
LEGEND_LINE: Final = 18
DASHES: Final = ("none", "7 3", "2 3", "9 3 2 3", "4 4")
MARKERS: Final = ("circle", "square", "triangle", "diamond", "ring", "frame", "cross")
"""As many as DASHES have no common divisor with: 35 series differ."""
MOST_SERIES: Final = len(DASHES) * len(MARKERS)
MOST_TICKS: Final = 7


class Point(NamedTuple):
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    """Ends of the interval."""
    invalid: bool = False


class Series(Struct, frozen=True, kw_only=True):
    name: str
    points: tuple[Point, ...]
    marked: bool = True
    """False for curves of many points, which have a line only."""
    joined: bool = True
    """False where nothing is known between the points."""


class Plot(Struct, frozen=True, kw_only=True):
    title: str
    alt: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    seconds_x: bool = False
    seconds_y: bool = False
    """The axis counts seconds: it is labelled in us, ms or s."""
    x_ticks: tuple[float, ...] = ()
    """Where the axis has ticks; where that is not said, at round numbers."""


class NoPlot(Struct, frozen=True, kw_only=True):
    """A plot that the profile has nothing for."""

    title: str
    because: str


class _Axis(NamedTuple):
    low: float
    high: float
    log: bool
    begin: float
    end: float
    """Where low and high lie, in pixels."""

    def at(self, value: float) -> float:
        low, high = (log10(self.low), log10(self.high)) if self.log else (self.low, self.high)
        place = log10(value) if self.log else value
        return self.begin + (place - low) / (high - low) * (self.end - self.begin)


def svg(plot: Plot, name: str) -> str:
    """The plot as an SVG element whose parts have ids that begin with `name`, which must be unique on the page."""
    drawn = [series for series in (_drawable(plot, series) for series in plot.series[:MOST_SERIES]) if series.points]
    if not drawn:
        return f"<p>{escape(plot.title)}: nothing to draw</p>"
    points = [point for series in drawn for point in series.points]
    bounds = [bound for point in points for bound in (point.y, point.low, point.high) if bound is not None]
    x_axis = _axis([point.x for point in points], plot.log_x, LEFT, WIDTH - RIGHT, 0.04)
    y_axis = _axis(bounds, plot.log_y, HEIGHT - BOTTOM, TOP, 0.08)
    height = HEIGHT + LEGEND_LINE * len(drawn)
    parts = [
        f'<svg role="img" viewBox="0 0 {WIDTH} {height}" aria-labelledby="{name}-title {name}-alt">',
        f'<title id="{name}-title">{escape(plot.title)}</title><desc id="{name}-alt">{escape(plot.alt)}</desc>',
        *_frame(plot, x_axis, y_axis),
    ]
    for number, series in enumerate(drawn):
        parts += _curve(series, number, x_axis, y_axis)
        parts += _legend(series, number)
    return "\n".join([*parts, "</svg>"])


def _drawable(plot: Plot, series: Series) -> Series:
    """The series without what no axis can show: not finite, absurdly large, or nothing on a logarithmic axis."""

    def fits(value: float | None, log: bool) -> bool:
        return value is None or (isfinite(value) and abs(value) < 1e15 and (value > 1e-15 or not log))

    points = tuple(
        point
        for point in series.points
        if fits(point.x, plot.log_x) and all(fits(value, plot.log_y) for value in (point.y, point.low, point.high))
    )
    return msgspec.structs.replace(series, points=points)


def _axis(values: list[float], log: bool, begin: float, end: float, margin: float) -> _Axis:
    low, high = min(values), max(values)
    if log:
        spread = max(log10(high / low), 0.3)
        middle = (log10(high) + log10(low)) / 2
        half = spread * (0.5 + margin)
        return _Axis(10 ** (middle - half), 10 ** (middle + half), True, begin, end)
    if high - low <= max(1e-12, 1e-9 * max(abs(low), abs(high))):  # one value: some room around it
        around = abs(low) * 0.1 or 1.0
        return _Axis(low - around, high + around, False, begin, end)
    around = (high - low) * margin
    return _Axis(low - around, high + around, False, begin, end)


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers between `low` and `high`: of 1, 2 and 5 times powers of ten."""
    if log:
        first, last = floor(log10(low)), ceil(log10(high))
        for steps in ((1, 2, 5), (1,)):
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
            found = [value for value in found if low <= value <= high]
            if 2 <= len(found) <= MOST_TICKS:
                return found
        return found or [low, high]
    rough = (high - low) / (MOST_TICKS - 1)
    power = 10.0 ** floor(log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough)
    return [number * step for number in range(ceil(low / step), floor(high / step) + 1)]


class _Unit(NamedTuple):
    factor: float
    name: str

    def of(self, label: str) -> str:
        return f"{label}, {self.name}" if self.name else label

    def text(self, value: float) -> str:
        return f"{value * self.factor:.6g}"


def _unit(axis: _Axis, seconds: bool) -> _Unit:
    """The unit in which most of the axis has a few digits."""
    if not seconds:
        return _Unit(1.0, "")
    typical = 10 ** ((log10(axis.low) + log10(axis.high)) / 2) if axis.log else axis.high
    return _Unit(1.0, "s") if typical >= 1 else _Unit(1e3, "ms") if typical >= 1e-3 else _Unit(1e6, "us")


def _frame(plot: Plot, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    x_unit, y_unit = _unit(x_axis, plot.seconds_x), _unit(y_axis, plot.seconds_y)
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>']
    for value in plot.x_ticks or ticks(x_axis.low, x_axis.high, x_axis.log):
        x = x_axis.at(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{x_unit.text(value)}</text>')
    for value in ticks(y_axis.low, y_axis.high, y_axis.log):
        y = y_axis.at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_unit.text(value)}</text>')
    middle = (TOP + bottom) / 2
    label = escape(x_unit.of(plot.x_label))
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 36}" text-anchor="middle">{label}</text>')
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        f"{escape(y_unit.of(plot.y_label))}</text>"
    )
    return parts


def _curve(series: Series, number: int, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    places = [(x_axis.at(point.x), y_axis.at(point.y)) for point in series.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts = [f'<path class="line" stroke-dasharray="{DASHES[number % len(DASHES)]}" d="M{path}"/>'] * series.joined
    for point, (x, y) in zip(series.points, places, strict=True):
        if point.low is not None and point.high is not None:
            low, high = y_axis.at(point.low), y_axis.at(point.high)
            ends = f"M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"
            parts.append(f'<path class="bar" d="M{x:.1f} {low:.1f}V{high:.1f}{ends}"/>')
        if series.marked:
            parts.append(_marker(MARKERS[number % len(MARKERS)], x, y))
        if point.invalid:
            parts.append(f'<path class="cross" d="M{x - 8:.1f} {y - 8:.1f}l16 16m0 -16l-16 16"/>')
    return parts


def _marker(kind: str, x: float, y: float) -> str:
    if kind in ("circle", "ring"):
        return f'<circle class="{"solid" if kind == "circle" else "hollow"}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    shapes = {
        "square": ("solid", "m-4 -4h8v8h-8z"),
        "frame": ("hollow", "m-4 -4h8v8h-8z"),
        "triangle": ("hollow", "m0 -5l5 9h-10z"),
        "diamond": ("solid", "m0 -6l5 6l-5 6l-5 -6z"),
        "cross": ("hollow", "m-5 0h10m-5 -5v10"),
    }
    style, shape = shapes[kind]
    return f'<path class="{style}" d="M{x:.1f} {y:.1f}{shape}"/>'


def _legend(series: Series, number: int) -> list[str]:
    y = HEIGHT + LEGEND_LINE * number + 6
    parts = [
        f'<path class="line" stroke-dasharray="{DASHES[number % len(DASHES)]}" d="M{LEFT} {y}h44"/>'
    ] * series.joined
    if series.marked:
        parts.append(_marker(MARKERS[number % len(MARKERS)], LEFT + 22, y))
    crossed = "; crossed out: INVALID" if any(point.invalid for point in series.points) else ""
    parts.append(f'<text x="{LEFT + 54}" y="{y + 4}">{escape(series.name + crossed)}</text>')
    return parts
