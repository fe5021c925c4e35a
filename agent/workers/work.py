"""What a worker's loop needs of whatever the stage does with parcels, and of the engine that does it."""

from __future__ import annotations

from typing import Protocol

from agent.workers.requests import Tally
from wire.channel import Delivery
from wire.messages import StageOrder, StepMark


class Loaded(Protocol):
    """An engine, as far as reports need it."""

    @property
    def name(self) -> str: ...

    @property
    def held_bytes(self) -> int: ...


class Work(Protocol):
    """agent.workers.ring.StageWork, or agent.workers.itemwork.ItemWork."""

    tally: Tally

    @property
    def order(self) -> StageOrder: ...

    @property
    def last_refusal(self) -> str: ...

    @property
    def live(self) -> int: ...

    @property
    def ended(self) -> int: ...

    @property
    def marks(self) -> tuple[StepMark, ...]: ...

    @property
    def runnable(self) -> bool: ...

    def accept(self, delivery: Delivery, now_s: float, /) -> None: ...

    def work(self, now_s: float, /) -> bool: ...

    def tick(self, now_s: float, /) -> None: ...

    def adopt(self, order: StageOrder) -> None: ...

    def drop_all(self) -> None: ...
