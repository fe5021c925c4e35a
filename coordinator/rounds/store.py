"""What is known of jobs, on disk before anybody is told.

In the journal: a job's record, a record of each round that is over, and of each update that counts in the one under
way. Beside it files, each written whole before the journal says that it is there, under `jobs/NAME/`:

    factors-7.f32            with which round 7 begins
    update-7-pi4.f32         what pi4 made of them
    adapter_model.safetensors, adapter_config.json, provenance.json     of the last round that is over (PEFT)
    head.safetensors                                                    the task module, where labels are learnt
    connectors.safetensors                                              of several modalities
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from coordinator.config import write_atomically
from coordinator.journal import Journal
from coordinator.rounds.job import Job
from coordinator.rounds.offers import Timing
from coordinator.rounds.schedule import Queues
from models.lora.adapter import CONNECTORS_FILE, HEAD_FILE
from models.lora.serving import CONFIG, PROVENANCE, TENSORS
from wire.errors import CorruptData
from wire.messages import Role, StageOrder, UpdateMeta
from wire.modalities import Told, accuracy_by
from wire.shares import Share

LOG = logging.getLogger("edgelam.rounds")

Floats = npt.NDArray[np.float32]
State = Literal["running", "stopped", "done", "failed"]

FILES: Final = (TENSORS, CONFIG, PROVENANCE, HEAD_FILE, CONNECTORS_FILE)
"""Of an adapter; the last ones where labels are learnt alone, and of several modalities."""

SUMMED: Final = "*"
"""Among devices whose updates count: of whom the one sum is, in a secure job."""


class TrunkAt(Struct, frozen=True, kw_only=True):
    """Where blocks [first_block, end_block) of a split model are."""

    device: str
    stage: int
    """Another one each time that they move: two boards never hear the same inbox."""
    first_block: int
    end_block: int
    role: Role = "trunk"
    share: Share | None = None
    """Of a shard."""


class JobRecord(Struct, frozen=True, kw_only=True):
    """`round` is the one under way, or the next; `factors` the digest of what it begins with."""

    job: Job
    state: State
    because: str = ""
    round: int = 0
    epoch: int = 0
    factors: str = ""
    base: str = ""
    """Digest of the checkpoint that the adapter is of."""
    orders: dict[str, tuple[StageOrder, ...]] = {}
    owns: dict[str, tuple[str, ...]] = {}
    """Device -> modalities that it had when it got its first order: it keeps these."""
    mode_because: str = ""
    """Why it has its mode, where that was left to us."""
    trunk: tuple[TrunkAt, ...] = ()
    """Of a split model, in the order of blocks, once it was settled."""
    trunk_because: str = ""
    passed_over: tuple[str, ...] = ()
    """Boards that were the trunk and could not be."""
    chosen: tuple[str, ...] = ()
    """Who takes part in the round under way; none before that is settled."""
    shares: dict[str, float] = {}
    """Of a shared medium, for each of them."""
    paces: dict[str, float] = {}
    """Bytes/s that each is told to send with."""
    expected_s: float | None = None
    """What the round under way was planned to take."""
    queues: Queues = Queues()
    timing: dict[str, Timing] = {}
    """Of devices that took part."""
    each_s: float | None = None
    """What each of them adds to a round of a split model, whoever is the slowest; None: not known."""
    began_unix: float = 0.0

    @property
    def name(self) -> str:
        return self.job.name

    def segment_of(self, device: str, stage: int) -> int | None:
        """Which of the trunk's segments that is, from 0."""
        places = [place for place, at in enumerate(self.trunk) if (at.device, at.stage) == (device, stage)]
        return places[0] if places else None

    def order_of(self, device: str) -> StageOrder:
        """By which a device trains on its data."""
        return next(order for order in self.orders[device] if not _is_trunk(order))

    @property
    def is_placed(self) -> bool:
        """Whether the trunk's boards have their orders, if there is a trunk."""
        return all(any(order.stage == at.stage for order in self.orders.get(at.device, ())) for at in self.trunk)

    @property
    def trunk_orders(self) -> tuple[StageOrder, ...]:
        """Of a job that is placed, in the order of blocks."""
        return tuple(next(order for order in self.orders[at.device] if order.stage == at.stage) for at in self.trunk)

    @property
    def with_data(self) -> dict[str, StageOrder]:
        """Device -> its order, of those that have one to train on their data."""
        orders = {device: [order for order in many if not _is_trunk(order)] for device, many in self.orders.items()}
        return {device: found[0] for device, found in orders.items() if found}


class DeviceRound(Struct, frozen=True, kw_only=True):
    """What a device had to do with a round; `refused` why it did not count."""

    samples: int = 0
    bad_rows: int = 0
    loss: float | None = None
    held_out_loss: float | None = None
    held_out_count: int = 0
    held_out_right: int | None = None
    compute_s: float = 0.0
    noise: float | None = None
    """Multiplier, in a private job."""
    epsilon: float | None = None
    """What the job had spent on the device by then."""
    sent_bytes: int = 0
    wall_s: float = 0.0
    """From the question to the whole answer; 0 where it was asked again, or by another coordinator."""
    own_s: float = 0.0
    """In a round of a split model: all but its waiting for the blocks and for others."""
    refused: str = ""
    by_modality: dict[str, Told] = {}
    """Of a job of several."""


class RoundRecord(Struct, frozen=True, kw_only=True):
    """A round that is over. `loss` is the mean while training, `held_out_loss` of the factors that it began with."""

    round: int
    trained: bool = True
    """False: it judged what had come out."""
    devices: dict[str, DeviceRound]
    loss: float | None
    held_out_loss: float | None
    held_out_accuracy: float | None = None
    """Share of the held-out labels that were told right, all devices together."""
    wall_s: float
    expected_s: float | None = None
    lost: float | None = None
    """With 'stack': of all that has been learnt, the share for which there were too few ranks (Frobenius norm)."""
    down_bytes: int
    up_bytes: int
    ended_unix: float

    @property
    def accuracy_by(self) -> dict[str, float]:
        """Modality -> share of its held-out labels that were told right, all devices together."""
        return accuracy_by([found.by_modality for found in self.devices.values() if not found.refused])


class _Kept(Struct, frozen=True):
    meta: UpdateMeta
    digest: str


class JobStore:
    """One per coordinator; methods that write return when it is on disk."""

    def __init__(self, folder: Path, journal: Journal) -> None:
        self._folder = folder
        self._journal = journal

    def folder_of(self, name: str) -> Path:
        return self._folder / name

    def records(self) -> dict[str, JobRecord]:
        """All jobs."""
        return records_in(self._journal)

    def save(self, record: JobRecord) -> None:
        self._journal.save_job(record.name, msgspec.json.encode(record))

    def begin(self, record: JobRecord, factors: Floats) -> JobRecord:
        """A new job, whatever one of its name has left."""
        self._journal.forget_job(record.name)
        for path in sorted(self.folder_of(record.name).glob("*")):
            path.unlink()
        record = msgspec.structs.replace(record, factors=self._write(self._factors(record), factors))
        self.save(record)
        return record

    def factors(self, record: JobRecord) -> Floats:
        """What the round of the record begins with; raises CorruptData."""
        return self._read(self._factors(record), record.factors)

    def write_update(self, name: str, number: int, device: str, vector: Floats) -> str:
        """Put an update on disk, and give its digest: it counts when `count_update` has returned. Any thread."""
        return self._write(self._update(name, number, device), vector)

    def count_update(self, name: str, meta: UpdateMeta, digest: str) -> None:
        record = msgspec.json.encode(_Kept(meta, digest))
        self._journal.save_update(name, meta.round, meta.device, record)

    def updates(self, name: str, number: int) -> dict[str, tuple[UpdateMeta, Floats]]:
        """Those that count in a round, by device. One whose file is damaged is as if it had never come."""
        found: dict[str, tuple[UpdateMeta, Floats]] = {}
        for device, data in self._journal.updates(name, number).items():
            try:
                kept = msgspec.json.decode(data, type=_Kept)
                found[device] = kept.meta, self._read(self._update(name, number, device), kept.digest)
            except (msgspec.DecodeError, CorruptData) as error:
                LOG.error("job %s, round %d: the update of %s is lost: %s", name, number, device, error)
                self._journal.forget_update(name, number, device)
        return found

    def save_summed(self, name: str, number: int, survivors: tuple[str, ...]) -> None:
        """Of whom the sum of a round is, in a secure job: what is revealed from now on is of these."""
        if not self.summed(name, number):
            self._journal.save_update(name, number, SUMMED, msgspec.json.encode(survivors))

    def summed(self, name: str, number: int) -> tuple[str, ...]:
        """None, while nothing was revealed."""
        data = self._journal.updates(name, number).get(SUMMED)
        return () if data is None else msgspec.json.decode(data, type=tuple[str, ...])

    def write_next(self, record: JobRecord, factors: Floats) -> str:
        """Put what the next round begins with on disk, and give its digest. Any thread."""
        return self._write(self._factors(msgspec.structs.replace(record, round=record.round + 1)), factors)

    def finish_round(self, record: JobRecord, done: RoundRecord, factors: str, state: State) -> JobRecord:
        """The round is over and came to the factors of this digest, which are on disk."""
        ahead = msgspec.structs.replace(
            record,
            round=record.round + 1,
            state=state,
            chosen=(),
            factors=factors,
            shares={},
            paces={},
            expected_s=None,
        )
        self._journal.finish_round(record.name, record.round, msgspec.json.encode(done), msgspec.json.encode(ahead))
        for path in [*self.folder_of(record.name).glob(f"update-{record.round}-*.f32"), self._factors(record)]:
            path.unlink(missing_ok=True)
        return ahead

    def rounds(self, name: str) -> list[RoundRecord]:
        return [msgspec.json.decode(data, type=RoundRecord) for data in self._journal.rounds(name)]

    def write_adapter(self, name: str, files: dict[str, bytes]) -> None:
        for file, data in files.items():
            write_atomically(self.folder_of(name) / file, data)

    def _factors(self, record: JobRecord) -> Path:
        return self.folder_of(record.name) / f"factors-{record.round}.f32"

    def _update(self, name: str, number: int, device: str) -> Path:
        return self.folder_of(name) / f"update-{number}-{device}.f32"

    @staticmethod
    def _write(path: Path, vector: Floats) -> str:
        data = vector.astype("<f4", copy=False).tobytes()
        write_atomically(path, data)
        return digest_of(data)

    @staticmethod
    def _read(path: Path, digest: str) -> Floats:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CorruptData(f"{path}: {(error.strerror or str(error)).lower()}", try_="begin the job again") from None
        if digest_of(data) != digest:
            raise CorruptData(f"{path}: not what was written there", try_="begin the job again")
        return np.frombuffer(data, "<f4").astype(np.float32)


def records_in(journal: Journal) -> dict[str, JobRecord]:
    """All jobs; one that can't be read any more is left out and told of in the log."""
    found: dict[str, JobRecord] = {}
    for name, data in journal.jobs().items():
        try:
            found[name] = msgspec.json.decode(data, type=JobRecord)
        except msgspec.DecodeError as error:
            LOG.error("job %s can't be read (%s): it is left alone", name, error)
    return found


def running_jobs(journal: Journal) -> list[JobRecord]:
    """Jobs that devices have orders of: a coordinator that starts tells them the same again."""
    return [record for record in records_in(journal).values() if record.state == "running" and record.orders]


def _is_trunk(order: StageOrder) -> bool:
    return order.training is not None and order.training.role not in ("whole", "ends")


def topic_name(job: str) -> str:
    """The deployment under which devices hold their part of a job."""
    return f"tune-{job}"


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def now_unix() -> float:
    """For people."""
    return time.time()
