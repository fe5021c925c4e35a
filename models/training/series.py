"""A device's own series of readings: rows of files with named columns, cut into windows. What is no row is counted and
left out.

    .csv      with a header line that names the columns
    .parquet  the same columns (models.training.parquet)

Which columns, how long a window is, and where none may cross is said by the job (wire.samples.Series). Files are read
twice where a board has more windows than are kept, and never held in memory.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from models.training import parquet
from models.training.data import MAX_ROW_BYTES, BadRow, files_of
from models.training.samples import IGNORED
from wire.errors import CorruptData, UsageError
from wire.samples import Series

Floats = npt.NDArray[np.float32]

KINDS: Final = (".csv", ".parquet")
MOST: Final = 1e15
"""Of a reading behind centre and scale: what is more is no reading, and sums of it might be no numbers."""


class Row(NamedTuple):
    """One of a file: its number (of a .csv the line's), and its time where there are times, else 0."""

    file: Path
    number: int
    time: float


class Window(NamedTuple):
    """`values` [window, columns], centred and scaled; `label`: its place among the job's, or IGNORED; `stretch`: number
    of the rows without a break that it was cut from, which windows may share."""

    values: Floats
    label: int
    stretch: int
    first: Row
    last: Row


class Readings(NamedTuple):
    values: tuple[float, ...]
    label: str
    id: str
    row: Row


def windows(path: Path, series: Series, labels: Sequence[str], keep_all: bool = False) -> Iterator[Window | BadRow]:
    """All windows under a path, and the rows that are none. With `keep_all` rows with another label are no bad rows,
    and windows of them have the label IGNORED: their number then says nothing of labels. Raises UsageError for what
    can't be read, CorruptData that names all columns that are missing."""
    place = {label: number for number, label in enumerate(labels)}
    yield from _windows(path, _Columns(series), place, keep_all)


def unlabelled(path: Path, series: Series) -> Iterator[Window | BadRow]:
    """The same of readings whose labels nobody knows: files need no column of labels, none is looked at where there is
    one, and all windows have the label IGNORED."""
    yield from _windows(path, _Columns(series, labelled=False), {}, keep_all=True)


def _windows(path: Path, columns: _Columns, place: Mapping[str, int], keep_all: bool) -> Iterator[Window | BadRow]:
    files = files_of(path, KINDS)
    _check_columns(path, files, columns)
    cutter = _Cutter(columns.series)
    for file in files:
        cutter.cut()
        for found in _rows(file, columns):
            if isinstance(found, BadRow):
                cutter.cut()
                yield found
                continue
            label = place.get(found.label, IGNORED)
            if label == IGNORED and not keep_all:
                cutter.cut()
                yield BadRow(_where(found.row), "its label is none of the job's")
                continue
            window = cutter.taken(found, label)
            if window is not None:
                yield window


class _Columns:
    """Which of a file are read."""

    def __init__(self, series: Series, labelled: bool = True) -> None:
        self.series = series
        self.label = series.label if labelled else ""
        self.wanted = tuple(dict.fromkeys((*series.columns, *filter(None, (self.label, series.id, series.time)))))


class _Cutter:
    def __init__(self, series: Series) -> None:
        self.stretch = 0
        self._series = series
        self._rows: list[Readings] = []
        self._last: Readings | None = None
        self._skip = 0

    def cut(self) -> None:
        """No window goes on behind this."""
        self._rows.clear()
        self._last, self._skip = None, 0
        self.stretch += 1

    def taken(self, row: Readings, label: int) -> Window | None:
        """A window, if the row is the last of one."""
        if self._last is not None and not self._follows(self._last, row):
            self.cut()
        self._last = row
        if self._skip:
            self._skip -= 1
            return None
        self._rows.append(row)
        series = self._series
        if len(self._rows) < series.window:
            return None
        values = np.array([kept.values for kept in self._rows], np.float32)
        made = Window(values, label, self.stretch, self._rows[0].row, row.row)
        self._skip = max(0, series.step - series.window)
        del self._rows[: series.step]
        return made

    def _follows(self, last: Readings, row: Readings) -> bool:
        if (row.label, row.id) != (last.label, last.id):
            return False
        if not self._series.time:
            return True
        gap = row.row.time - last.row.time
        return gap > 0 and (self._series.most_gap is None or gap <= self._series.most_gap)


def _where(row: Row) -> str:
    return f"{row.file.name}:{row.number}"


def _check_columns(path: Path, files: Sequence[Path], columns: _Columns) -> None:
    """Raise CorruptData that says what is missing in which file. What is there instead is not said: this text leaves
    the board."""
    said = []
    for file in files:
        there = parquet.columns(file) if file.suffix.lower() == ".parquet" else _header(file)
        missing = [name for name in columns.wanted if name not in there]
        if missing:
            said.append(f"{file.name} has no column {', '.join(map(repr, missing))} among its {len(there)}")
    if said:
        more = f"; and {len(said) - 3} more files" if len(said) > 3 else ""
        raise CorruptData(
            f"data {path.name}: {'; '.join(said[:3])}{more}", try_="columns as the job's [series] names them"
        )


def _header(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as lines:
            return next(csv.reader(_capped(lines)), [])
    except (OSError, csv.Error) as error:
        raise UsageError(f"data {file}: {error}", try_="a first line that names the columns") from None


def _rows(file: Path, columns: _Columns) -> Iterator[Readings | BadRow]:
    if file.suffix.lower() == ".parquet":
        for number, row in parquet.rows(file, columns.wanted, columns.wanted):
            yield _row(Row(file, number, 0.0), row, columns)
        return
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as lines:
            rows = csv.reader(_capped(lines))
            try:
                header = next(rows, [])
                for cells in rows:
                    at = Row(file, rows.line_num, 0.0)
                    if len(cells) != len(header):
                        yield BadRow(_where(at), f"{len(cells)} columns, the first line has {len(header)}")
                    else:
                        yield _row(at, dict(zip(header, cells, strict=True)), columns)
            except csv.Error as error:
                yield BadRow(f"{file.name}:{rows.line_num}", f"{error}; the rest of the file is left out")
    except OSError as error:
        raise UsageError(f"data {file}: {(error.strerror or str(error)).lower()}", try_="see --data") from None


def _row(at: Row, row: Mapping[str, Any], columns: _Columns) -> Readings | BadRow:
    series = columns.series
    centre, scale = series.centre or (0.0,) * len(series.columns), series.scale or (1.0,) * len(series.columns)
    values = []
    for name, middle, unit in zip(series.columns, centre, scale, strict=True):
        reading = _number(row[name])
        if reading is None or not abs(value := (reading - middle) / unit) < MOST:
            return BadRow(_where(at), f"{name!r} is no number")
        values.append(value)
    time = _number(row[series.time]) if series.time else 0.0
    if time is None:
        return BadRow(_where(at), f"{series.time!r} is no number")
    label = _text(row[columns.label]) if columns.label else ""
    return Readings(tuple(values), label, _text(row[series.id]) if series.id else "", at._replace(time=time))


def _number(cell: Any) -> float | None:
    """None for what is none; not a number is a number here, and refused for its size."""
    if isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
        return None
    try:
        return float(cell)
    except (ValueError, OverflowError):
        return None


def _text(cell: Any) -> str:
    return "" if cell is None else str(cell)


def _capped(lines: TextIO) -> Iterator[str]:
    """Lines; raise csv.Error for one that is no line of a table."""
    while line := lines.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise csv.Error(f"a line longer than {MAX_ROW_BYTES} letters")
        yield line
