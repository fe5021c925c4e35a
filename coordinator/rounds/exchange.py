"""One round under way: the factors go out, updates come in, and each counts when it is on disk."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from coordinator.rounds.adapters import aggregate, begun_by, lost, parts_of, taken_by
from coordinator.rounds.machine import Progress, RoundState
from coordinator.rounds.store import DeviceRound, JobRecord, JobStore, RoundRecord, now_unix
from coordinator.rounds.updates import checked, farthest_of
from coordinator.service import Coordinator
from models.lora.adapter import Config
from wire.errors import PeerError
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.messages import RoundMeta, StageError, StageOrder, UpdateMeta, decode
from wire.modalities import Objective

LOG = logging.getLogger("edgelam.rounds")

Floats = npt.NDArray[np.float32]


class Exchange:
    """One round under way: what goes out and what comes in."""

    def __init__(
        self,
        coordinator: Coordinator,
        store: JobStore,
        record: JobRecord,
        config: Config,
        start: Floats,
        tell: Callable[[dict[str, Any]], None],
        *,
        train: bool,
    ) -> None:
        """The round that the record says; with `train` false its devices judge the factors alone."""
        job, number = record.job, record.round
        self.number = number
        self.start = start
        self.train = train
        self.changed = False
        self.lost: float | None = None
        """Of what came out (coordinator.rounds.adapters.lost)."""
        self.updates: dict[str, tuple[UpdateMeta, Floats | None]] = {}
        self._coordinator = coordinator
        self._store = store
        self._record = record
        self._tell = tell
        self._over = False
        self._parts = parts_of(job, number)
        self._farthest = farthest_of(job)
        self._config = config
        self._down_bytes = 0
        self._counted_last = last_counted(store.rounds(record.name)) if job.begins == "own-b" else {}
        self._asked_s: dict[str, float] = {}
        self._asked_again: set[str] = set()
        self._wall_s: dict[str, float] = {}
        self._keeping: set[str] = set()
        self._requests: dict[int, str] = {}
        self._at_least = job.rounds.at_least if train else 1
        self.state: Progress = self._prepared()

    def _prepared(self) -> Progress:
        """How the round stands now that it begins, or goes on after a restart."""
        record, devices = self._record, self._record.chosen
        self._requests = {request_of(record.name, record.epoch, self.number, device): device for device in devices}
        if self.train:
            known = self._store.updates(record.name, self.number)
            self.updates.update({device: known[device] for device in devices if device in known})
        deadline_s = time.monotonic() + record.job.rounds.timeout_s
        return RoundState(self.number, devices, self._at_least, deadline_s, tuple(self.updates))

    def ask(self, device: str) -> None:
        """Send the factors that the round begins with."""
        hub = self._coordinator.hub
        parts: tuple[Any, ...] = self._parts
        meta = RoundMeta(
            reply=hub.reply_inbox,
            round=self.number,
            parts=parts,
            train=self.train,
            bytes_per_s=self._record.paces.get(device) if self.train else None,
            own=self._counted_last.get(device, -1),
            objectives=self._objectives(device),
        )
        if device in self._asked_s:
            self._asked_again.add(device)
        self._asked_s.setdefault(device, time.monotonic())
        request = next(number for number, known in self._requests.items() if known == device)
        order = self._record.order_of(device)
        sent = self._taken(device)
        self._send(device, order, request, meta, Tensor.of(sent) if sent.size else None)

    def _objectives(self, _device: str) -> tuple[Objective, ...]:
        """What its modules are trained for, of a job of several modalities."""
        return ()

    def _taken(self, device: str) -> Floats:
        """What it is sent of the factors."""
        return taken_by(self._config, self._record.job, device, self.start)

    def _send(self, name: str, order: StageOrder, request: int, meta: RoundMeta, tensor: Tensor | None) -> None:
        parcel = Parcel(Kind.ROUND, order.epoch, request, 0, FLAG_FINAL, tensor, msgspec.json.encode(meta))
        self._down_bytes += 0 if tensor is None else tensor.nbytes
        hub = self._coordinator.hub
        hub.send(order.inbox, parcel, lambda why: LOG.warning("round %d to %s: %s", self.number, name, why))

    def heard(self, parcel: Parcel) -> bool:
        device = self._requests.get(parcel.request)
        if device is None or parcel.epoch != self._record.epoch & 0xFFFFFFFF:
            return False
        if not self.state.wanted(device) or device in self._keeping:
            return True
        try:
            if parcel.kind is Kind.ERROR:
                error = decode(parcel.meta, StageError, f"an answer of {device}")
                self._refuse(device, error.text)
            elif parcel.kind is Kind.UPDATE:
                self._take(device, parcel)
        except PeerError as error:
            self._refuse(device, error.message)
        return True

    def close(self) -> None:
        """What comes from now on counts no more, and who is missing need not go on."""
        if self._over:
            return
        self._over = True
        for request, name in self._requests.items():
            if self._works(name):
                order = self._order_of(name)
                self._coordinator.hub.send(order.inbox, Parcel(Kind.CLOSE, order.epoch, request), lambda _why: None)

    def _works(self, name: str) -> bool:
        """Whether somebody goes on with the round until it is told that it is over."""
        return self.state.wanted(name)

    def _order_of(self, name: str) -> StageOrder:
        return self._record.order_of(name)

    def aggregated(self) -> Floats:
        """What the factors become by the updates. Any thread. Raises Refused."""
        config, job, vectors = self._config, self._record.job, self._vectors()
        found = aggregate(config, job, self.number, self.start, vectors)
        self.lost = lost(config, job, self.number, self.start, vectors, found)
        return found

    @property
    def running_s(self) -> float:
        """Since the last of its boards was ready and asked for the first time."""
        return time.monotonic() - max(self._asked_s.values(), default=time.monotonic())

    @property
    def undisturbed(self) -> bool:
        """Whether all that it took is one round's time."""
        return True

    def _vectors(self) -> list[tuple[UpdateMeta, Floats]]:
        """What the factors are made of, in the order of names."""
        found = [self.updates[device] for device in sorted(self.updates)]
        return [(meta, vector) for meta, vector in found if vector is not None]

    def record(self, wall_s: float) -> RoundRecord:
        devices: dict[str, DeviceRound] = {}
        for device, (meta, vector) in sorted(self.updates.items()):
            devices[device] = DeviceRound(
                samples=meta.samples,
                bad_rows=meta.bad_rows,
                loss=meta.loss,
                held_out_loss=meta.held_out_loss,
                held_out_count=meta.held_out_count,
                held_out_right=meta.held_out_right,
                compute_s=meta.compute_s,
                noise=meta.noise,
                epsilon=meta.epsilon,
                sent_bytes=meta.peer_sent_bytes + (0 if vector is None else vector.nbytes),
                wall_s=self._wall_s.get(device, 0.0),
                by_modality=meta.by_modality,
            )
        for device, because in self.state.refused.items():
            devices[device] = DeviceRound(refused=because)
        for device in self.state.missing:
            devices[device] = DeviceRound(refused="no answer in time")
        counted = [found for found in devices.values() if not found.refused]
        return RoundRecord(
            round=self.number,
            trained=self.train,
            devices=devices,
            loss=weighted([(found.loss, found.samples) for found in counted]),
            held_out_loss=weighted([(found.held_out_loss, found.held_out_count) for found in counted]),
            held_out_accuracy=accuracy([(found.held_out_right, found.held_out_count) for found in counted]),
            wall_s=wall_s,
            expected_s=self._record.expected_s if self.train else None,
            lost=self.lost,
            down_bytes=self._down_bytes,
            up_bytes=sum(found.sent_bytes for found in counted),
            ended_unix=now_unix(),
        )

    def _take(self, device: str, parcel: Parcel) -> None:
        meta = decode(parcel.meta, UpdateMeta, f"an update of {device}")
        if device in self._asked_s and device not in self._asked_again:
            self._wall_s[device] = time.monotonic() - self._asked_s[device]
        if not self.train:
            if (meta.device, meta.round) != (device, self.number):
                raise PeerError(f"is of round {meta.round} of {meta.device}")
            self._counted(device, meta, None)
            return
        if self._record.job.privacy is not None and meta.noise is None:
            raise PeerError("says nothing of noise, in a private job")
        vector = checked(meta, parcel.tensor, device, self.number, self._sent_to(device), self._farthest)
        self._keeping.add(device)
        task = asyncio.ensure_future(self._keep(device, meta, vector))
        task.add_done_callback(lambda done: self._kept(device, done))

    def _sent_to(self, device: str) -> Floats:
        """Of the factors that a device began with, the parts that it sends back."""
        return begun_by(self._config, self._record.job, device, self.number, self.start)

    async def _keep(self, device: str, meta: UpdateMeta, vector: Floats) -> None:
        """On disk first, then it counts."""
        store, name = self._store, self._record.name
        digest = await asyncio.to_thread(store.write_update, name, self.number, device, vector)
        if not self._over and self.state.wanted(device):
            store.count_update(name, meta, digest)
            self._counted(device, meta, vector)

    def _kept(self, device: str, done: asyncio.Future[None]) -> None:
        self._keeping.discard(device)
        if not done.cancelled() and (error := done.exception()) is not None:
            self._refuse(device, f"its update could not be kept: {error}")

    def _counted(self, device: str, meta: UpdateMeta, vector: Floats | None) -> None:
        self.state.count(device)
        self.updates[device] = (meta, vector)
        self._ring()

    def _refuse(self, device: str, because: str) -> None:
        LOG.warning("round %d: %s: %s", self.number, device, because)
        self.state.refuse(device, because)
        self._tell({"event": "refused", "round": self.number, "device": device, "because": because})
        self._ring()

    def _ring(self) -> None:
        self.changed = True
        self._coordinator.changes.ring()


def request_of(job: str, epoch: int, number: int, device: str) -> int:
    """The same for the same question, so that a device knows it again when a restarted coordinator asks it."""
    data = f"{job}/{epoch}/{number}/{device}".encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1 | 1


def last_counted(rounds: Sequence[RoundRecord]) -> dict[str, int]:
    """Device -> the last round, of these, in which its update counted."""
    counted = [
        (done, device) for done in rounds if done.trained for device, told in done.devices.items() if not told.refused
    ]
    return {device: done.round for done, device in counted}


def weighted(values: list[tuple[float | None, int]]) -> float | None:
    """The mean of values by weight; None where there are none."""
    known = [(value, weight) for value, weight in values if value is not None and weight > 0]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def accuracy(values: list[tuple[int | None, int]]) -> float | None:
    """Share that was right, over all who told; None where nobody did. Nobody has more right than there were."""
    known = [(min(right, count), count) for right, count in values if right is not None and count > 0]
    total = sum(count for _, count in known)
    return sum(right for right, _ in known) / total if total else None
