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
from collections.abc import Callable, Iterator
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


class Steps(Struct, kw_only=True):
    """The newest round of a job whose steps are releases by themselves."""

    round: str = ""
    """Its name, by all that its steps are made of beside what others say meanwhile."""
    before: int = 0
    """Releases of the job before it: who comes back to a round behind another one draws others for it."""
    told: dict[int, list[str]] = {}
    """Step -> the releases that were made with the samples that were drawn for it."""


class Account(Struct, kw_only=True):
    """Of one job, or of a whole data set."""

    cost: list[float] = []
    """At each of ORDERS."""
    releases: int = 0
    last: str = ""
    """The newest release."""
    steps: Steps = msgspec.field(default_factory=Steps)

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
            book, key = self._opened()
            account = book.jobs.get(job, Account())
            if account.last != release:
                account = self._entered(book, job, Account(last=release), cost, count, most_epsilon, delta)
        return Stream(key, release), epsilon(account.spent, delta)

    def steps(self, job: str, round_name: str) -> Steps:
        """What was told of a round, and behind how many releases. Raises CorruptData."""
        with self._locked():
            book, _ = self._opened()
        return _steps_of(book.jobs.get(job, Account()), round_name)

    def draws(self, label: str) -> Stream:
        """Numbers that say who takes part. Nothing is told by these. Raises CorruptData."""
        with self._locked():
            _, key = self._opened()
        return Stream(key, label)

    def spend_step(
        self,
        job: str,
        round_name: str,
        step: int,
        release: str,
        cost_again: Callable[[int], Doubles],
        most_epsilon: float,
        delta: float,
    ) -> tuple[Stream, float]:
        """The same for one step of a round: `cost_again(times)` is what a release costs with samples that had been used
        so many times. One that was told before costs nothing, also if others were since, of the same round. Raises as
        `spend`."""
        with self._locked():
            book, key = self._opened()
            account = book.jobs.get(job, Account())
            steps = _steps_of(account, round_name)
            told = steps.told.get(step, [])
            if release not in told:
                steps.told[step] = [*told, release]
                named = Account(last=account.last, steps=steps)
                account = self._entered(book, job, named, cost_again(len(told)), 1, most_epsilon, delta)
        return Stream(key, release), epsilon(account.spent, delta)

    def check(self, job: str, cost: Doubles, most_epsilon: float, delta: float) -> None:
        """Raise Spent if so much more would be too much, and CorruptData."""
        with self._locked():
            book, _ = self._opened()
        self._check(book, job, cost, most_epsilon, delta)

    def _entered(
        self, book: Book, job: str, named: Account, cost: Doubles, count: int, most_epsilon: float, delta: float
    ) -> Account:
        """The account with so much more, on disk; `named` says of which releases."""
        mine, all_jobs = self._check(book, job, cost, most_epsilon, delta)
        releases = book.jobs.get(job, Account()).releases + count
        account = msgspec.structs.replace(named, cost=mine.tolist(), releases=releases)
        book.jobs.pop(job, None)
        book.jobs[job] = account  # the newest last
        while len(book.jobs) > MOST_JOBS:
            del book.jobs[next(iter(book.jobs))]
        book.all = Account(cost=all_jobs.tolist(), releases=book.all.releases + count)
        write_atomically(self._path, msgspec.json.format(msgspec.json.encode(book)))
        return account

    def _check(self, book: Book, job: str, cost: Doubles, most_epsilon: float, delta: float) -> tuple[Doubles, Doubles]:
        """What job and data set come to with so much more; raises Spent."""
        spent = book.jobs.get(job, Account()).spent
        mine, all_jobs = spent + cost, book.all.spent + cost
        if epsilon(mine, delta) > most_epsilon * (1 + 1e-9):
            raise Spent(
                f"the budget of {job} is spent: epsilon {epsilon(spent, delta):.4g}"
                f" of {most_epsilon:.4g}, with what is due it is {epsilon(mine, delta):.4g}"
            )
        if self._most is not None and epsilon(all_jobs, OWN_DELTA) > self._most:
            raise Spent(
                f"what this board allows for its data is spent: epsilon"
                f" {epsilon(book.all.spent, OWN_DELTA):.4g} of {self._most:.4g} over all jobs"
            )
        return mine, all_jobs

    def _opened(self) -> tuple[Book, bytes]:
        """The book, and the key that it is of; raises CorruptData."""
        book, key = self._read(), self._key()
        digest = hashlib.sha256(key).hexdigest()
        if book.key not in ("", digest):
            raise CorruptData(f"{self._folder}/key: not the one of {self._path.name}", try_=BACKUP)
        book.key = digest
        return book, key

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


def _steps_of(account: Account, round_name: str) -> Steps:
    """What is known of a round: nothing, if it is not the newest."""
    return account.steps if account.steps.round == round_name else Steps(round=round_name, before=account.releases)
