"""A device's own data: files of text, read row by row. What is no sample is counted and left out.

    .jsonl    one object per line with `text`; or with `prompt` and `text`, of which the text alone is learnt; or with
              `text` and `label`
    .csv      with a header line that names the column `text`, and perhaps `prompt` or `label`
    .parquet  columns as those of a .csv (models.training.parquet)
    .txt      one sample per paragraph; paragraphs are parted by empty lines

A folder stands for the files of these kinds in it, by name.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from models.training import parquet
from wire.errors import CorruptData, UsageError

KINDS: Final = (".jsonl", ".csv", ".parquet", ".txt")
MAX_ROW_BYTES: Final = 4 * 1024 * 1024
MAX_ROWS: Final = 10_000_000
MAX_SAID: Final = 8


class Sample(Struct, frozen=True):
    """A text to be learnt, behind a prompt that is not; or the label of a text."""

    text: str
    prompt: str = ""
    label: str = ""


class BadRow(Struct, frozen=True):
    where: str
    because: str

    def __str__(self) -> str:
        return f"{self.where}: {self.because}"


class DataSet(Struct, frozen=True, kw_only=True):
    samples: tuple[Sample, ...]
    bad_rows: int = 0
    said: tuple[BadRow, ...] = ()
    """The first of them."""


class _Row(Struct, frozen=True):
    text: str
    prompt: str = ""
    label: Any = ""


def files_of(path: Path, kinds: tuple[str, ...] = KINDS) -> list[Path]:
    """The files of these kinds that a path stands for; raise UsageError if there are none that can be read."""
    try:
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in kinds and file.is_file())
            if not found:
                raise UsageError(f"data {path}: no {', '.join(kinds)} in it", try_="one file of data at least")
            return found
        with path.open("rb"):
            pass
    except OSError as error:
        raise UsageError(f"data {path}: {(error.strerror or str(error)).lower()}", try_="see --data") from None
    if path.suffix.lower() not in kinds:
        raise UsageError(f"data {path}: kind {path.suffix or 'without a name'!r} is not read", try_=", ".join(kinds))
    return [path]


def read(path: Path) -> DataSet:
    """All samples under a path. Raises UsageError for what can't be read, CorruptData where no sample is left."""
    samples: list[Sample] = []
    bad = 0
    said: list[BadRow] = []
    for file in files_of(path):
        for found in _rows(file):
            if isinstance(found, Sample):
                samples.append(found)
            else:
                bad += 1
                if len(said) < MAX_SAID:
                    said.append(found)
            if len(samples) > MAX_ROWS:
                raise UsageError(f"data {path}: more than {MAX_ROWS} samples", try_="fewer")
    if not samples:
        why = f"; {said[0]}" if said else ""
        raise CorruptData(f"data {path}: no sample in it{why}", try_='rows such as {"text": "..."}')
    return DataSet(samples=tuple(samples), bad_rows=bad, said=tuple(said))


def _rows(file: Path) -> Iterator[Sample | BadRow]:
    try:
        if file.suffix.lower() == ".csv":
            with file.open(encoding="utf-8", errors="replace", newline="") as lines:
                yield from _of_csv(file, lines)
            return
        if file.suffix.lower() == ".parquet":
            yield from _of_columns(file)
            return
        with file.open("rb") as raw:
            yield from _of_objects(file, raw) if file.suffix.lower() == ".jsonl" else _of_paragraphs(file, raw)
    except OSError as error:
        raise UsageError(f"data {file}: {(error.strerror or str(error)).lower()}", try_="see --data") from None


def _of_objects(file: Path, raw: Any) -> Iterator[Sample | BadRow]:
    for number in itertools.count(1):
        line = raw.readline(MAX_ROW_BYTES + 1)
        if not line:
            return
        where = f"{file.name}:{number}"
        if len(line) > MAX_ROW_BYTES:
            yield BadRow(where, f"longer than {MAX_ROW_BYTES} bytes")
            while line and not line.endswith(b"\n"):
                line = raw.readline(MAX_ROW_BYTES)
        elif line.strip():
            try:
                row = msgspec.json.decode(line, type=_Row)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                yield BadRow(where, str(error))
            else:
                yield _sample(where, row.text, row.prompt, _label_text(row.label))


def _of_csv(file: Path, lines: Iterable[str]) -> Iterator[Sample | BadRow]:
    rows = csv.reader(lines)
    try:
        header = next(rows, [])
        if "text" not in header:
            # What stands there instead is not said: this text leaves the board, and the line may be a row.
            raise CorruptData(
                f"data {file}: no column 'text' among the {len(header)} of the first line",
                try_="a first line that names the columns",
            )
        text = header.index("text")
        prompt, label = (header.index(name) if name in header else -1 for name in ("prompt", "label"))
        for row in rows:
            where = f"{file.name}:{rows.line_num}"
            if len(row) != len(header):
                yield BadRow(where, f"{len(row)} columns, the first line has {len(header)}")
            else:
                yield _sample(where, row[text], row[prompt] if prompt >= 0 else "", row[label] if label >= 0 else "")
    except csv.Error as error:
        yield BadRow(f"{file.name}:{rows.line_num}", f"{error}; the rest of the file is left out")


def _of_columns(file: Path) -> Iterator[Sample | BadRow]:
    for number, row in parquet.rows(file, ("text",), ("text", "prompt", "label")):
        where, text, prompt = f"{file.name}:{number}", row["text"], row.get("prompt")
        if not isinstance(text, str) or not isinstance(prompt, (str, type(None))):
            yield BadRow(where, "its text or prompt is none")
        elif len(text) > MAX_ROW_BYTES:
            yield BadRow(where, f"longer than {MAX_ROW_BYTES} letters")
        else:
            yield _sample(where, text, prompt or "", _label_text(row.get("label", "")))


def _of_paragraphs(file: Path, raw: Any) -> Iterator[Sample | BadRow]:
    began, lines, size = 1, list[bytes](), 0
    for number in itertools.count(1):
        line = raw.readline(MAX_ROW_BYTES + 1)
        if line.strip() and size <= MAX_ROW_BYTES:
            began = began if lines else number
            lines.append(line)
            size += len(line)
        elif not line.strip() and lines:
            where = f"{file.name}:{began}"
            if size > MAX_ROW_BYTES:
                yield BadRow(where, f"longer than {MAX_ROW_BYTES} bytes")
            else:
                yield _sample(where, b"".join(lines).decode("utf-8", "replace").strip(), "")
            lines, size = [], 0
        if not line:
            return


def _label_text(label: Any) -> str:
    """Numbers are labels, too; what is neither is of no concern where texts are learnt."""
    is_label = isinstance(label, (str, int)) and not isinstance(label, bool)
    return str(label) if is_label else ""


def _sample(where: str, text: str, prompt: str, label: str = "") -> Sample | BadRow:
    return Sample(text, prompt, label) if text.strip() else BadRow(where, "its text is empty")
