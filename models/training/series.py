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


class Window(NamedTuple):
    """`values` [window, columns], centred and scaled; `label`: its place among the job's, or IGNORED; `stretch`: number
    of the rows without a break that it was cut from, which windows may share."""

    values: Floats
    label: int
    stretch: int


class Readings(NamedTuple):
    values: tuple[float, ...]
    label: str
    id: str
    time: float


def windows(path: Path, series: Series, labels: Sequence[str], keep_all: bool = False) -> Iterator[Window | BadRow]:
    """All windows under a path, and the rows that are none. With `keep_all` rows with another label are no bad rows,
    and windows of them have the label IGNORED: their number then says nothing of labels. Raises UsageError for what
    can't be read, CorruptData that names all columns that are missing."""
    place = {label: number for number, label in enumerate(labels)}
    files = files_of(path, KINDS)
    _check_columns(path, files, series)
    cutter = _Cutter(series)
    for file in files:
        cutter.cut()
        for found in _rows(file, series):
            if isinstance(found, BadRow):
                cutter.cut()
                yield found
                continue
            where, row = found
            label = place.get(row.label, IGNORED)
            if label == IGNORED and not keep_all:
                cutter.cut()
                yield BadRow(where, "its label is none of the job's")
                continue
            values = cutter.taken(row)
            if values is not None:
                yield Window(values, label, cutter.stretch)


class _Cutter:
    def __init__(self, series: Series) -> None:
        self.stretch = 0
        self._series = series
        self._rows: list[tuple[float, ...]] = []
        self._last: Readings | None = None
        self._skip = 0

    def cut(self) -> None:
        """No window goes on behind this."""
        self._rows.clear()
        self._last, self._skip = None, 0
        self.stretch += 1

    def taken(self, row: Readings) -> Floats | None:
        """A window, if the row is the last of one."""
        if self._last is not None and not self._follows(self._last, row):
            self.cut()
        self._last = row
        if self._skip:
            self._skip -= 1
            return None
        self._rows.append(row.values)
        series = self._series
        if len(self._rows) < series.window:
            return None
        made = np.array(self._rows, np.float32)
        self._skip = max(0, series.step - series.window)
        del self._rows[: series.step]
        return made

    def _follows(self, last: Readings, row: Readings) -> bool:
        if (row.label, row.id) != (last.label, last.id):
            return False
        if not self._series.time:
            return True
        gap = row.time - last.time
        return gap > 0 and (self._series.most_gap is None or gap <= self._series.most_gap)


def _wanted(series: Series) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*series.columns, series.label, *filter(None, (series.id, series.time)))))


def _check_columns(path: Path, files: Sequence[Path], series: Series) -> None:
    """Raise CorruptData that says what is missing in which file. What is there instead is not said: this text leaves
    the board."""
    said = []
    for file in files:
        there = parquet.columns(file) if file.suffix.lower() == ".parquet" else _header(file)
        missing = [name for name in _wanted(series) if name not in there]
        if missing:
            said.append(f"{file.name} has no column {', '.join(map(repr, missing))} among its {len(there)}")
    if said:
        more = f"; and {len(said) - 3} more files" if len(said) > 3 else ""
        raise CorruptData(
            f"data {path.name}: {'; '.join(said[:3])}{more}", try_="the names of columns as boards have them"
        )


def _header(file: Path) -> list[str]:
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as lines:
            return next(csv.reader(_capped(lines)), [])
    except (OSError, csv.Error) as error:
        raise UsageError(f"data {file}: {error}", try_="a first line that names the columns") from None


def _rows(file: Path, series: Series) -> Iterator[tuple[str, Readings] | BadRow]:
    if file.suffix.lower() == ".parquet":
        for number, row in parquet.rows(file, _wanted(series), _wanted(series)):
            yield _row(f"{file.name}:{number}", row, series)
        return
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as lines:
            rows = csv.reader(_capped(lines))
            try:
                header = next(rows, [])
                for cells in rows:
                    where = f"{file.name}:{rows.line_num}"
                    if len(cells) != len(header):
                        yield BadRow(where, f"{len(cells)} columns, the first line has {len(header)}")
                    else:
                        yield _row(where, dict(zip(header, cells, strict=True)), series)
            except csv.Error as error:
                yield BadRow(f"{file.name}:{rows.line_num}", f"{error}; the rest of the file is left out")
    except OSError as error:
        raise UsageError(f"data {file}: {(error.strerror or str(error)).lower()}", try_="see --data") from None


def _row(where: str, row: Mapping[str, Any], series: Series) -> tuple[str, Readings] | BadRow:
    centre, scale = series.centre or (0.0,) * len(series.columns), series.scale or (1.0,) * len(series.columns)
    values = []
    for name, middle, unit in zip(series.columns, centre, scale, strict=True):
        reading = _number(row[name])
        if reading is None or not abs(value := (reading - middle) / unit) < MOST:
            return BadRow(where, f"{name!r} is no number")
        values.append(value)
    time = _number(row[series.time]) if series.time else 0.0
    if time is None:
        return BadRow(where, f"{series.time!r} is no number")
    return where, Readings(tuple(values), _text(row[series.label]), _text(row[series.id]) if series.id else "", time)


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
