"""What of a profile may be believed: VALID, INVALID with reasons, or ABSENT with the reason. Pure.

Nothing is taken on trust: every run is judged anew from its raw samples, besides what the board said of it. A section
is INVALID if anything in it is; a board if a section is, if nothing was measured, or if it is no board at all but an
emulation or a recording. What is ABSENT spoils nothing, and is never shown as a figure.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
from msgspec import Struct

from hwprofiles import stats
from hwprofiles.coding import RULE as CODING_RULE
from hwprofiles.disk import RULE as DISK_RULE
from hwprofiles.link import GOODPUT_RULE
from hwprofiles.measure import StopRule, why_invalid
from hwprofiles.pairs import LOAD_RULE
from hwprofiles.profile import (
    NOT_MEASURED,
    LinkMeasurement,
    ModuleMeasurement,
    ModuleTiming,
    PairMeasurement,
    Profile,
    Samples,
)
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.samples import Ceilings, Codings, DiskMeasurement, EnergyMeasurement, Sustained
from hwprofiles.spoiled import OTHERS_SHARE, conditions_because
from hwprofiles.sustained import LEAST_WINDOWS, speeds

Verdict = Literal["VALID", "INVALID", "ABSENT"]

WIDE: Final = 2.0
"""Half the 95 % interval of a median, over the median, above which the median is not known: so many times what sampling
aims at (measure.StopRule.target)."""

RUN_RULE: Final = StopRule()


class Figures(Struct, frozen=True, kw_only=True):
    """One run in figures, and whether they may be believed. What too few samples can't say is null."""

    what: str
    """A timing: 'decode 1 behind 16 rows, depth 6'; of a link: 'round trip of 1200 bytes'."""
    count: int
    taken: int
    """How many samples were taken; `count` of them are kept."""
    warmup: int
    median_s: float | None
    median_low_s: float | None
    median_high_s: float | None
    """95 % interval of the median, by order statistics."""
    p90_s: float | None
    p95_s: float | None
    p99_s: float | None
    mean_s: float | None
    deviation_s: float | None
    """Median absolute deviation from the median."""
    outliers: int
    drift_ratio: float | None
    """Median of the last third over that of the first."""
    verdict: Verdict
    because: tuple[str, ...]


class Section(Struct, frozen=True, kw_only=True):
    name: str
    engine: str = ""
    threads: int = 0
    """Of a module; '' and 0 for other parts."""
    verdict: Verdict
    because: tuple[str, ...] = ()
    figures: tuple[Figures, ...] = ()


def sections(profile: Profile) -> tuple[Section, ...]:
    """The verdicts on all parts of a report, also on those for which the profile has nothing."""
    conditions = conditions_because(profile)
    return (
        Section(name="conditions", verdict="INVALID" if conditions else "VALID", because=conditions),
        *(_module(module) for module in profile.modules),
        *(
            Section(name=f"module {key}", verdict="INVALID", because=(f"not measured: {because}",))
            for key, because in sorted(profile.failed.items())
        ),
        _link(profile),
        *(_way(pair) for pair in profile.pairs),
        _heat(profile),
        _ceilings(profile),
        *([_codings(profile)] if profile.codings != NOT_MEASURED else []),  # profiles of before have none
        _disk(profile),
        _energy(profile),
        _sustained(profile),
    )


def in_all(profile: Profile, judged: tuple[Section, ...]) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict on the whole board, and the reasons."""
    because = [text for text in (not_a_board(profile),) if text]
    if not profile.modules:
        because.append("no module was measured")
    for section in judged:
        if section.verdict == "INVALID":
            because += [f"{section.name}: {text}" for text in section.because]
    return ("INVALID" if because else "VALID"), tuple(because)


def not_a_board(profile: Profile) -> str:
    """Why the figures are not those of a real board, now; '' if they are."""
    if profile.source == "emulated":
        return f"emulated ({profile.emulation or 'nothing said how'}): not a real board's speed"
    if profile.source == "replayed":
        return "replayed from a recording: not measured now"
    return ""


def run_because(samples: Samples, rule: StopRule = RUN_RULE) -> tuple[str, ...]:
    """Why a run can't be believed, judged from its samples; empty if it can."""
    values = list(samples.samples_s)
    found = [] if samples.valid else [samples.invalid_because or "no reason given"]
    anew = why_invalid(values, rule)
    if anew and anew not in found and not _same_kind(anew, found):
        found.append(anew)
    width = stats.relative_half_width(values)
    if width is not None and width > WIDE * rule.target and not found:
        found.append(f"wide interval: the median is known to {width:.0%} only")
    return tuple(found)


def _same_kind(anew: str, found: list[str]) -> bool:
    """Thinned samples give other figures for the same fault: one of them is enough."""
    return any(anew.partition(":")[0] == text.partition(":")[0] for text in found if ":" in text)


def figures(what: str, samples: Samples, rule: StopRule = RUN_RULE) -> Figures:
    """One run in figures."""
    values = samples.samples_s
    interval, moved, because = stats.median_interval(values), stats.drift(values), run_because(samples, rule)
    return Figures(
        what=what,
        count=len(values),
        taken=samples.taken or len(values),
        warmup=samples.warmup,
        median_s=stats.median(values) if values else None,
        median_low_s=interval[0] if interval else None,
        median_high_s=interval[1] if interval else None,
        p90_s=stats.percentile(values, 0.90),
        p95_s=stats.percentile(values, 0.95),
        p99_s=stats.percentile(values, 0.99),
        mean_s=sum(values) / len(values) if values else None,
        deviation_s=stats.deviation(values) if values else None,
        outliers=len(stats.outliers(values)),
        drift_ratio=moved.ratio if moved else None,
        verdict="INVALID" if because else "VALID",
        because=because,
    )


def step_text(timing: ModuleTiming) -> str:
    return f"{timing.phase} {timing.tokens} behind {timing.context} rows, depth {timing.stack}"


def _module(module: ModuleMeasurement) -> Section:
    found = tuple(figures(step_text(timing), timing.samples) for timing in module.timings)
    judged = _of(f"module {module.key}", found, module.engine, module.threads)
    if module.spoiled_because:
        because = (f"conditions: {module.spoiled_because}", *judged.because)
        return msgspec.structs.replace(judged, verdict="INVALID", because=because)
    return judged


def _link(profile: Profile) -> Section:
    link = profile.link
    if not isinstance(link, LinkMeasurement):
        return _without("link", link)
    return _of(
        "link",
        (
            figures(f"round trip of {link.round_trip_payload_bytes} bytes", link.round_trip),
            figures(f"{link.goodput_payload_bytes} bytes there and back", link.goodput, GOODPUT_RULE),
        ),
    )


def _ceilings(profile: Profile) -> Section:
    found = profile.ceilings
    if not isinstance(found, Ceilings):
        return _without("ceilings", found)
    runs = [(f"memory: {rate.what}", rate) for rate in found.memory]
    runs += [(f"products: {rate.what}", rate) for rate in found.products]
    judged = tuple(figures(f"{what}, {rate.amount} each", rate.samples) for what, rate in runs)
    return _of("ceilings", judged, found.engine, found.threads)


def _codings(profile: Profile) -> Section:
    found = profile.codings
    if not isinstance(found, Codings):
        return _without("codecs", found)
    runs = [(f"{one.wire_dtype} as {one.codec}, {one.rows} rows", one.samples) for one in found.timings]
    return _of("codecs", tuple(figures(what, samples, CODING_RULE) for what, samples in runs))


def _disk(profile: Profile) -> Section:
    found = profile.disk
    if not isinstance(found, DiskMeasurement):
        return _without("disk", found)
    runs = (("write", found.write), ("read", found.read))
    return _of("disk", tuple(figures(f"{what} {found.chunk_bytes} bytes", run, DISK_RULE) for what, run in runs))


def _energy(profile: Profile) -> Section:
    found = profile.energy
    if not isinstance(found, EnergyMeasurement):
        return _without("energy", type(found)(f"unknown, not zero: {found.because}"))
    because = tuple(
        f"{run.phase} {run.tokens}: {run.joules.because}" for run in found.runs if not isinstance(run.joules, Reading)
    )
    return Section(name="energy", verdict="INVALID" if because else "VALID", because=because)


def _sustained(profile: Profile) -> Section:
    """A board that becomes slower, or throttles, under load has a valid figure: that is what was asked."""
    found = profile.sustained
    if not isinstance(found, Sustained):
        return _without("sustained", found)
    because = []
    if speeds(found) is None:
        because.append(f"{len(found.windows)} windows, at least {LEAST_WINDOWS} are needed")
    if found.processor_share is not None and found.processor_share > OTHERS_SHARE:
        because.append(f"everything else on the machine used {found.processor_share:.0%} of the processor meanwhile")
    return Section(
        name="sustained",
        engine=found.engine,
        threads=found.threads,
        verdict="INVALID" if because else "VALID",
        because=tuple(because),
    )


def _without(name: str, found: Absent | Failed) -> Section:
    return Section(name=name, verdict="ABSENT" if isinstance(found, Absent) else "INVALID", because=(found.because,))


def way_name(pair: PairMeasurement) -> str:
    """'way to pi4 (direct)'; unlike any other part of a report."""
    return f"way to {pair.peer} ({pair.way})"


def way_because(pair: PairMeasurement) -> tuple[str, ...]:
    """Why the figures of a way can't be believed; empty if they can."""
    section = _way(pair)
    return section.because if section.verdict == "INVALID" else ()


def _way(pair: PairMeasurement) -> Section:
    return _of(
        way_name(pair),
        (
            figures(f"round trip of {pair.round_trip_payload_bytes} bytes", pair.round_trip),
            figures(f"{pair.there.payload_bytes} bytes there", pair.there.samples, LOAD_RULE),
            figures(f"{pair.back.payload_bytes} bytes back", pair.back.samples, LOAD_RULE),
        ),
    )


def _of(name: str, found: tuple[Figures, ...], engine: str = "", threads: int = 0) -> Section:
    because = tuple(f"{run.what}: {text}" for run in found for text in run.because)
    if not found:
        because = ("nothing was timed",)
    verdict: Verdict = "INVALID" if because else "VALID"
    return Section(name=name, engine=engine, threads=threads, verdict=verdict, because=because, figures=found)


def _heat(profile: Profile) -> Section:
    """Temperature and clocks: readings before and after, never a verdict of their own (throttling is one)."""
    held = profile.conditions
    readings = (held.temperature_c_before, held.temperature_c_after, held.clock_hz_before, held.clock_hz_after)
    if any(isinstance(reading, Reading) for reading in readings):
        return Section(name="temperature and clocks", verdict="VALID")
    because = dict.fromkeys(reading.because for reading in readings if not isinstance(reading, Reading))
    return Section(name="temperature and clocks", verdict="ABSENT", because=tuple(because))
