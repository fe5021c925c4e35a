"""One round under way, of a secure job: boards train, and of their updates the sum alone is learnt.

What is checked of a masked update is its length and type; of the sum, that it is one that all together can have come
to. A board that sends nonsense within that can't be found out.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from coordinator.rounds.adapters import moved
from coordinator.rounds.exchange import Exchange, request_of
from coordinator.rounds.machine import Progress
from coordinator.rounds.store import DeviceRound, RoundRecord
from coordinator.rounds.summing import SumState
from models.secure.fixed import mean_of
from models.secure.keys import Integers
from models.secure.session import KEYS_BYTES, SEALED_BYTES, Member, Roster, unmasked
from models.secure.shamir import SHARE_BYTES
from wire.errors import PeerError, Refused
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.messages import StageError, UpdateMeta, decode
from wire.sums import SecureMeta, SummedDevice
from wire.tensors import Dtype

LOG = logging.getLogger("edgelam.rounds")

Floats = npt.NDArray[np.float32]

PATIENCE: Final = 0.25
"""Of a round's timeout, behind its deadline, for each step of a sum."""
SECURE_TEXT: Final = (
    "secure: updates are masked, and of each round their sum alone is learnt; in the clear: how many samples there are,"
    " losses where they are told, when a board answers"
)


class SecureExchange(Exchange):
    """A round that trains."""

    def _prepared(self) -> Progress:
        record, devices, rounds = self._record, self._record.chosen, self._record.job.rounds
        self._requests = {request_of(record.name, record.epoch, self.number, device): device for device in devices}
        fixed = self._store.summed(record.name, self.number)
        deadline_s, patience_s = time.monotonic() + rounds.timeout_s, PATIENCE * rounds.timeout_s
        self._sum = SumState(self.number, devices, rounds.at_least, deadline_s, patience_s, fixed)
        self._sent_bytes: Counter[str] = Counter()
        self._forget_session()
        return self._sum

    def _forget_session(self) -> None:
        """No session is one that was before, of this coordinator or of another."""
        self._attempt = self._sum.attempt
        self._session = secrets.randbits(62) + 1
        self._roster: Roster | None = None
        self._keys: dict[str, bytes] = {}
        self._dealt: dict[str, Any] = {}
        self._total: Integers = np.zeros(0, np.uint32)
        self._revealed: dict[str, Any] = {}

    def ask(self, device: str) -> None:
        """Send the factors that the round begins with; or ask for a step of a sum."""
        state = self._sum
        if state.step == "train":
            super().ask(device)
            return
        if self._attempt != state.attempt:
            self._forget_session()
        meta, rows = SecureMeta(session=self._session, step=state.step), None
        if state.step == "shares":
            roster = self._roster_now()
            told = [SummedDevice(device=one.name, samples=one.samples) for one in roster.members.values()]
            meta = msgspec.structs.replace(meta, devices=tuple(told), farthest=roster.farthest)
            rows = np.stack([np.frombuffer(one.keys, np.uint8) for one in roster.members.values()])
        elif state.step == "masked":
            roster = self._roster_now()
            rows = np.zeros((len(roster.members), SEALED_BYTES), np.uint8)
            for sender in state.among:
                rows[roster.places[sender]] = self._dealt[sender][roster.places[device]]
            meta = msgspec.structs.replace(meta, among=state.among)
        elif state.step == "reveal":
            self._settle()
            meta = msgspec.structs.replace(meta, among=state.survivors)
        request = next(number for number, known in self._requests.items() if known == device)
        order = self._order_of(device)
        tensor = None if rows is None else Tensor.of(rows)
        self._down_bytes += 0 if tensor is None else tensor.nbytes
        parcel = Parcel(Kind.SECURE, order.epoch, request, 0, FLAG_FINAL, tensor, msgspec.json.encode(meta))
        self._coordinator.hub.send(
            order.inbox, parcel, lambda why: LOG.warning("round %d to %s: %s", self.number, device, why)
        )

    def _settle(self) -> None:
        """Of whom the sum is: on disk before anything of it is revealed."""
        state, name = self._sum, self._record.name
        if self._store.summed(name, self.number):
            return
        self._store.save_summed(name, self.number, state.survivors)
        lost = sorted(set(state.among) - set(state.survivors))
        if lost:
            text = f"round {self.number}: {', '.join(lost)} lost on the way; shares of the others make up for the masks"
            self._tell({"event": "status", "text": text})

    def _roster_now(self) -> Roster:
        if self._roster is None:
            record = self._record
            members = [Member(name, self.updates[name][0].samples, self._keys[name]) for name in self._sum.members]
            job = f"{self._order_of(self._sum.members[0]).deployment}/{record.epoch}"
            self._roster = Roster(job, self.number, self._session, self._farthest, members)
        return self._roster

    def heard(self, parcel: Parcel) -> bool:
        device = self._requests.get(parcel.request)
        if device is None or parcel.epoch != self._record.epoch & 0xFFFFFFFF:
            return False
        if self._over or device in self._sum.refused:
            return True
        try:
            if parcel.kind is Kind.ERROR:
                self._refuse(device, decode(parcel.meta, StageError, f"an answer of {device}").text)
            elif parcel.kind is Kind.UPDATE and self._sum.wanted(device):
                self._trained(device, parcel)
            elif parcel.kind is Kind.SECURE:
                self._answered(device, parcel)
        except PeerError as error:
            self._refuse(device, error.message)
        return True

    def _trained(self, device: str, parcel: Parcel) -> None:
        meta = decode(parcel.meta, UpdateMeta, f"an update of {device}")
        if (meta.device, meta.round) != (device, self.number):
            raise PeerError(f"is of round {meta.round} of {meta.device}")
        if meta.samples < 1:
            raise PeerError("is of no samples")
        if parcel.tensor is not None:
            raise PeerError("holds an update without a mask, in a secure job")
        if self._record.job.privacy is not None and meta.noise is None:
            raise PeerError("says nothing of noise, in a private job")
        self._counted(device, meta, None)

    def _answered(self, device: str, parcel: Parcel) -> None:
        """Take what a device answers in this step; what is of another session or step is dropped."""
        meta, state = decode(parcel.meta, SecureMeta, f"a step of {device}"), self._sum
        now = (meta.session, meta.step) == (self._session, state.step) and self._attempt == state.attempt
        if not now or not state.expects(device):
            return
        count = len(state.members)
        if state.step == "keys":
            self._keys[device] = _values(parcel.tensor, Dtype.U8, (KEYS_BYTES,)).tobytes()
        elif state.step == "shares":
            self._dealt[device] = _values(parcel.tensor, Dtype.U8, (count, SEALED_BYTES))
        elif state.step == "masked":
            length = len(self._sent_to(device))
            masked = _values(parcel.tensor, Dtype.I32, (length,)).view(np.uint32)
            self._total = masked if not len(self._total) else self._total + masked
        else:
            self._revealed[device] = _values(parcel.tensor, Dtype.U8, (count, SHARE_BYTES))
        self._sent_bytes[device] += 0 if parcel.tensor is None else parcel.tensor.nbytes
        state.answer(device)
        self._ring()

    def _works(self, name: str) -> bool:
        """When the sum is there nobody needs what it has kept."""
        return self._sum.over or self._sum.wanted(name)

    def aggregated(self) -> Floats:
        state, roster = self._sum, self._roster_now()
        try:
            total = unmasked(roster, state.among, state.survivors, self._total, self._revealed)
            weights = [roster.weights[name] for name in state.survivors]
            mean = mean_of(total, weights, roster.scale, roster.farthest)
        except ValueError as error:
            raise Refused(
                f"round {self.number}: the sum of {', '.join(state.survivors)} is none: {error}",
                try_="a board among them sends nonsense; masks hide which. Begin the job anew with fewer of them",
            ) from None
        return moved(self._config, self._record.job, self.number, self.start, mean)

    def record(self, wall_s: float) -> RoundRecord:
        """How long a board took is not known: it waits for the others before it sends."""
        survivors = self._sum.survivors
        self.updates = {device: found for device, found in self.updates.items() if device in survivors}
        done = super().record(wall_s)
        devices = {
            device: msgspec.structs.replace(told, sent_bytes=self._sent_bytes[device], wall_s=0.0)
            for device, told in done.devices.items()
        }
        for device in self._record.chosen:
            devices.setdefault(device, DeviceRound(refused="no answer in time"))
        return msgspec.structs.replace(done, devices=devices, up_bytes=sum(self._sent_bytes.values()))


def _values(tensor: Tensor | None, dtype: Dtype, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Of a step's answer, as a copy; raises PeerError for another type or shape."""
    if tensor is None or tensor.dtype is not dtype or tensor.shape != shape:
        found = "nothing" if tensor is None else f"{tensor.dtype.name} {list(tensor.shape)}"
        raise PeerError(f"holds {found}, {dtype.name} {list(shape)} was due")
    return np.array(tensor.array())
