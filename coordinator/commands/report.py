"""`edgelam report`: benchmark reports that are kept in files: shown, compared, exported. Needs no coordinator."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import typer

from coordinator.commands.common import Json, print_json, write_file, write_text
from hwprofiles.report import compare as comparing
from hwprofiles.report import document, views
from hwprofiles.report.document import BoardReport, Report
from hwprofiles.report.page import page, report_page
from hwprofiles.report.render import markdown_of, plain_of
from wire.errors import UsageError

app = typer.Typer(help="Benchmark reports in files (edgelam bench --json -o FILE): show, compare, export.")

Form = Literal["text", "markdown", "html", "json"]
AsMarkdown = Annotated[bool, typer.Option("--markdown", help="Markdown instead of plain tables.")]
AsHtml = Annotated[bool, typer.Option("--html", help="One HTML page with plots that needs nothing else.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file instead of stdout.")]
Files = Annotated[list[Path], typer.Argument(help="Reports or profiles; several become one report.")]


FORMS: Final[Mapping[str, Form]] = {".html": "html", ".htm": "html", ".md": "markdown", ".json": "json"}
"""By the end of a file's name, where no form is named."""


def form_of(as_markdown: bool, as_html: bool, json: bool, output: Path | None = None) -> Form:
    """The one that is wanted, by an option or the name of the file; raise UsageError for two."""
    if as_markdown + as_html + json > 1:
        raise UsageError("--markdown, --html and --json exclude each other", try_="one of them")
    named = FORMS.get(output.suffix.lower(), "text") if output is not None else "text"
    return "markdown" if as_markdown else "html" if as_html else "json" if json else named


def width() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def give(text: str, output: Path | None) -> None:
    """To the file that is wanted, else to stdout."""
    if output is not None:
        write_file(output, (text.rstrip("\n") + "\n").encode())
    else:
        write_text(text.rstrip("\n"))


def give_json(data: bytes, output: Path | None) -> None:
    if output is not None:
        write_file(output, data + b"\n")
    else:
        print_json(msgspec.Raw(data))


def give_report(report: Report, form: Form, output: Path | None) -> None:
    """A report in one of its forms."""
    if form == "json":
        give_json(document.encode(report), output)
    elif form == "html":
        give(report_page(report), output)
    else:
        give(views.markdown(report) if form == "markdown" else views.plain(report, width()), output)


def read(files: list[Path]) -> Report:
    """One report of all files; a single one keeps its date."""
    reports = [document.load(path) for path in files]
    if len(reports) == 1:
        return reports[0]
    boards = [board.profile for report in reports for board in report.boards]
    missing = {name: because for report in reports for name, because in report.missing.items()}
    doubted = {name: because for report in reports for name, because in report.doubted.items()}
    return document.make(boards, time.time(), missing, doubted)


@app.command()
def show(
    files: Files,
    as_markdown: AsMarkdown = False,
    as_html: AsHtml = False,
    json: Json = False,
    output: Output = None,
) -> None:
    """Show reports: verdicts, conditions, figures; with --html also plots.

    Example: edgelam report show shelf.json --html -o shelf.html
    """
    give_report(read(files), form_of(as_markdown, as_html, json, output), output)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="Report or profile.")],
    b: Annotated[Path, typer.Argument(help="Another; the same one to compare two of its boards.")],
    board: Annotated[
        list[str] | None, typer.Option(help="The board, if there are several; given twice: that of A, that of B.")
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare unlike conditions, too; the result is INVALID and says why.")
    ] = False,
    as_markdown: AsMarkdown = False,
    as_html: AsHtml = False,
    json: Json = False,
    output: Output = None,
) -> None:
    """Say how many times as long B takes as A, with 95 % intervals; refuse where the conditions are unlike.

    Example: edgelam report compare before.json after.json --board pi5
    """
    form = form_of(as_markdown, as_html, json, output)
    if len(board or ()) > 2:
        raise UsageError("--board was given more than twice", try_="--board OF_A --board OF_B")
    names = list(board or ())
    one = _board(document.load(a), names[0] if names else None, a)
    other = _board(document.load(b), names[-1] if names else None, b)
    if one == other:
        raise UsageError("that compares a measurement with itself", try_="--board OF_A --board OF_B, or another file")
    found = comparing.compare(one, other, anyway)
    if form == "json":
        give_json(msgspec.json.encode(found, order="deterministic"), output)
        return
    part = comparing.part(found)
    if form == "html":
        give(page([part]), output)
    else:
        give(markdown_of(part) if form == "markdown" else plain_of(part, width()), output)


def _board(report: Report, name: str | None, path: Path) -> BoardReport:
    found = [board for board in report.boards if name in (None, board.device)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(dict.fromkeys(board.device for board in report.boards)) or "no board"
    if name is not None:
        raise UsageError(f"{path}: {len(found)} boards named {name!r}; it has {there}", try_="another --board")
    raise UsageError(f"{path}: which of {there}?", try_="--board NAME")


@app.command()
def export(
    files: Files,
    samples: Annotated[bool, typer.Option("--samples", help="Every raw sample, one per line.")] = False,
    output: Output = None,
) -> None:
    """Write figures as CSV, one run per line: for spreadsheets, R, pandas.

    Example: edgelam report export shelf.json --samples -o samples.csv
    """
    report = read(files)
    give(views.samples_csv(report) if samples else views.figures_csv(report), output)
