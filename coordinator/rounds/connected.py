"""One round of a job of several modalities: each board has modules of its own, and each module a group of boards."""

from __future__ import annotations

from coordinator.rounds.exchange import Exchange, Floats
from coordinator.rounds.modules import check_told, grouped, held_by, objectives_of, parts_by, taken_of
from models.lora.adapter import flat, named
from wire.frames import Parcel
from wire.messages import UpdateMeta, decode
from wire.modalities import Objective


class ConnectedExchange(Exchange):
    """As Exchange, module by module."""

    def aggregated(self) -> Floats:
        return grouped(self._config, self._record, self.number, self.start, self._vectors())

    def _objectives(self, device: str) -> tuple[Objective, ...]:
        return objectives_of(self._record.job, self.number, device, self._record.owns[device]) if self.train else ()

    def _taken(self, device: str) -> Floats:
        return taken_of(self._config, self._record, device, self.start)

    def _sent_to(self, device: str) -> Floats:
        shaped = held_by(self._config, self._record, device)
        return flat(named(self._taken(device), shaped), shaped, parts_by(self._record, self.number, device))

    def _take(self, device: str, parcel: Parcel) -> None:
        check_told(decode(parcel.meta, UpdateMeta, f"an update of {device}"), self._record.owns[device])
        super()._take(device, parcel)
