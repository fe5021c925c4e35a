"""A round of a job whose one block is divided among shards: who has which part of its weights, and who is told of whom.

The first of the trunk's boards is the hub, the others are shards. To boards with data the hub is the whole trunk.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from coordinator.rounds.adapters import spec_of
from coordinator.rounds.bases import bert_of
from coordinator.rounds.joint import JointExchange
from models.lora.adapter import PARTS, flat, named, shapes
from models.lora.looped import joined, part_of, shapes_of_hub, shapes_of_shard
from wire.messages import Peer, SplitRound, StageError
from wire.shares import Share

Floats = npt.NDArray[np.float32]


class LoopedExchange(JointExchange):
    """One round under way, of such a job."""

    def _with_whom(self, place: int | None, trunk: tuple[Peer, ...], ends: tuple[Peer, ...]) -> SplitRound:
        told = super()._with_whom(place, trunk[:1], ends)
        if place is None:
            return told
        return msgspec.structs.replace(told, place=max(0, place - 1), shards=trunk[1:])

    def _culprit(self, error: StageError) -> str:
        shards = self._trunk[1:]
        return error.device if error.shard is None or error.shard >= len(shards) else shards[error.shard]

    def _part_of(self, factors: Floats, name: str, parts: Sequence[str] = PARTS) -> Floats:
        share = self._record.trunk[self._trunk.index(name)].share
        part = part_of(bert_of(self._config), named(factors, self._all), share)
        return flat(part, self._shaped_of(share), parts)

    def _joined(self, vectors: Sequence[Floats]) -> Floats:
        shares = [at.share for at in self._record.trunk]
        found = [
            named(vector, self._shaped_of(share), self._parts) for vector, share in zip(vectors, shares, strict=True)
        ]
        return flat(joined(found), self._all, self._parts)

    @property
    def _all(self) -> dict[str, tuple[int, int]]:
        return shapes(self._config, spec_of(self._record.job))

    def _shaped_of(self, share: Share | None) -> dict[str, tuple[int, int]]:
        return shapes_of_hub(self._all) if share is None else shapes_of_shard(bert_of(self._config), share)
