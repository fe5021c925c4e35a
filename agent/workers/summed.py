"""For which sums a board has given shares: a file, written before they leave the board.

Of one round it gives them for one set of survivors alone: the difference of two sums would be the update of whoever is
in one of them. A worker that was started anew has other keys, but would come to the same update.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from agent.records import write_atomically
from models.secure.session import TellsTooMuch
from wire.errors import CorruptData

MOST_JOBS: Final = 256
"""That are remembered."""


class Sum(Struct, frozen=True):
    """The last one of a job."""

    round: int
    survivors: tuple[str, ...]


class Book(Struct, kw_only=True):
    schema: str = "edgelam.sums/1"
    jobs: dict[str, Sum] = {}


class Sums:
    """Of one board, all its jobs. Several workers may have it open."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "sums"  # data sets' ledgers there end in .json

    def enter(self, job: str, round_number: int, survivors: tuple[str, ...]) -> None:
        """Remember, on disk, that shares are given for a sum. Raises TellsTooMuch, with the book as it was, where they
        were given for another one of the same round, or of a later one; CorruptData for a book that can't be read."""
        handle = os.open(self._path.with_name("sums-lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            book, wanted = self._read(), Sum(round_number, survivors)
            last = book.jobs.get(job)
            if last == wanted:
                return
            if last is not None and last.round >= round_number:
                raise TellsTooMuch(
                    f"shares of round {last.round} of {job} were given for a sum of {', '.join(last.survivors)};"
                    f" another one of round {round_number} would tell of single boards"
                )
            book.jobs.pop(job, None)
            book.jobs[job] = wanted  # the newest last
            while len(book.jobs) > MOST_JOBS:
                del book.jobs[next(iter(book.jobs))]
            write_atomically(self._path, msgspec.json.format(msgspec.json.encode(book)))
        finally:
            os.close(handle)

    def _read(self) -> Book:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=Book)
        except FileNotFoundError:
            return Book()
        except (OSError, msgspec.DecodeError) as error:
            raise CorruptData(f"{self._path}: can't be read: {error}", try_="the folder as it was") from None
