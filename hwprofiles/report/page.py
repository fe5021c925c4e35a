"""A report, or any parts of one, as one HTML page that needs nothing else: no script, font or picture from anywhere.

It reads in print and without colour: verdicts are words in frames, series differ by marker and dashes.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from hwprofiles.report import views
from hwprofiles.report.document import Report
from hwprofiles.report.figures import plots
from hwprofiles.report.plots import NoPlot, Plot, svg
from hwprofiles.report.render import Part
from hwprofiles.report.rows import Table

POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"
"""Whatever a board might smuggle into the page: a browser loads and runs nothing."""

STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; break-after: avoid; }
section { border-top: 3px double; margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid #8888;
  overflow-wrap: break-word; font-variant-numeric: tabular-nums; }
td:last-child { overflow-wrap: anywhere; }
.short { white-space: nowrap; }
th { border-bottom: 2px solid; }
tr { break-inside: avoid; }
.wide { overflow-x: auto; }
.verdict { display: inline-block; padding: 0 .35em; border: 1.5px solid; font-weight: 600; white-space: nowrap; }
.INVALID { border: 3px double; text-decoration: underline; }
.ABSENT { border-style: dashed; font-weight: 400; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem 2rem; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-weight: 600; }
figure p { margin: .3rem 0; }
svg { width: 100%; height: auto; font: 13px system-ui, sans-serif; fill: currentColor; }
svg path { fill: none; stroke: currentColor; }
svg .grid { stroke-width: .5; opacity: .3; }
svg .axis, svg .bar { stroke-width: 1; }
svg .line { stroke-width: 1.6; }
svg .solid { fill: currentColor; stroke: none; }
svg .hollow { fill: Canvas; stroke: currentColor; stroke-width: 1.6; }
svg .cross { stroke-width: 2.5; }
@media (max-width: 32rem) { .plots { grid-template-columns: 1fr; } }
@media print {
  :root { color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .wide { overflow: visible; }
  .plots { grid-template-columns: 1fr 1fr; }
  section { break-before: page; border: 0; margin: 0; }
}
"""

SHORT_CELL: Final = 20
"""Cells of so many characters are not wrapped: figures stay with their units."""

GLYPHS: Final = {"VALID": "\N{CHECK MARK}", "INVALID": "\N{MULTIPLICATION X}", "ABSENT": "\N{EN DASH}"}


def report_page(report: Report) -> str:
    """The whole report."""
    shown = views.parts(report)
    drawn = [(), *(plots(board.profile) for board in report.boards)]
    return page(shown, drawn)


def page(parts: Sequence[Part], drawn: Sequence[Sequence[Plot | NoPlot]] = ()) -> str:
    """Parts one below the other; `drawn` are the plots of each, which stand before its tables."""
    body = []
    for number, part in enumerate(parts):
        level = "h2" if number else "h1"
        inside = [
            f"<{level}>{_marked(part.title)}</{level}>",
            *(f"<p>{escape(note)}</p>" for note in part.notes),
            *(_table(table) for table in part.tables[:1]),
            _plots(drawn[number], number) if number < len(drawn) and drawn[number] else "",
            *(_table(table) for table in part.tables[1:]),
        ]
        body.append(
            "\n".join(filter(None, inside)) if number == 0 else "<section>\n" + "\n".join(inside) + "\n</section>"
        )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(parts[0].title)}</title>
<style>{STYLE}</style>
</head>
<body>
{chr(10).join(body)}
</body>
</html>
"""


def _plots(drawn: Sequence[Plot | NoPlot], number: int) -> str:
    figures = [
        f"<figure><figcaption>{escape(plot.title)}</figcaption>{svg(plot, f'plot-{number}-{at}')}</figure>"
        for at, plot in enumerate(drawn)
        if isinstance(plot, Plot)
    ]
    absent = [
        f"<li>{escape(plot.title)}: {_badge('ABSENT')} {escape(plot.because)}</li>"
        for plot in drawn
        if isinstance(plot, NoPlot)
    ]
    lines = ["<h3>Plots</h3>", '<div class="plots">', *figures, "</div>"]
    return "\n".join(lines + (["<ul>", *absent, "</ul>"] if absent else []))


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column.title)}</th>' for column in table.columns)
    lines = ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in table.rows]
    titles = f"<thead><tr>{head}</tr></thead>" if table.headed else ""
    return (
        f'<h3>{escape(table.title)}</h3>\n<div class="wide"><table>{titles}<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _cell(text: str) -> str:
    kind = ' class="short"' if len(text) <= SHORT_CELL else ""
    return f"<td{kind}>{_marked(text)}</td>"


def _badge(word: str) -> str:
    return f'<span class="verdict {word}">{GLYPHS[word]} {word}</span>'


def _marked(text: str) -> str:
    """Text; a verdict at its beginning or end stands in a frame."""
    for word in GLYPHS:
        if text == word or text.startswith((f"{word}:", f"{word},")):
            return _badge(word) + escape(text[len(word) :])
        if text.endswith(f": {word}"):
            return escape(text[: -len(word)]) + _badge(word)
    return escape(text)
