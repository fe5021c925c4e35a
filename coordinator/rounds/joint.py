"""A round that boards make step by step together, since none has the whole model: as a state machine, and under way.

Nothing of it counts before all of it does: when the trunk has sent the factors and every board with data what it saw,
the round is over. Until then whoever loses its connection or its process loses it for all, and it is begun anew, with
the same factors, by the same boards, to the same result. A board that stays away behind the deadline, sends what can't
be, or says nothing where the others wait for it, is out of the round, and the others begin it anew.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from coordinator.rounds.adapters import parts_of, spec_of
from coordinator.rounds.exchange import Exchange, request_of
from coordinator.rounds.machine import ASK_AGAIN_S, Look, Progress
from coordinator.rounds.orders import TRUNK, trunk_names
from coordinator.rounds.store import DeviceRound, RoundRecord
from coordinator.rounds.updates import checked
from models.lora import adapter
from models.lora.adapter import PARTS, shapes, within
from wire.errors import PeerError
from wire.frames import Kind, Parcel, Tensor
from wire.messages import Peer, RoundMeta, SplitRound, StageError, StageOrder, UpdateMeta, decode

LOG = logging.getLogger("edgelam.rounds")

Floats = npt.NDArray[np.float32]

PATIENCE: Final = 0.25
"""Of a round's timeout, after which the trunk names whom it waits for."""
AFTER_LOSS_S: Final = 5.0
"""ASK_AGAIN_S when the broker was lost, at first: then it doubles."""
MOST_LOST: Final = 20
"""Times that a board with data may lose its connection in a round."""


class JointState:
    """Of round `number`; the words mean what they mean in coordinator.rounds.machine.RoundState. `ends` are boards with
    data, beside those of the `trunk`."""

    def __init__(
        self,
        number: int,
        ends: tuple[str, ...],
        at_least: int,
        timeout_s: float,
        now_s: float,
        trunk: tuple[str, ...] = (TRUNK,),
    ) -> None:
        self.number = number
        self.trunk = trunk
        self.devices = (*sorted(ends), *trunk)
        self.counted: set[str] = set()
        self.refused: dict[str, str] = {}
        self.attempt = 0
        """How often it was begun."""
        self._at_least = at_least
        self._timeout_s = timeout_s
        self._workers: dict[str, str] = {}
        """That make the round now; none: it has to be begun, perhaps anew."""
        self._began_s = self._asked_s = now_s
        self._were_away: set[str] = set()
        """Since they were asked."""
        self._again_s = ASK_AGAIN_S
        """After which they are asked again."""
        self._away_since: dict[str, float] = {}

    @property
    def together(self) -> tuple[str, ...]:
        """Boards with data that are not out of it."""
        return tuple(device for device in self.devices if device not in self.trunk and device not in self.refused)

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(device for device in self.devices if self.wanted(device))

    @property
    def begun(self) -> bool:
        """Whether what comes is of a round that can come to an end."""
        return bool(self._workers)

    def look(self, now_s: float, ready: Mapping[str, str], busy: Collection[str] = ()) -> Look:
        """`ready`: device, or part of the trunk -> the worker that it runs now and that can take a round; `busy`: who
        fetches what it needs, which may take its time."""
        if self._is_lost():
            return Look((), "failed")
        all_of_us = (*self.together, *self.trunk)
        if self.begun and all(name in self.counted for name in all_of_us):
            return Look((), "over")
        self._leave_out(now_s, [name for name in all_of_us if name not in ready], busy)
        if self._is_lost():
            return Look((), "failed")
        all_of_us = (*self.trunk, *self.together)
        if away := [name for name in all_of_us if name not in ready]:
            self._were_away.update(away)
            return Look((), "waits")
        if all(self._workers.get(name) == ready[name] for name in all_of_us):
            if not self._is_silent(now_s):
                return Look(self._asked_again(now_s), "waits")
            self._leave_out_the_silent()
        workers = {name: ready[name] for name in (*self.trunk, *self.together)}
        self._workers, self._began_s, self._asked_s = workers, now_s, now_s
        self._were_away.clear()
        self.counted.clear()
        self.attempt += 1
        return Look(tuple(workers), "waits")

    def _asked_again(self, now_s: float) -> tuple[str, ...]:
        """Whose question may have been lost without anybody's knowing: of who was away meanwhile, or says nothing for
        long. Who has the round goes on with it."""
        late = now_s - self._asked_s >= self._again_s
        again = tuple(name for name in self._workers if self.wanted(name) and (late or name in self._were_away))
        self._were_away.clear()
        if late:
            self._asked_s, self._again_s = now_s, min(2 * self._again_s, ASK_AGAIN_S)
        return again

    def _leave_out(self, now_s: float, away: Sequence[str], busy: Collection[str]) -> None:
        """Those who have been away too long, as long as enough are left."""
        self._away_since = {name: self._away_since.get(name, now_s) for name in away}
        for name, since_s in self._away_since.items():
            enough = name in self.trunk or len(self.together) > max(1, self._at_least)
            if now_s - since_s >= self._timeout_s and name not in busy and enough:
                self.refuse(name, f"away for {self._timeout_s:g} s")

    def _is_silent(self, now_s: float) -> bool:
        """Whether all are there and nothing comes of it, for longer each time that it was begun anew: no round is too
        long to be made."""
        return now_s - self._began_s >= self._timeout_s * (1 << min(self.attempt, 20))

    def _leave_out_the_silent(self) -> None:
        """Those who did not say what they saw, although the trunk is done."""
        if all(name in self.counted for name in self.trunk):
            silent = [name for name in self.together if name not in self.counted]
            self.refused.update(dict.fromkeys(silent, "said nothing of what it saw"))

    def _is_lost(self) -> bool:
        """Nothing can come of it any more."""
        return any(name in self.refused for name in self.trunk) or len(self.together) < max(1, self._at_least)

    @property
    def lacks_blocks(self) -> bool:
        """Whether somebody who has some was not there when that was looked at last: then nobody else is to blame."""
        return any(name in self._away_since for name in self.trunk)

    def wanted(self, device: str) -> bool:
        return device in self.devices and device not in self.counted and device not in self.refused

    def count(self, device: str) -> None:
        """It has done its part of this attempt."""
        assert self.wanted(device)
        self.counted.add(device)

    def refuse(self, device: str, because: str) -> None:
        if device in self.devices and device not in self.refused:
            self.refused[device] = because
            self.anew()

    def anew(self) -> None:
        """Nothing of what is under way can come to an end."""
        self.counted.clear()
        self._workers = {}

    def ask_all_again(self) -> None:
        """The connection to the broker was lost: nobody knows what came through. Others may find it again later than
        we: what they are asked now may go nowhere."""
        self.anew()
        self._again_s = AFTER_LOSS_S


class JointExchange(Exchange):
    """One round under way, of a job that splits its model."""

    def _prepared(self) -> Progress:
        record = self._record
        timeout_s = record.job.rounds.timeout_s
        self._trunk = trunk_names(len(record.trunk), record.job.mode == "looped")
        self._joint = JointState(self.number, record.chosen, self._at_least, timeout_s, time.monotonic(), self._trunk)
        self._attempt = 0
        self._nonce = secrets.token_hex(8)
        """No session is one of a coordinator that was here before: what it had begun is at another step."""
        self._lost: Counter[str] = Counter()
        return self._joint

    def ask(self, device: str) -> None:
        """Begin a round with one of those who make it."""
        record, state = self._record, self._joint
        if self._attempt != state.attempt:
            self._attempt = state.attempt
            self.updates.clear()
            self._requests = {self._request(name): name for name in (*state.together, *self._trunk)}
        self._asked_s.setdefault(device, time.monotonic())
        place = self._trunk.index(device) if device in self._trunk else None
        split = self._with_whom(
            place,
            tuple(
                Peer(device=at.device, inbox=order.inbox)
                for at, order in zip(record.trunk, record.trunk_orders, strict=True)
            ),
            tuple(Peer(device=name, inbox=record.order_of(name).inbox) for name in state.together),
        )
        begun = None if place is None else self._part_of(self.start, device)
        tensor = None if begun is None or not begun.size else Tensor.of(begun)  # blocks without factors begin with none
        parts: tuple[Any, ...] = parts_of(record.job, self.number)
        reply = self._coordinator.hub.reply_inbox
        meta = RoundMeta(reply=reply, round=self.number, parts=parts, train=self.train, split=split)
        self._send(device, self._order_of(device), self._request(device), meta, tensor)

    def _with_whom(self, place: int | None, trunk: tuple[Peer, ...], ends: tuple[Peer, ...]) -> SplitRound:
        """What one of those who make the round is told of the others; `place` None: one with data."""
        return SplitRound(
            session=self._request(""),
            segments=trunk,
            place=place,
            ends=() if place is None else ends,
            patience_s=PATIENCE * self._record.job.rounds.timeout_s,
        )

    def heard(self, parcel: Parcel) -> bool:
        name = self._requests.get(parcel.request)
        if name is None or parcel.epoch != self._record.epoch & 0xFFFFFFFF:
            return False
        if not self._joint.begun or name in self.state.refused:
            return True
        try:
            if parcel.kind is Kind.ERROR:
                self._went_wrong(name, decode(parcel.meta, StageError, f"an answer of {name}"))
            elif parcel.kind is Kind.UPDATE and self.state.wanted(name):
                self._take(name, parcel)
        except PeerError as error:
            self._refuse(name, error.message)
        return True

    @property
    def undisturbed(self) -> bool:
        return self._joint.attempt == 1

    def _works(self, name: str) -> bool:
        return name in self._trunk or self.state.wanted(name)

    def record(self, wall_s: float) -> RoundRecord:
        """What segments of the trunk did is entered under their boards' names. Down goes what boards with data are
        sent, up all else."""
        done = super().record(wall_s)
        devices = dict(done.devices)
        first = self.updates.get(self._trunk[0])
        for device, own_s in first[0].own_s.items() if first is not None else ():
            if device in self._joint.together and device in devices:
                devices[device] = msgspec.structs.replace(devices[device], own_s=min(own_s, wall_s))
        got_bytes = sum(meta.peer_got_bytes for name, (meta, _) in self.updates.items() if name not in self._trunk)
        sent_bytes = sum(told.sent_bytes for told in devices.values() if not told.refused)
        for name, at in zip(self._trunk, self._record.trunk, strict=True):
            own, mine = devices.get(at.device, DeviceRound()), devices.pop(name)
            devices[at.device] = msgspec.structs.replace(
                own, compute_s=own.compute_s + mine.compute_s, sent_bytes=own.sent_bytes + mine.sent_bytes
            )
        return msgspec.structs.replace(
            done, devices=devices, up_bytes=sent_bytes - got_bytes, down_bytes=done.down_bytes + got_bytes
        )

    def _vectors(self) -> list[tuple[UpdateMeta, Floats]]:
        """The factors of all segments as one update."""
        parts = [self.updates[name] for name in self._trunk]
        found = [vector for _, vector in parts if vector is not None]
        return [(parts[0][0], self._joined(found))] if len(found) == len(parts) else []

    def _joined(self, vectors: Sequence[Floats]) -> Floats:
        """What all segments sent, in their order."""
        return np.concatenate(vectors)

    def _went_wrong(self, name: str, error: StageError) -> None:
        if error.code == "again":
            self._lost[name] += 1
            if name not in self._trunk and self._lost[name] > MOST_LOST:
                self._refuse(name, f"lost its connection {MOST_LOST} times")
                return
            self._joint.anew()
            self._ring()
            return
        if error.code == "deadline" and self._joint.lacks_blocks:
            return
        # The trunk says of whom it could not take something, or waits for in vain.
        told_of = name in self._trunk and error.code in ("protocol", "deadline")
        self._refuse(self._culprit(error) if told_of else name, error.text)

    def _culprit(self, error: StageError) -> str:
        """As whom a board counts that the trunk named."""
        return error.device

    def _take(self, device: str, parcel: Parcel) -> None:
        meta = decode(parcel.meta, UpdateMeta, f"an update of {device}")
        place = self._trunk.index(device) if device in self._trunk else None
        named = device if place is None else self._record.trunk[place].device
        if (meta.device, meta.round) != (named, self.number):
            raise PeerError(f"is of round {meta.round} of {meta.device}")
        vector = None
        if place is not None and self.train:
            began = self._part_of(self.start, device, self._parts)
            vector = checked(meta, parcel.tensor, named, self.number, began, self._farthest)
        elif place is None and meta.samples < 1:
            raise PeerError("is of no samples")
        elif place is None and self.train and self._record.job.privacy is not None and meta.noise is None:
            raise PeerError("says nothing of noise, in a private job")
        self._counted(device, meta, vector)

    def _request(self, name: str) -> int:
        words = f"{name}/{self._nonce}/{self._joint.attempt}"
        return request_of(self._record.name, self._record.epoch, self.number, words)

    def _order_of(self, name: str) -> StageOrder:
        if name in self._trunk:
            return self._record.trunk_orders[self._trunk.index(name)]
        return self._record.order_of(name)

    def _part_of(self, factors: Floats, name: str, parts: Sequence[str] = PARTS) -> Floats:
        """What a segment has of the factors, of these parts."""
        trunk, shaped = self._record.trunk, shapes(self._config, spec_of(self._record.job))
        at = trunk[self._trunk.index(name)]
        own = within(shaped, range(at.first_block, at.end_block), at is trunk[-1])
        return adapter.flat(adapter.named(factors, shaped), own, parts)
