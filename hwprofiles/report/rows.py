"""Profile -> tables of plain text, pure. No number without its unit, its spread and whether it may be believed.

What was not measured appears with its reason. Text that came from a board is cleaned of control characters, since it
may come over the network and end in a terminal.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Final

from msgspec import Struct

from hwprofiles import link as link_figures
from hwprofiles import stats
from hwprofiles.conditions import LONG_QUOTA_PERIOD_S
from hwprofiles.measure import StepEstimate, StopRule, estimate
from hwprofiles.plain import clean
from hwprofiles.profile import LinkMeasurement, ModuleMeasurement, PairMeasurement, Phase, Profile, Samples
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.report.verdict import RUN_RULE, in_all, run_because, sections
from hwprofiles.report.ways import COLUMNS, way_line
from hwprofiles.spoiled import conditions_because
from wire.units import bytes_text, rate_text, seconds_text

ALWAYS: Final = 0
"""Rank of a column that is never dropped; the others go from the highest rank down when the screen is narrow."""

NAGLE_ROUND_TRIPS_S: Final = ((0.040, 0.048), (0.080, 0.096))
"""A small round trip of one or two delayed acknowledgements (40 ms on Linux) and little else: Nagle's algorithm is on
at one or both ends."""

SHOWN_REASONS: Final = 3
"""Reasons of one verdict that tables show; the document has all."""

SHORT_SAMPLE_S: Final = 1e-3
"""Below a millisecond interrupts and timers are a visible share of each sample."""


class Column(Struct, frozen=True):
    title: str
    rank: int = ALWAYS


class Table(Struct, frozen=True, kw_only=True):
    """Each row has one cell per column. The last column may be long; a renderer wraps it."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    headed: bool = True
    """False where the column titles say nothing that the rows don't."""


ITEMS: Final = (Column("item"), Column("value"))


def rows(profile: Profile, doubt: str = "") -> tuple[Table, ...]:
    """Everything the profile says, in the order verdict, board, conditions, modules, link."""
    tables = [_verdicts(profile, doubt), _board(profile), _conditions(profile)]
    for module in profile.modules:
        tables.append(_timings(module))
        if len({timing.stack for timing in module.timings}) > 1:  # from one depth, cost and time are the same
            tables.append(_costs(module))
    if profile.failed:
        reasons = tuple((clean(key), clean(because)) for key, because in sorted(profile.failed.items()))
        tables.append(Table(title="not measured", columns=(Column("module"), Column("because")), rows=reasons))
    return (*tables, _link(profile.link), *_ways(profile.pairs))


def origin(profile: Profile) -> str:
    """One line: whose profile it is, and whether its figures were measured on a real board."""
    device = clean(profile.identity.device)
    if profile.source == "live":
        return f"profile of {device}: measured live"
    if profile.source == "replayed":
        return f"profile of {device}: REPLAYED from a recording, not measured now"
    return f"profile of {device}: EMULATED ({clean(profile.emulation) or 'nothing said how'}), not a real board's speed"


def warnings(profile: Profile) -> tuple[str, ...]:
    """What a reader must know before believing a figure; empty if there is nothing."""
    found: list[str] = []
    conditions = profile.conditions
    period = conditions.quota_period_s
    if isinstance(period, Reading) and period.value > LONG_QUOTA_PERIOD_S:
        found.append(
            f"processor quota with a period of {seconds_text(period.value)}: short steps run at full speed and then "
            f"wait, so times come in two kinds; set the period to {seconds_text(LONG_QUOTA_PERIOD_S)} or less"
        )
    if isinstance(conditions.quota_cores, Reading) and conditions.allow_spinning:
        found.append("allow_spinning is on under a processor quota: waiting threads burn the quota")
    found += [clean(text) for text in conditions_because(profile)]
    if isinstance(profile.link, LinkMeasurement) and profile.link.round_trip.samples_s:
        middle_s = stats.median(profile.link.round_trip.samples_s)
        if any(low <= middle_s <= high for low, high in NAGLE_ROUND_TRIPS_S):
            found.append(
                f"round trip of {seconds_text(middle_s)} may be Nagle's algorithm with delayed acknowledgements: "
                "TCP_NODELAY must be set in the broker too (mosquitto: set_tcp_nodelay true)"
            )
    timings = [timing for module in profile.modules for timing in module.timings]
    invalid = sum(bool(run_because(timing.samples)) for timing in timings)
    if invalid:
        found.append(f"{invalid} of {len(timings)} timings INVALID, for the reasons given with them")
    return tuple(found)


def _verdicts(profile: Profile, doubt: str) -> Table:
    """In all and part by part; the reasons of single runs stand with the runs."""
    judged = sections(profile)
    whole, because = in_all(profile, judged)
    if doubt:
        whole, because = "INVALID", (f"not believed: the board {doubt}", *because)
    lines = [("in all", whole, _counted(because))]
    lines += [(clean(part.name), part.verdict, _counted(part.because)) for part in judged]
    return Table(title="Verdict", columns=(Column("part"), Column("verdict"), Column("because")), rows=tuple(lines))


def _counted(because: tuple[str, ...]) -> str:
    """The first reasons, and how many more there are."""
    shown, more = because[:SHOWN_REASONS], len(because) - SHOWN_REASONS
    return clean("; ".join(shown)) + (f"; and {more} more" if more > 0 else "") or "-"


def said(reading: Reading[str] | Absent | Failed) -> str:
    """A reading's value, or why there is none."""
    if isinstance(reading, Reading):
        return clean(reading.value)
    return f"{'absent' if isinstance(reading, Absent) else 'FAILED'}: {clean(reading.because)}"


def _bytes(reading: Reading[int] | Absent | Failed) -> str:
    if isinstance(reading, Reading):
        return f"{bytes_text(reading.value)} ({clean(reading.source)})"
    return said(reading)


def _hertz(reading: Reading[float] | Absent | Failed) -> str:
    return f"{reading.value / 1e6:.0f} MHz" if isinstance(reading, Reading) else said(reading)


def _celsius(reading: Reading[float] | Absent | Failed) -> str:
    if isinstance(reading, Reading):
        return f"{reading.value:.1f} C ({clean(reading.source)})"
    return said(reading)


def _board(profile: Profile) -> Table:
    identity, memory, cores = profile.identity, profile.memory, profile.cores
    accelerators = identity.accelerators
    lines = [
        ("board", said(identity.board)),
        ("processor", said(identity.cpu)),
        ("architecture", clean(identity.arch)),
        ("system", said(identity.os)),
        (
            "accelerators",
            clean("; ".join(accelerators.value)) if isinstance(accelerators, Reading) else said(accelerators),
        ),
        ("cores", f"{cores.usable:g} usable ({clean(cores.because)})"),
        ("memory", f"{bytes_text(memory.usable_bytes)} usable{', shared with the GPU' if memory.unified else ''}"),
        ("memory of host", _bytes(memory.total_bytes)),
        ("memory available", _bytes(memory.available_bytes)),
        ("memory limit", _bytes(memory.limit_bytes)),
    ]
    lines += [(f"engine {clean(name)}", said(found)) for name, found in sorted(profile.engines.items())]
    if isinstance(identity.power_modes, Reading):
        lines.append(("power modes", clean(", ".join(identity.power_modes.value))))
    for interface in identity.interfaces:
        speed = interface.link_bits_per_s
        known = [
            "wireless" if interface.wireless else "wired or virtual",
            f"{speed.value / 1e6:.0f} Mbit/s negotiated" if isinstance(speed, Reading) else "",
            *interface.addresses,
        ]
        lines.append((f"interface {clean(interface.name)}", clean(", ".join(filter(None, known)))))
    return Table(title="Board", columns=ITEMS, rows=tuple(lines), headed=False)


def _conditions(profile: Profile) -> Table:
    held = profile.conditions
    engines = ", ".join(f"{name} {version}" for name, version in sorted(held.engine_versions.items()))
    quota = f"{held.quota_cores.value:g} cores" if isinstance(held.quota_cores, Reading) else said(held.quota_cores)
    if isinstance(held.quota_period_s, Reading):
        quota += f" per {seconds_text(held.quota_period_s.value)}"
    measured_at = datetime.fromtimestamp(min(max(held.measured_at_unix, 0.0), 4e9), timezone.utc)
    lines = (
        ("measured", f"{measured_at:%Y-%m-%d %H:%M} UTC, in {seconds_text(held.duration_s)}"),
        *_duration(profile),
        ("software", clean(f"edgelam {held.software}, Python {held.python}, {engines or 'no engine'}")),
        ("kernel", clean(held.kernel)),
        ("allowed cores", ", ".join(map(str, held.affinity)) or "unknown"),
        ("quota", quota),
        ("allow_spinning", "on" if held.allow_spinning else "off"),
        ("governor", said(held.governor)),
        *((("power mode", said(held.power_mode)),) if not isinstance(held.power_mode, Absent) else ()),
        ("clock", _both(_hertz(held.clock_hz_before), _hertz(held.clock_hz_after))),
        ("temperature", _both(_celsius(held.temperature_c_before), _celsius(held.temperature_c_after))),
        ("throttling", _both(said(held.throttle_before), said(held.throttle_after))),
        ("load", _both(f"{held.load_before:.2f}", f"{held.load_after:.2f}")),
        ("timer", clean(held.timer)),
    )
    return Table(title="Conditions", columns=ITEMS, rows=lines, headed=False)


def _duration(profile: Profile) -> tuple[tuple[str, str], ...]:
    """How long all modules took together, which may have been measured at several times."""
    known = [module.took_s for module in profile.modules if module.took_s]
    if not known:
        return ()
    return (("modules took", f"{seconds_text(sum(known))} in all, {len(known)} of them"),)


def _both(before: str, after: str) -> str:
    return before if before == after else f"before: {before}; after: {after}"


def verdict(samples: Samples, rule: StopRule = RUN_RULE) -> str:
    """'VALID', or 'INVALID: why'."""
    because = run_because(samples, rule)
    return f"INVALID: {clean('; '.join(because))}" if because else "VALID"


def _figures(samples: Samples) -> tuple[str, str, str, str]:
    """Median, half its 95 % interval, p90 and n as text; '-' where samples are too few to say."""
    values = samples.samples_s
    if not values:
        return "-", "-", "-", "0"
    width, high = stats.relative_half_width(values), stats.percentile(values, 0.9)
    count = f"{len(values)} of {samples.taken}" if samples.taken else str(len(values))
    return (
        seconds_text(stats.median(values)),
        "-" if width is None else f"{width:.1%}",
        "-" if high is None else seconds_text(high),
        count,
    )


def _remarks(samples: Samples) -> str:
    """Verdict, and what else is worth a word about the samples."""
    said = [verdict(samples)]
    strays = len(stats.outliers(samples.samples_s))
    if strays:
        said.append(f"{strays} outliers")
    if samples.samples_s and stats.median(samples.samples_s) < SHORT_SAMPLE_S:
        said.append("below 1 ms")
    return ", ".join(said)


_FIGURES: Final = (Column("median"), Column("+-95 %", 1), Column("p90", 3), Column("n", 2))


def _titled(module: ModuleMeasurement, what: str) -> str:
    threads = f"{module.threads} thread{'' if module.threads == 1 else 's'}"
    return clean(f"{module.kind.capitalize()} {module.key}, {module.engine}, {threads}: {what}")


def step_name(phase: Phase, tokens: int) -> str:
    """'decode 1', 'decode 4 requests', 'prefill 32'."""
    return f"{phase} {tokens}{' requests' * (phase == 'decode' and tokens > 1)}"


def _timings(module: ModuleMeasurement) -> Table:
    lines = [
        (
            step_name(timing.phase, timing.tokens),
            str(timing.context),
            str(timing.stack),
            *_figures(timing.samples),
            _remarks(timing.samples),
        )
        for timing in module.timings
    ]
    return Table(
        title=_titled(
            module, f"steps as timed; {bytes_text(module.resident_bytes)} while the deepest stack was loaded"
        ),
        columns=(Column("step"), Column("context"), Column("depth"), *_FIGURES, Column("verdict")),
        rows=tuple(lines),
    )


def _costs(module: ModuleMeasurement) -> Table:
    return Table(
        title=_titled(module, "cost of one, derived"),
        columns=(
            Column("step"),
            Column("context"),
            Column("each"),
            Column("95 %", 2),
            Column("per step", 1),
            Column("derived from"),
        ),
        rows=tuple(_cost(step) for step in estimate(module).steps),
    )


def _cost(step: StepEstimate) -> tuple[str, ...]:
    name = step_name(step.phase, step.tokens)
    if step.block_s <= 0:
        return name, str(step.context), "-", "-", "-", f"INVALID: {clean(step.because)}"
    return (
        name,
        str(step.context),
        seconds_text(step.block_s),
        f"{seconds_text(step.block_low_s)} to {seconds_text(step.block_high_s)}",
        seconds_text(step.overhead_s),
        clean(step.because) if step.valid else f"INVALID: {clean(step.because)}",
    )


def _ways(pairs: tuple[PairMeasurement, ...]) -> tuple[Table, ...]:
    """The ways to other boards, where any was measured."""
    if not pairs:
        return ()
    columns = tuple(Column(title) for title in COLUMNS)
    return (Table(title="Ways to other boards", columns=columns, rows=tuple(map(way_line, pairs))),)


def _link(link: LinkMeasurement | Absent | Failed) -> Table:
    if not isinstance(link, LinkMeasurement):
        return Table(title="Link", columns=ITEMS, rows=(("link", said(link)),), headed=False)
    one_way, rate = link_figures.one_way_s(link), link_figures.bytes_per_s(link)
    chunk = f"{bytes_text(link.goodput_payload_bytes)} in {bytes_text(link.goodput_chunk_bytes)}"
    lines = (
        (
            f"round trip of {bytes_text(link.round_trip_payload_bytes)}",
            *_figures(link.round_trip),
            verdict(link.round_trip),
        ),
        (chunk, *_figures(link.goodput), verdict(link.goodput, link_figures.GOODPUT_RULE)),
        (
            "one way",
            "-" if one_way is None else seconds_text(one_way),
            *("-",) * 3,
            "half the round trip",
        ),
        (
            "rate",
            "-" if rate is None else rate_text(rate),
            *("-",) * 3,
            "same rate both ways assumed",
        ),
    )
    return Table(
        title=clean(f"Link to {link.broker} and back"),
        columns=(Column("what"), *_FIGURES, Column("verdict")),
        rows=lines,
    )
