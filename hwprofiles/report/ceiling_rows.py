"""Ceilings, disk, codecs, and what modules make of them, as tables; and the roofline as a plot. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from hwprofiles.ceilings import Achieved, achieved, best, interval_per_second, per_second, reading
from hwprofiles.coding import RULE as CODING_RULE
from hwprofiles.disk import RULE as DISK_RULE
from hwprofiles.plain import clean
from hwprofiles.profile import NOT_MEASURED, Profile
from hwprofiles.report.plots import NoPlot, Plot, Point, Series
from hwprofiles.report.rows import ITEMS, Column, Table, said, step_name, verdict
from hwprofiles.samples import Ceilings, Codings, DiskMeasurement, Rate
from hwprofiles.stats import median, median_interval
from wire.units import bytes_text, seconds_text

TITLE: Final = "Roofline"
_COLUMNS: Final = (Column("what"), Column("rate"), Column("95 %", 1), Column("n", 2), Column("verdict"))


def gigabytes(bytes_per_s: float) -> str:
    """Powers of 1000, as memory is sold: '12.3 GB/s'."""
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"


def operations(per_s: float) -> str:
    return f"{per_s / 1e9:.1f} Gop/s"


def tables(profile: Profile) -> tuple[Table, ...]:
    return (_ceilings(profile), *_achieved(profile), _disk(profile), *_codings(profile))


def _ceilings(profile: Profile) -> Table:
    found = profile.ceilings
    if not isinstance(found, Ceilings):
        return Table(title="Ceilings", columns=ITEMS, rows=(("ceilings", said(found)),), headed=False)
    lines = [_rate(f"memory: {rate.what}", rate, gigabytes) for rate in found.memory]
    lines += [_rate(f"products: {rate.what}", rate, operations) for rate in found.products]
    lines += [(clean(what), "-", "-", "-", f"absent: {clean(because)}") for what, because in found.without.items()]
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    arrays = f"arrays of {bytes_text(found.array_bytes)}" if found.array_bytes else "no arrays"
    cache = f"last cache {bytes_text(found.cache_bytes)}" if found.cache_bytes else "size of the last cache unknown"
    return Table(
        title=clean(f"Ceilings, {threads}: {arrays}, {cache}; {found.engine}"), columns=_COLUMNS, rows=tuple(lines)
    )


def _rate(what: str, rate: Rate, show: Callable[[float], str]) -> tuple[str, ...]:
    middle, ends = per_second(rate), interval_per_second(rate)
    return (
        clean(what),
        "-" if middle is None else show(middle),
        "-" if ends is None else f"{show(ends[0])} to {show(ends[1])}",
        str(len(rate.samples.samples_s)),
        verdict(rate.samples),
    )


def _achieved(profile: Profile) -> tuple[Table, ...]:
    """Of each module: weights a second beside the rate of memory, operations a second beside that of products."""
    if not isinstance(profile.ceilings, Ceilings):
        return ()
    lines = [
        (
            clean(one.key),
            step_name(one.phase, one.tokens),
            gigabytes(one.bytes_per_s),
            _share(one.memory_share),
            operations(one.operations_per_s),
            _share(one.product_share),
        )
        for module in profile.modules
        for one in achieved(module, profile.ceilings)
    ]
    columns = (
        Column("module"), Column("step"), Column("weights"), Column("of memory"), Column("operations", 2),
        Column("of products"),
    )  # fmt: skip
    title = "What modules make of the ceilings, derived; a step's own cost is not in it"
    return (Table(title=title, columns=columns, rows=tuple(lines)),) if lines else ()


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _disk(profile: Profile) -> Table:
    found = profile.disk
    if not isinstance(found, DiskMeasurement):
        return Table(title="Disk", columns=ITEMS, rows=(("disk", said(found)),), headed=False)
    lines = []
    for what, samples in (("write, until it is on the disk", found.write), ("read, not from memory", found.read)):
        rate = Rate(what=what, amount=found.chunk_bytes, samples=samples)
        lines.append((*_rate(what, rate, gigabytes)[:-1], verdict(samples, DISK_RULE)))
    return Table(
        title=clean(f"Disk: {found.filesystem} under {found.folder}, chunks of {bytes_text(found.chunk_bytes)}"),
        columns=_COLUMNS,
        rows=tuple(lines),
    )


def _codings(profile: Profile) -> tuple[Table, ...]:
    """Nothing where it was not tried: profiles of before have none."""
    found = profile.codings
    if found == NOT_MEASURED:
        return ()
    if not isinstance(found, Codings):
        return (Table(title="Codecs", columns=ITEMS, rows=(("codecs", said(found)),), headed=False),)
    lines = []
    for one in found.timings:
        taken_s = one.samples.samples_s
        ends = median_interval(taken_s)
        lines.append(
            (
                clean(f"{one.wire_dtype} as {one.codec}, {one.rows} row{'s' * (one.rows > 1)}"),
                seconds_text(median(taken_s)) if taken_s else "-",
                f"{seconds_text(ends[0])} to {seconds_text(ends[1])}" if ends else "-",
                str(one.samples.taken or len(taken_s)),
                verdict(one.samples, CODING_RULE),
            )
        )
    title = f"Codecs: to code and decode rows of {found.width}, one thread"
    return (Table(title=title, columns=(_COLUMNS[0], Column("time", 1), *_COLUMNS[2:]), rows=tuple(lines)),)


def roofline(profile: Profile) -> Plot | NoPlot:
    """Operations a second against operations for each byte of weights (Williams, Waterman, Patterson, 2009)."""
    found = profile.ceilings
    if not isinstance(found, Ceilings):
        return NoPlot(title=TITLE, because=clean(found.because))
    points = [one for module in profile.modules for one in achieved(module, found)]
    memory, peak = reading(found), best(found.products)
    if memory is None or peak is None or not points:
        missing = "; ".join(found.without.values()) or "no module has a valid time and known weights"
        return NoPlot(title=TITLE, because=clean(missing))
    low = min([one.intensity for one in points] + [peak / memory]) / 2
    high = max([one.intensity for one in points] + [peak / memory]) * 2
    roofs = [
        _roof(f"reach of memory at {gigabytes(memory)} and products of {rate.what} matrices", memory, limit, low, high)
        for rate in found.products
        if (limit := per_second(rate)) is not None
    ]
    nearest = max(points, key=lambda one: _reached(one, memory, peak))
    return Plot(
        title=TITLE,
        alt=f"Operations a second against operations for each byte of weights. Memory gives {gigabytes(memory)}, "
        f"products {operations(peak)} at most. Nearest to its ceiling is {clean(nearest.key)}, {nearest.phase} of "
        f"{nearest.tokens}: {_reached(nearest, memory, peak):.0%}.",
        x_label="operations for each byte of weights",
        y_label="10^9 operations a second",
        series=(*roofs, *_dots(points)),
        log_x=True,
        log_y=True,
    )


def _reached(one: Achieved, memory: float, peak: float) -> float:
    return one.operations_per_s / min(peak, one.intensity * memory)


def _roof(name: str, memory: float, limit: float, low: float, high: float) -> Series:
    knee = min(max(limit / memory, low), high)
    corners = tuple(Point(x, min(limit, x * memory) / 1e9) for x in (low, knee, high))
    return Series(name=clean(name), points=corners, marked=False)


def _dots(points: list[Achieved]) -> list[Series]:
    by_key: dict[str, list[Achieved]] = {}
    for one in points:
        by_key.setdefault(one.key, []).append(one)
    return [
        Series(
            name=clean(f"{key}: {', '.join(str(one.tokens) for one in of)} tokens"),
            points=tuple(Point(one.intensity, one.operations_per_s / 1e9) for one in of),
            joined=False,
        )
        for key, of in by_key.items()
    ]
