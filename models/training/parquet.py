"""Rows of a Parquet file, by pyarrow, which only who has such files needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from wire.errors import CorruptData, UsageError

ROWS_AT_ONCE: Final = 256
"""Of a file that is larger than memory."""


def columns(file: Path) -> list[str]:
    """The names of all columns. Raises what `rows` raises."""
    pyarrow, parquet = _library(file)
    try:
        with file.open("rb") as raw, parquet.ParquetFile(raw) as table:
            return list(table.schema_arrow.names)
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise CorruptData(f"data {file}: can't be read: {error}", try_="write the file anew") from None


def rows(file: Path, required: tuple[str, ...], wanted: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of each row, from 1, and what stands in those of the `wanted` columns that there are.

    Raises UsageError where there is no pyarrow, CorruptData for what is no Parquet file or lacks a `required` column.
    """
    pyarrow, parquet = _library(file)
    number = 0
    try:
        with file.open("rb") as raw, parquet.ParquetFile(raw) as table:
            names = table.schema_arrow.names
            if missing := [name for name in required if name not in names]:
                said = ", ".join(map(repr, missing))
                raise CorruptData(f"data {file}: no column {said} among its {len(names)}", try_="rename one")
            present = [name for name in wanted if name in names]
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=present):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        where = f" behind row {number}" if number else ""
        raise CorruptData(f"data {file}: can't be read{where}: {error}", try_="write the file anew") from None


def _library(file: Path) -> tuple[Any, Any]:
    """pyarrow and its part for these files; raise UsageError where there is none."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError(
            f"data {file}: there is no pyarrow here to read it with", try_="pip install 'edgelam[parquet]'"
        ) from None
    return pyarrow, parquet
