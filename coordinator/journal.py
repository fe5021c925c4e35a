"""What the coordinator has acknowledged, in SQLite: it is on disk before anyone is told.

The epoch counter (a fence must never go back), deployments (plan, orders and the request they answer), profiles that
are not believed, artifacts (digest, size, where the file is), and jobs with their rounds and updates (what is in them
says coordinator.rounds.store). One connection, used by one thread.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from coordinator.distrust import Distrust
from coordinator.planning.plan import Plan
from wire.errors import CorruptData, UsageError
from wire.limits import ADAPTER_ID, MAX_ADAPTERS
from wire.messages import StageOrder

SCHEMA = """
CREATE TABLE IF NOT EXISTS epoch (id INTEGER PRIMARY KEY CHECK (id = 1), value INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS deployment (name TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS distrust (device TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS artifact (digest TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, path TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS job (name TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS job_round (
    job TEXT NOT NULL, round INTEGER NOT NULL, record BLOB NOT NULL, PRIMARY KEY (job, round));
CREATE TABLE IF NOT EXISTS job_update (
    job TEXT NOT NULL, round INTEGER NOT NULL, device TEXT NOT NULL, record BLOB NOT NULL,
    PRIMARY KEY (job, round, device));
"""


class DeployRequest(Struct, frozen=True, kw_only=True):
    """What a user asked for; two equal requests are answered by one deployment."""

    model: str
    precision: str = "int4"
    objective: str = "latency"
    context_tokens: int = 1024
    slots: int | None = None
    """Requests at once; None: as many as go well on the boards (coordinator.planning.slots)."""
    replicas: int = 1
    """Copies of each stage, the one that works included."""
    boards_at_least: int = 1
    boards_at_most: int = 64
    topology: str = "auto"
    excluded: tuple[str, ...] = ()
    pins: tuple[tuple[str, str], ...] = ()
    """(module, device) pairs."""
    error_budget_percent: float = 0.0
    """By how much codecs at the cuts may raise the model's perplexity; 0: hidden states cross as they are."""
    tokens_per_s: float | None = None
    """With objective throughput: the load that must be carried."""
    weights: tuple[tuple[str, float], ...] = ()
    """(objective, weight) pairs, with objective weighted."""
    reserve_percent: float = 10.0
    """Of each board's usable memory, that stays free."""
    engine: str = "auto"
    """What all stages shall run on; auto: each board on what it is fastest with."""
    adapters: Annotated[tuple[Annotated[str, Meta(pattern=ADAPTER_ID)], ...], Meta(max_length=MAX_ADAPTERS)] = ()
    """By the ids of their copies (models.lora.serving): a request has one of them, or none."""


class DeploymentRecord(Struct, frozen=True, kw_only=True):
    """A deployment in force."""

    name: str
    request: DeployRequest
    plan: Plan
    orders: dict[str, tuple[StageOrder, ...]]
    """Device -> its stages."""
    checkpoint: str
    """Path of the checkpoint: tokenizer and chat template are read from it."""


class Journal:
    """The coordinator's memory; methods return when the data is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def open(self) -> None:
        """Open or create the file; raise CorruptData if it is no journal, UsageError if it can't be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise UsageError(
                f"{self.path}: can't be opened ({error})", try_="another state folder: --state, or $EDGELAM_STATE"
            ) from None
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            connection.close()
            raise CorruptData(
                f"{self.path}: not a usable journal ({error})", try_=f"move {self.path} away and start again"
            ) from None
        self._connection = connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeError("journal used before open()")
        return self._connection

    def next_epoch(self, at_least: int = 0) -> int:
        """Give a number greater than every epoch given before and than `at_least`."""
        row = self._db.execute("SELECT value FROM epoch WHERE id = 1").fetchone()
        value = max(int(row[0]) if row else 0, at_least) + 1
        self._db.execute("INSERT OR REPLACE INTO epoch (id, value) VALUES (1, ?)", (value,))
        return value

    def save_deployment(self, record: DeploymentRecord) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO deployment (name, record) VALUES (?, ?)",
            (record.name, msgspec.json.encode(record)),
        )

    def remove_deployment(self, name: str) -> None:
        self._db.execute("DELETE FROM deployment WHERE name = ?", (name,))

    def deployments(self) -> list[DeploymentRecord]:
        """All deployments in force; raise CorruptData for a record that can't be read."""
        found = []
        for name, data in self._db.execute("SELECT name, record FROM deployment ORDER BY name"):
            try:
                found.append(msgspec.json.decode(data, type=DeploymentRecord))
            except msgspec.DecodeError as error:
                raise CorruptData(
                    f"{self.path}: deployment {name!r} can't be read ({error})",
                    try_=f"move {self.path} away and deploy again",
                ) from None
        return found

    def save_distrust(self, distrust: Distrust) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO distrust (device, record) VALUES (?, ?)",
            (distrust.device, msgspec.json.encode(distrust)),
        )

    def forget_distrust(self, device: str) -> None:
        self._db.execute("DELETE FROM distrust WHERE device = ?", (device,))

    def distrusts(self) -> dict[str, Distrust]:
        """Profiles that are not believed, by device; raise CorruptData for a record that can't be read."""
        found = {}
        for device, data in self._db.execute("SELECT device, record FROM distrust"):
            try:
                found[device] = msgspec.json.decode(data, type=Distrust)
            except msgspec.DecodeError as error:
                raise CorruptData(
                    f"{self.path}: what is known of {device!r} can't be read ({error})",
                    try_=f"move {self.path} away and deploy again",
                ) from None
        return found

    def save_job(self, name: str, record: bytes) -> None:
        self._db.execute("INSERT OR REPLACE INTO job (name, record) VALUES (?, ?)", (name, record))

    def jobs(self) -> dict[str, bytes]:
        return dict(self._db.execute("SELECT name, record FROM job ORDER BY name"))

    def forget_job(self, name: str) -> None:
        """It, its rounds and their updates."""
        self._db.execute("BEGIN")
        for table, column in (("job", "name"), ("job_round", "job"), ("job_update", "job")):
            self._db.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))
        self._db.execute("COMMIT")

    def save_update(self, job: str, number: int, device: str, record: bytes) -> None:
        """Raises ValueError for one that is there already: it would count twice."""
        try:
            self._db.execute(
                "INSERT INTO job_update (job, round, device, record) VALUES (?, ?, ?, ?)",
                (job, number, device, record),
            )
        except sqlite3.IntegrityError:
            raise ValueError(f"an update of {device} for round {number} of {job} is there already") from None

    def updates(self, job: str, number: int) -> dict[str, bytes]:
        """Device -> record."""
        wanted = "SELECT device, record FROM job_update WHERE job = ? AND round = ? ORDER BY device"
        return dict(self._db.execute(wanted, (job, number)))

    def forget_update(self, job: str, number: int, device: str) -> None:
        self._db.execute("DELETE FROM job_update WHERE job = ? AND round = ? AND device = ?", (job, number, device))

    def finish_round(self, job: str, number: int, record: bytes, job_record: bytes) -> None:
        """The round is over and the job goes on as it says now, both or neither; its updates are needed no more."""
        self._db.execute("BEGIN")
        try:
            self._db.execute(
                "INSERT OR REPLACE INTO job_round (job, round, record) VALUES (?, ?, ?)", (job, number, record)
            )
            self._db.execute("INSERT OR REPLACE INTO job (name, record) VALUES (?, ?)", (job, job_record))
            self._db.execute("DELETE FROM job_update WHERE job = ? AND round <= ?", (job, number))
        except sqlite3.Error:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def rounds(self, job: str) -> list[bytes]:
        wanted = "SELECT record FROM job_round WHERE job = ? ORDER BY round"
        return [record for (record,) in self._db.execute(wanted, (job,))]

    def save_artifact(self, digest: str, size_bytes: int, path: Path) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO artifact (digest, size_bytes, path) VALUES (?, ?, ?)",
            (digest, size_bytes, str(path)),
        )

    def forget_artifact(self, digest: str) -> None:
        self._db.execute("DELETE FROM artifact WHERE digest = ?", (digest,))

    def artifacts(self) -> dict[str, tuple[int, Path]]:
        rows = self._db.execute("SELECT digest, size_bytes, path FROM artifact")
        return {digest: (int(size), Path(path)) for digest, size, path in rows}
