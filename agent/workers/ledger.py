"""What a board has told of its data: a file per data set, written before anything leaves the board.

The file holds what all releases together have cost at each order (models.privacy.accountant), the same by job, and
which release was the last of each job: one that is made anew, with the very same numbers, costs nothing more. Beside it
lies the board's key, from which all its noise comes; it never leaves the board.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from msgspec import Struct

from agent.records import write_atomically
from models.privacy.accountant import NOTHING, ORDERS, Doubles, epsilon
from models.privacy.noise import KEY_BYTES, Stream
from wire.errors import CorruptData, EdgelamError

MOST_JOBS: Final = 256
"""That are remembered by themselves; the sum over all jobs is of all."""
BACKUP: Final = "the folder as it was; an older copy forgets what was told since then"
OWN_DELTA: Final = 1e-5
"""Of a board's own budget."""


class Spent(EdgelamError):
    """What would be told next costs more than is left of a budget."""


class Account(Struct, kw_only=True):
    """Of one job, or of a whole data set."""

    cost: list[float] = []
    """At each of ORDERS."""
    releases: int = 0
    last: str = ""
    """The newest release."""

    @property
    def spent(self) -> Doubles:
        return np.array(self.cost) if self.cost else NOTHING


class Book(Struct, kw_only=True):
    """A ledger's file."""

    schema: str = "edgelam.ledger/1"
    orders: int = len(ORDERS)
    key: str = ""
    """Digest of the key that its noise came from: with another one a release made anew would be another release."""
    all: Account = msgspec.field(default_factory=Account)
    jobs: dict[str, Account] = {}


class Ledger:
    """Of one data set of this board. Several workers may have it open."""

    def __init__(self, folder: Path, data: str, most_epsilon: float | None = None) -> None:
        """`most_epsilon`: of the data set, over all jobs, at OWN_DELTA; None: no such bound."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._path = folder / f"{data}.json"
        self._most = most_epsilon

    def spend(
        self, job: str, release: str, cost: Doubles, count: int, most_epsilon: float, delta: float
    ) -> tuple[Stream, float]:
        """Enter so many releases that cost `cost` together, on disk; give the numbers for their noise, and the epsilon
        that the job has spent with them. `release` names what is told and what it is made from. Raises Spent, with the
        book as it was, if that would be more than `most_epsilon` for this job or than the board's owner allows;
        CorruptData for a book that can't be read: nothing is told then."""
        with self._locked():
            book, key = self._read(), self._key()
            digest = hashlib.sha256(key).hexdigest()
            if book.key not in ("", digest):
                raise CorruptData(f"{self._folder}/key: not the one of {self._path.name}", try_=BACKUP)
            book.key = digest
            account = book.jobs.get(job, Account())
            if account.last != release:
                mine, all_jobs = account.spent + cost, book.all.spent + cost
                if epsilon(mine, delta) > most_epsilon * (1 + 1e-9):
                    raise Spent(
                        f"the budget of {job} is spent: epsilon {epsilon(account.spent, delta):.4g}"
                        f" of {most_epsilon:.4g}, a round more is {epsilon(mine, delta):.4g}"
                    )
                if self._most is not None and epsilon(all_jobs, OWN_DELTA) > self._most:
                    raise Spent(
                        f"what this board allows for its data is spent: epsilon"
                        f" {epsilon(book.all.spent, OWN_DELTA):.4g} of {self._most:.4g} over all jobs"
                    )
                releases = account.releases + count
                account = Account(cost=mine.tolist(), releases=releases, last=release)
                book.jobs.pop(job, None)
                book.jobs[job] = account  # the newest last
                while len(book.jobs) > MOST_JOBS:
                    del book.jobs[next(iter(book.jobs))]
                book.all = Account(cost=all_jobs.tolist(), releases=book.all.releases + count)
                write_atomically(self._path, msgspec.json.format(msgspec.json.encode(book)))
            return Stream(key, release), epsilon(account.spent, delta)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # One for all data sets: they have one key.
        handle = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _read(self) -> Book:
        try:
            book = msgspec.json.decode(self._path.read_bytes(), type=Book)
        except FileNotFoundError:
            return Book()
        except (OSError, msgspec.DecodeError) as error:
            raise CorruptData(f"{self._path}: can't be read: {error}", try_=BACKUP) from None
        accounts = [book.all, *book.jobs.values()]
        if book.orders != len(ORDERS) or any(len(account.cost) not in (0, len(ORDERS)) for account in accounts):
            raise CorruptData(f"{self._path}: of other orders than {len(ORDERS)}", try_=BACKUP)
        return book

    def _key(self) -> bytes:
        path = self._folder / "key"
        try:
            key = path.read_bytes()
        except FileNotFoundError:
            key = secrets.token_bytes(KEY_BYTES)
            write_atomically(path, key)  # mkstemp: for its owner alone
        if len(key) != KEY_BYTES:
            raise CorruptData(f"{path}: {len(key)} bytes", try_=BACKUP)
        return key


def release_of(*parts: object) -> str:
    """A name for what is told, from all that it is made of."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()
