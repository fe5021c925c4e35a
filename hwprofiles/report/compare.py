"""Two boards, or one board twice: ratios of medians with intervals, and what about the conditions is not alike.

Where what sets the speed differs besides the thing that is compared (the board), the comparison is refused; who wants
it anyway gets it INVALID, with the differences at its head. Two throttled boards are alike, but INVALID, too. A ratio
holds for these two runs: what changes from one run to the next (heat, neighbours) is in no interval.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
from msgspec import Struct

from hwprofiles import stats
from hwprofiles.link import GOODPUT_RULE
from hwprofiles.measure import StopRule
from hwprofiles.plain import clean
from hwprofiles.profile import LinkMeasurement, ModuleMeasurement, Profile, Samples
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.report.document import BoardReport
from hwprofiles.report.render import Part
from hwprofiles.report.rows import Column, Table
from hwprofiles.report.verdict import (
    RUN_RULE,
    Verdict,
    not_a_board,
    run_because,
    step_text,
)
from hwprofiles.spoiled import conditions_because, loaded_because, throttled_because
from wire.errors import Refused
from wire.units import seconds_text
from wire.version import VERSION

RESAMPLES: Final = 2000
"""Bootstrap resamples: the ends of a 95 % interval then jitter by a few percent of its width."""
FEWEST_SAMPLES: Final = 6
"""Of each run for an interval, as for that of a median."""


class Difference(Struct, frozen=True, kw_only=True):
    what: str
    a: str
    b: str


class Ratio(Struct, frozen=True, kw_only=True):
    """How many times as long as A did B take: below 1, B is faster. 95 % interval by bootstrap of both medians."""

    part: str
    what: str
    a_median_s: float | None
    b_median_s: float | None
    ratio: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    because: tuple[str, ...]


class Side(Struct, frozen=True, kw_only=True):
    device: str
    board: str
    source: str
    profile_digest: str
    verdict: Verdict


class Comparison(Struct, frozen=True, kw_only=True):
    schema: Literal["edgelam.comparison/1"] = "edgelam.comparison/1"
    made_by: str
    a: Side
    b: Side
    verdict: Verdict
    because: tuple[str, ...]
    unlike: tuple[Difference, ...]
    """Conditions that differ; not empty only if that was wanted anyway."""
    also: tuple[Difference, ...]
    """What differs too, and does not stop a comparison."""
    ratios: tuple[Ratio, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


class Interval(NamedTuple):
    low: float
    high: float


def ratio_interval(a: Sequence[float], b: Sequence[float], seed: int) -> Interval | None:
    """95 % interval of median(b) / median(a) by the percentile bootstrap; the same seed gives the same interval.

    None below 6 samples on either side, or if a resampled median of `a` is 0.
    """
    if min(len(a), len(b)) < FEWEST_SAMPLES:
        return None
    random = np.random.default_rng(seed)
    medians = []
    for values in (np.asarray(a), np.asarray(b)):
        drawn = random.integers(0, len(values), (RESAMPLES, len(values)))
        medians.append(np.median(values[drawn], axis=1))
    if not medians[0].all():
        return None
    low, high = np.quantile(medians[1] / medians[0], (stats.CHANCE / 2, 1 - stats.CHANCE / 2))
    return Interval(float(low), float(high))


def compare(a: BoardReport, b: BoardReport, anyway: bool = False) -> Comparison:
    """Compare two boards' profiles. Raises Refused, with all that differs, for unlike conditions unless `anyway`, and
    if there is nothing that both have measured."""
    pairs = _pairs(a.profile.modules, b.profile.modules)
    unlike = (*unlike_conditions(a.profile, b.profile), *_unlike_modules(pairs))
    if unlike and not anyway:
        told = "; ".join(f"{clean(one.what)}: {clean(one.a)} against {clean(one.b)}" for one in unlike)
        raise Refused(f"unlike conditions: {told}", try_="measure again alike, or add --anyway, which the result says")
    ratios = tuple(_ratios(pairs)) + tuple(_link_ratios(a.profile.link, b.profile.link))
    if not ratios:
        raise Refused(
            f"{clean(a.device)} and {clean(b.device)} have measured nothing in common",
            try_="edgelam bench --model MODEL, with the same model and precision for both",
        )
    because = [f"unlike conditions: {one.what}" for one in unlike]
    for name, profile in (("A", a.profile), ("B", b.profile)):
        spoilt = (not_a_board(profile), *conditions_because(profile))
        because += [f"{name}: {text}" for text in spoilt if text]
    invalid = sum(one.verdict == "INVALID" for one in ratios)
    if invalid == len(ratios):
        because.append("no ratio is valid")
    paired = {id(module) for pair in pairs for module in pair}
    return Comparison(
        made_by=VERSION,
        a=_side(a),
        b=_side(b),
        verdict="INVALID" if because else "VALID",
        because=tuple(because),
        unlike=unlike,
        also=_differences(a.profile, b.profile, ALSO),
        ratios=ratios,
        only_a=tuple(module.key for module in a.profile.modules if id(module) not in paired),
        only_b=tuple(module.key for module in b.profile.modules if id(module) not in paired),
    )


def _side(board: BoardReport) -> Side:
    return Side(
        device=board.device,
        board=_text(board.profile.identity.board),
        source=board.profile.source,
        profile_digest=board.profile_digest,
        verdict=board.verdict,
    )


def _text(reading: Reading[str] | Reading[float] | Absent | Failed) -> str:
    """The value; absent and failed readings are alike whatever their reasons."""
    if isinstance(reading, Reading):
        return f"{reading.value:g}" if isinstance(reading.value, float) else reading.value
    return "none" if isinstance(reading, Absent) else "unknown"


def _versions(profile: Profile) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(profile.conditions.engine_versions.items()))


CONDITIONS: Final[tuple[tuple[str, Callable[[Profile], str]], ...]] = (
    ("source", lambda profile: profile.source),
    ("emulation", lambda profile: profile.emulation or "none"),
    ("software", lambda profile: profile.conditions.software),
    ("engines", lambda profile: _versions(profile) or "none"),
    ("power mode", lambda profile: _text(profile.conditions.power_mode)),
    ("governor", lambda profile: _text(profile.conditions.governor)),
    ("processor quota", lambda profile: _text(profile.conditions.quota_cores)),
    ("quota period", lambda profile: _text(profile.conditions.quota_period_s)),
    ("spinning", lambda profile: "on" if profile.conditions.allow_spinning else "off"),
    ("throttling", lambda profile: "seen" if throttled_because(profile) else "none seen"),
    ("load", lambda profile: "high" if loaded_because(profile) else "low"),
)
"""What must be alike."""
ALSO: Final[tuple[tuple[str, Callable[[Profile], str]], ...]] = (
    ("board", lambda profile: _text(profile.identity.board)),
    ("processor", lambda profile: _text(profile.identity.cpu)),
    ("system", lambda profile: _text(profile.identity.os)),
    ("kernel", lambda profile: profile.conditions.kernel),
    ("Python", lambda profile: profile.conditions.python),
)
"""What is compared, or comes with it."""


def unlike_conditions(a: Profile, b: Profile) -> tuple[Difference, ...]:
    """What sets the speed and is not alike. Of the same kind of board, the cores that may be used count, too."""
    found = _differences(a, b, CONDITIONS)
    same = _text(a.identity.board) == _text(b.identity.board) and _text(a.identity.cpu) == _text(b.identity.cpu)
    if same and a.cores.usable != b.cores.usable:
        found += (Difference(what="usable cores", a=f"{a.cores.usable:g}", b=f"{b.cores.usable:g}"),)
    return found


def _differences(
    a: Profile, b: Profile, table: tuple[tuple[str, Callable[[Profile], str]], ...]
) -> tuple[Difference, ...]:
    return tuple(Difference(what=what, a=of(a), b=of(b)) for what, of in table if of(a) != of(b))


Pair = tuple[ModuleMeasurement, ModuleMeasurement]


def _pairs(ours: Sequence[ModuleMeasurement], theirs: Sequence[ModuleMeasurement]) -> list[Pair]:
    """Modules that are compared: the same on the same engine and threads, else the same module, else, where each side
    has just one of a kind left, these (another precision, or another model)."""
    pairs: list[Pair] = []
    left, right = list(ours), list(theirs)
    same: tuple[Callable[[ModuleMeasurement], object], ...] = (
        lambda module: (module.key, module.engine, module.threads),
        lambda module: module.key,
        lambda module: module.kind,
    )
    for number, of in enumerate(same):
        for one in list(left):
            found = [other for other in right if of(other) == of(one)]
            alone = len(found) == 1 and sum(of(module) == of(one) for module in left) == 1
            if found and (number == 0 or alone):
                pairs.append((one, found[0]))
                left = [module for module in left if module is not one]
                right = [module for module in right if module is not found[0]]
    return pairs


def _unlike_modules(pairs: Sequence[Pair]) -> tuple[Difference, ...]:
    found = []
    for a, b in pairs:
        if a.key != b.key:
            found.append(Difference(what=f"{a.kind}", a=a.key, b=b.key))
        if a.engine != b.engine:
            found.append(Difference(what=f"engine of {a.key}", a=a.engine, b=b.engine))
        if a.threads != b.threads:
            found.append(Difference(what=f"threads of {a.key}", a=str(a.threads), b=str(b.threads)))
    return tuple(found)


def _ratios(pairs: Sequence[Pair]) -> list[Ratio]:
    found = []
    for a, b in pairs:
        others = {step_text(timing): timing.samples for timing in b.timings}
        for timing in a.timings:
            step = step_text(timing)
            if step in others:
                found.append(_ratio(a.key, step, timing.samples, others[step]))
    return found


def _link_ratios(a: LinkMeasurement | Absent | Failed, b: LinkMeasurement | Absent | Failed) -> list[Ratio]:
    """Of equal loads only: a slow link is measured with a smaller one."""
    if not (isinstance(a, LinkMeasurement) and isinstance(b, LinkMeasurement)):
        return []
    found = []
    if a.round_trip_payload_bytes == b.round_trip_payload_bytes:
        what = f"round trip of {a.round_trip_payload_bytes} bytes"
        found.append(_ratio("link", what, a.round_trip, b.round_trip))
    if (a.goodput_payload_bytes, a.goodput_chunk_bytes) == (b.goodput_payload_bytes, b.goodput_chunk_bytes):
        what = f"{a.goodput_payload_bytes} bytes there and back"
        found.append(_ratio("link", what, a.goodput, b.goodput, GOODPUT_RULE))
    return found


def _ratio(part: str, what: str, a: Samples, b: Samples, rule: StopRule = RUN_RULE) -> Ratio:
    because = [f"A: {text}" for text in run_because(a, rule)] + [f"B: {text}" for text in run_because(b, rule)]
    middles = [stats.median(samples.samples_s) if samples.samples_s else None for samples in (a, b)]
    seed = int.from_bytes(hashlib.sha256(f"{part} {what}".encode()).digest()[:8], "big")
    interval = ratio_interval(a.samples_s, b.samples_s, seed)
    if interval is None and not because:
        fewest = min(len(a.samples_s), len(b.samples_s))
        few = f"{fewest} samples, an interval takes {FEWEST_SAMPLES}" if fewest < FEWEST_SAMPLES else "medians of 0"
        because.append(few)
    return Ratio(
        part=part,
        what=what,
        a_median_s=middles[0],
        b_median_s=middles[1],
        ratio=middles[1] / middles[0] if middles[0] and middles[1] is not None else None,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        verdict="INVALID" if because else "VALID",
        because=tuple(because),
    )


def said(ratio: Ratio) -> str:
    """What a ratio shows, in words."""
    if ratio.verdict != "VALID" or ratio.low is None or ratio.high is None:
        return f"INVALID: {clean('; '.join(ratio.because))}"
    return (
        "VALID, B is faster"
        if ratio.high < 1
        else "VALID, B is slower"
        if ratio.low > 1
        else "VALID, no difference shown"
    )


def part(comparison: Comparison) -> Part:
    """The comparison for people."""
    a, b = comparison.a, comparison.b
    sides = [
        (name, clean(side.device), clean(side.board), side.source, side.verdict, clean(side.profile_digest[:19]))
        for name, side in (("A", a), ("B", b))
    ]
    side_columns = ("side", "device", "board", "source", "verdict", "profile")
    tables = [_table("Sides", side_columns, sides)]
    for title, differences in (("Unlike conditions", comparison.unlike), ("Differs, too", comparison.also)):
        if differences:
            lines = [(clean(one.what), clean(one.a), clean(one.b)) for one in differences]
            tables.append(_table(title, ("what", "A", "B"), lines))
    ratios = [
        (
            clean(f"{one.part}, {one.what}"),
            *("-" if value is None else seconds_text(value) for value in (one.a_median_s, one.b_median_s)),
            "-" if one.ratio is None else f"{one.ratio:.3f}",
            "-" if one.low is None or one.high is None else f"{one.low:.3f} to {one.high:.3f}",
            said(one),
        )
        for one in comparison.ratios
    ]
    columns = (Column("what"), Column("A", 2), Column("B", 2), Column("B / A"), Column("95 %"), Column("verdict"))
    tables.append(Table(title="Time of B over time of A", columns=columns, rows=tuple(ratios)))
    alone = [("A", clean(key)) for key in comparison.only_a] + [("B", clean(key)) for key in comparison.only_b]
    if alone:
        tables.append(_table("Measured on one side only", ("side", "module"), alone))
    notes = [f"Warning: {clean(text)}" for text in comparison.because]
    return Part(
        title=f"{clean(a.device)} (A) against {clean(b.device)} (B): {comparison.verdict}",
        notes=tuple(notes),
        tables=tuple(tables),
    )


def _table(title: str, columns: Sequence[str], lines: Sequence[tuple[str, ...]]) -> Table:
    return Table(title=title, columns=tuple(map(Column, columns)), rows=tuple(lines))
