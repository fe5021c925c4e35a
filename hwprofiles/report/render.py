"""Tables as Markdown, or as plain text for a width. ASCII only of our own making; no colour carries meaning."""

from __future__ import annotations

import re
import textwrap
from typing import Final

from msgspec import Struct

from hwprofiles.profile import Profile
from hwprofiles.report import ceiling_rows, heat_rows
from hwprofiles.report.rows import ALWAYS, Table, origin, rows, warnings

GAP: Final = 2
"""Spaces between columns."""
MIN_LAST_WIDTH: Final = 24
"""Least room for the last column, whose cells wrap; with less, another column is dropped first."""
MIN_TABLE_WIDTH: Final = 40
"""On narrower screens every row becomes lines of 'title: value'."""
MIN_WIDTH: Final = 20


class Part(Struct, frozen=True, kw_only=True):
    """A heading, what must be known first, and tables: what every renderer takes."""

    title: str
    notes: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()


def part(profile: Profile, doubt: str = "") -> Part:
    """All that is said of a profile. `doubt`: why it is not believed, from its board's work."""
    notes = tuple(f"Warning: {text}" for text in warnings(profile))
    return Part(
        title=origin(profile),
        notes=notes,
        tables=(*rows(profile, doubt), *ceiling_rows.tables(profile), *heat_rows.tables(profile)),
    )


def markdown(profile: Profile) -> str:
    """The whole profile as a Markdown document that ends in a line feed."""
    return markdown_of(part(profile))


def markdown_of(shown: Part) -> str:
    parts = [f"# {_escaped(shown.title)}"]
    notes = "\n".join(f"- {_noted(text)}" for text in shown.notes)
    if notes:
        parts.append(notes)
    for table in shown.tables:
        titles = [column.title for column in table.columns]
        lines = [titles, ["---"] * len(titles), *table.rows]
        body = "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)
        parts.append(f"## {_escaped(table.title)}\n\n{body}")
    return "\n\n".join(parts) + "\n"


def _noted(text: str) -> str:
    """'Warning: it was hot', with the first word in bold."""
    word, colon, rest = text.partition(": ")
    return f"**{_escaped(word)}:** {_escaped(rest)}" if colon else _escaped(text)


def _escaped(text: str) -> str:
    """Text in which Markdown and HTML see nothing but text."""
    return re.sub(r"([\\`*_|\[\]<>])", r"\\\1", text)


def plain(profile: Profile, width: int = 100) -> str:
    """The whole profile as lines of at most `width` columns (20 at the least). Narrow screens show fewer columns, never
    cut-off values; words longer than a line are broken."""
    return plain_of(part(profile), width)


def plain_of(shown: Part, width: int = 100) -> str:
    width = max(width, MIN_WIDTH)
    parts = ["\n".join(_wrapped(shown.title, width))]
    for text in shown.notes:
        parts.append("\n".join(_wrapped(re.sub("^Warning:", "WARNING:", text), width)))
    for table in shown.tables:
        parts.append("\n".join([*_wrapped(table.title, width), *_plain_table(table, width)]))
    return "\n\n".join(parts) + "\n"


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent="  ") or [""]


def _plain_table(table: Table, width: int) -> list[str]:
    chosen = fitting_columns(table, width)
    titles = [table.columns[at].title for at in chosen]
    lines = [[row[at] for at in chosen] for row in table.rows]
    widths = _widths(table, chosen)
    last_width = width - 2 - sum(widths[:-1]) - GAP * (len(chosen) - 1)
    if width < MIN_TABLE_WIDTH or last_width < min(widths[-1], MIN_LAST_WIDTH):
        return _as_list(table, width)
    shown = []
    for line in ([titles] if table.headed else []) + lines:
        first = "  " + "".join(cell.ljust(size + GAP) for cell, size in zip(line[:-1], widths[:-1], strict=True))
        wrapped = textwrap.wrap(line[-1], max(1, last_width)) or [""]
        shown.append((first + wrapped[0]).rstrip())
        shown += [" " * len(first) + rest for rest in wrapped[1:]]
    return shown


def fitting_columns(table: Table, width: int) -> list[int]:
    """Positions of the columns that are shown at this width: the highest ranks are dropped first, the rest as late as
    possible."""
    chosen = list(range(len(table.columns)))
    while True:
        widths = _widths(table, chosen)
        needed = 2 + sum(widths[:-1]) + GAP * (len(chosen) - 1) + min(widths[-1], MIN_LAST_WIDTH)
        droppable = [at for at in chosen if table.columns[at].rank > ALWAYS]
        if needed <= width or not droppable:
            return chosen
        chosen.remove(max(droppable, key=lambda at: (table.columns[at].rank, at)))


def _widths(table: Table, chosen: list[int]) -> list[int]:
    return [max(len(table.columns[at].title), *(len(row[at]) for row in table.rows), 0) for at in chosen]


def _as_list(table: Table, width: int) -> list[str]:
    """One paragraph per row: what it is, then 'title value' pairs of the columns that are never dropped."""
    shown = []
    kept = [at for at, column in enumerate(table.columns) if column.rank == ALWAYS]
    for row in table.rows:
        pairs = [row[at] if at == kept[-1] else f"{table.columns[at].title} {row[at]}" for at in kept[1:]]
        shown += textwrap.wrap(
            f"{row[kept[0]]}: {', '.join(pairs)}", width, initial_indent="  ", subsequent_indent="    "
        )
    return shown
