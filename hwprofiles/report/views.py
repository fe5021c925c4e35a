"""A report as Markdown, as text for a terminal, and as CSV. HTML: hwprofiles.report.page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Final

from hwprofiles.plain import clean
from hwprofiles.profile import LinkMeasurement, Profile, Samples
from hwprofiles.report.document import Report
from hwprofiles.report.render import Part, markdown_of, part, plain_of
from hwprofiles.report.rows import Column, Table
from hwprofiles.report.verdict import Section, way_name
from hwprofiles.samples import Ceilings, DiskMeasurement

FIGURE_COLUMNS: Final = (
    "device", "source", "board_verdict", "section", "engine", "threads", "what", "verdict", "because", "count", "taken",
    "warmup", "median_s", "median_low_s", "median_high_s", "p90_s", "p95_s", "p99_s", "mean_s", "deviation_s",
    "outliers", "drift_ratio",
)  # fmt: skip
SAMPLE_COLUMNS: Final = ("device", "source", "section", "engine", "threads", "what", "number", "seconds")

FORMULA_STARTS: Final = ("=", "+", "-", "@")
"""Spreadsheets would take text from a board that begins so for a formula."""


def parts(report: Report) -> tuple[Part, ...]:
    """What a report says: a summary, then board by board."""
    return (summary(report), *(part(board.profile, report.doubted.get(board.device, "")) for board in report.boards))


def summary(report: Report) -> Part:
    lines = [
        (
            clean(board.device),
            board.profile.source,
            board.verdict,
            str(sum(section.verdict == "INVALID" for section in board.sections)),
            clean(board.profile_digest[: len("sha256:") + 12]),
        )
        for board in report.boards
    ]
    columns = (Column("board"), Column("source"), Column("verdict"), Column("invalid parts", 1), Column("profile", 2))
    tables = [Table(title="Boards", columns=columns, rows=tuple(lines))]
    if report.missing:
        because = tuple((clean(name), clean(text)) for name, text in sorted(report.missing.items()))
        tables.append(Table(title="Missing", columns=(Column("board"), Column("because")), rows=because))
    return Part(
        title=f"Hardware benchmark report: {report.verdict}",
        notes=(f"Made: {date_text(report.made_at_unix)} by edgelam {clean(report.made_by)}",),
        tables=tuple(tables),
    )


def date_text(at_unix: float) -> str:
    return f"{datetime.fromtimestamp(min(max(at_unix, 0.0), 4e9), timezone.utc):%Y-%m-%d %H:%M} UTC"


def markdown(report: Report) -> str:
    return "\n".join(markdown_of(one) for one in parts(report))


def plain(report: Report, width: int = 100) -> str:
    return "\n\n".join(plain_of(one, width) for one in parts(report))


def figures_csv(report: Report) -> str:
    """One line per run: figures, verdict, reasons."""
    lines = []
    for board in report.boards:
        for section in board.sections:
            whose = (board.device, board.profile.source, board.verdict, section.name, section.engine, section.threads)
            lines += [
                (
                    *whose, run.what, run.verdict, "; ".join(run.because), run.count, run.taken, run.warmup,
                    run.median_s, run.median_low_s, run.median_high_s, run.p90_s, run.p95_s, run.p99_s, run.mean_s,
                    run.deviation_s, run.outliers, run.drift_ratio,
                )
                for run in section.figures
            ]  # fmt: skip
    return csv_text(FIGURE_COLUMNS, lines)


def samples_csv(report: Report) -> str:
    """One line per raw sample, in the order taken."""
    lines = []
    for board in report.boards:
        for section in board.sections:
            for what, samples in zip(
                (run.what for run in section.figures), _samples(board.profile, section), strict=True
            ):
                lines += [
                    (board.device, board.profile.source, section.name, section.engine, section.threads, what, at, value)
                    for at, value in enumerate(samples.samples_s)
                ]
    return csv_text(SAMPLE_COLUMNS, lines)


def _samples(profile: Profile, section: Section) -> list[Samples]:
    """The samples behind the figures of a section, in their order."""
    if section.name == "link" and isinstance(profile.link, LinkMeasurement):
        return [profile.link.round_trip, profile.link.goodput]
    for pair in profile.pairs:
        if section.name == way_name(pair):
            return [pair.round_trip, pair.there.samples, pair.back.samples]
    if section.name == "ceilings" and isinstance(profile.ceilings, Ceilings):
        return [rate.samples for rate in (*profile.ceilings.memory, *profile.ceilings.products)]
    if section.name == "disk" and isinstance(profile.disk, DiskMeasurement):
        return [profile.disk.write, profile.disk.read]
    return [
        timing.samples
        for module in profile.modules
        if (f"module {module.key}", module.engine, module.threads) == (section.name, section.engine, section.threads)
        for timing in module.timings
    ][: len(section.figures)]


def csv_text(columns: tuple[str, ...], lines: Iterable[tuple[object, ...]]) -> str:
    """RFC 4180, but for line ends; nothing is an empty cell."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for line in lines:
        writer.writerow([_cell(value) for value in line])
    return out.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return "" if value is None else value
    text = clean(value)
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
