"""What a stage of an item model does with parcels: each item makes one step, goes on, and is forgotten.

    requester --ITEM(meta)--> first --ITEM--> .. --> last --ITEM(final)--> requester

Nothing is kept, so there is nothing to free: an item that is lost is sent again by its requester, from the start. Items
wait in the order in which they came, under the credit of their senders; one that came twice is run once. A CLOSE drops
an item that waits, and goes on to the next stages, where it may be by now. Parcels of another epoch are dropped.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from agent.orders import is_inbox
from agent.workers.requests import Tally
from agent.workers.sending import UNSENT, Sender
from agent.workers.stretch import Stretch
from models.engine.base import EngineFailed
from models.engine.items import ItemStage
from wire.channel import Delivery
from wire.errors import PeerError
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.messages import ItemMeta, StageError, StageOrder, StageTime, StepMark, decode
from wire.tensors import Dtype

REMEMBERED: Final = 4096
"""Items that were taken lately: one of them that comes again was sent twice."""


class _Waiting(NamedTuple):
    delivery: Delivery
    meta: ItemMeta


class ItemWork:
    """`done(delivery)` returns credit to a sender."""

    def __init__(
        self,
        order: StageOrder,
        engine: ItemStage,
        sender: Sender,
        done: Callable[[Delivery], None],
        stretch: Stretch,
        site: str,
        device: str,
    ) -> None:
        self.order = order
        self.tally = Tally()
        self.last_refusal = ""
        self.ended = 0
        self._engine = engine
        self._sender = sender
        self._done = done
        self._stretch = stretch
        self._site = site
        self._device = device
        self._waiting: deque[_Waiting] = deque()
        self._seen: OrderedDict[int, None] = OrderedDict()

    @property
    def live(self) -> int:
        return len(self._waiting)

    @property
    def marks(self) -> tuple[StepMark, ...]:
        """None: what an item took rides with it."""
        return ()

    @property
    def runnable(self) -> bool:
        return bool(self._waiting)

    def accept(self, delivery: Delivery, _now_s: float) -> None:
        """File an item that arrived, or refuse it. Never raises for what came from the network."""
        parcel = delivery.parcel
        kept = False
        if parcel.epoch != self.order.epoch & 0xFFFFFFFF:
            self.tally.stale += 1
        elif self.order.standby:
            self._refuse(f"{parcel.kind.name} came to a standby, which makes no steps")
        elif parcel.kind is Kind.CLOSE:
            self._on_close(parcel)
        elif parcel.kind is Kind.ITEM and parcel.tensor is not None:
            kept = self._file(delivery, parcel.tensor)
        else:
            self._refuse(f"{parcel.kind.name} is not for this stage")
        if not kept:
            self._done(delivery)

    def work(self, _now_s: float) -> bool:
        """Run the item that waits longest; False if there is none."""
        if not self._waiting:
            return False
        delivery, meta = self._waiting.popleft()
        try:
            self._run(delivery.parcel, meta)
        finally:
            self._done(delivery)
            self.ended += 1
        return True

    def tick(self, _now_s: float) -> None:
        """Nothing runs out: what waits is run."""

    def adopt(self, order: StageOrder) -> None:
        """Take a new epoch: all items of the old one are dropped."""
        self.drop_all()
        self._seen.clear()
        self.order = order

    def drop_all(self) -> None:
        """Forget all items, as after a lost connection: their requesters send them again."""
        while self._waiting:
            self._done(self._waiting.popleft().delivery)
            self.ended += 1

    def _file(self, delivery: Delivery, tensor: Tensor) -> bool:
        """Keep an item until its step; False if it is none."""
        parcel = delivery.parcel
        try:
            meta = decode(parcel.meta, ItemMeta, "item")
        except PeerError as error:
            self._refuse(error.message)
            return False
        if not is_inbox(meta.reply.topic, self._site) or meta.reply.broker:
            self._refuse(f"{meta.reply.topic!r} is not an inbox of this site")
            return False
        if parcel.request in self._seen:
            return False
        problem = "" if tensor.dtype is Dtype.U8 and len(tensor.shape) == 1 else "an item travels as bytes"
        problem = problem or self._engine.problem_with(tensor.nbytes, meta.rows)
        if problem:
            self._refuse(problem)
            self._fail(meta, parcel.request, "protocol", problem)
            return False
        self._seen[parcel.request] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        self.tally.requests += 1
        self._waiting.append(_Waiting(delivery, meta))
        return True

    def _run(self, parcel: Parcel, meta: ItemMeta) -> None:
        assert parcel.tensor is not None
        self._stretch.begin()
        try:
            result = self._engine.run(parcel.tensor.array(), meta.rows)
        except EngineFailed as error:
            self._stretch.end()
            self._fail(meta, parcel.request, "engine", error.message)
            return
        busy_s = self._stretch.end("item", meta.rows)
        self.tally.prefill_steps += 1
        self.tally.prefill_tokens += meta.rows
        self.tally.prefill_busy_s += busy_s
        try:
            self._pass_on(parcel.request, meta, result, busy_s)
        except UNSENT as error:
            self.tally.unsent += 1
            self._fail(meta, parcel.request, "stopped", f"an item could not be passed on: {error}")

    def _pass_on(self, request: int, meta: ItemMeta, result: Any, busy_s: float) -> None:
        order, tensor = self.order, Tensor.of(np.ascontiguousarray(result))
        stages = (*meta.stages, StageTime(busy_s, tensor.nbytes))
        data = msgspec.json.encode(msgspec.structs.replace(meta, stages=stages))
        parcel = Parcel(Kind.ITEM, order.epoch, request, 0, FLAG_FINAL if order.head else 0, tensor, data)
        if order.head:
            self._sender.to_requester(meta.reply.topic, parcel)
        else:
            self._sender.to_next(parcel)

    def _on_close(self, parcel: Parcel) -> None:
        """Drop the item here if it waits, and tell the stages behind this one."""
        found = [waiting for waiting in self._waiting if waiting.delivery.parcel.request == parcel.request]
        for waiting in found:
            self._waiting.remove(waiting)
            self._done(waiting.delivery)
            self.ended += 1
        if not self.order.head:
            try:
                self._sender.to_next(Parcel(Kind.CLOSE, self.order.epoch, parcel.request))
            except UNSENT:
                self.tally.unsent += 1

    def _fail(self, meta: ItemMeta, request: int, code: Any, text: str) -> None:
        error = StageError(stage=self.order.stage, device=self._device, code=code, text=text[:4096])
        parcel = Parcel(Kind.ERROR, self.order.epoch, request, 0, FLAG_FINAL, None, msgspec.json.encode(error))
        try:
            self._sender.to_requester(meta.reply.topic, parcel)
        except UNSENT:
            self.tally.unsent += 1

    def _refuse(self, text: str) -> None:
        self.tally.refused += 1
        self.last_refusal = text
