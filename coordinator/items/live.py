"""One item on its way through the stages, as its requester sees it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from coordinator.inference.requests import stage_error
from coordinator.losses import Lost
from models.items.manifest import Port, bundle_bytes
from wire import frames
from wire.errors import EdgelamError, PeerError
from wire.messages import InboxAddress, ItemMeta, StageTime, decode
from wire.tensors import Dtype

Bytes = npt.NDArray[np.uint8]


class Item(Struct, frozen=True, eq=False):
    """What goes in: the tensors of the model's inputs as bytes (models.items.manifest), and how many rows it has."""

    data: Bytes
    rows: int


class Result(Struct, frozen=True, eq=False, kw_only=True):
    """What came out, and what it took: from sending it to having the answer, and at each stage."""

    data: Bytes
    rows: int
    item_s: float
    stages: tuple[StageTime, ...]


class LiveItem:
    """Made in the event loop, whose thread feeds it."""

    def __init__(
        self, number: int, deployment: str, epoch: int, item: Item, outputs: Sequence[Port], reply: InboxAddress
    ) -> None:
        self.number = number
        self.deployment = deployment
        self._epoch = epoch & 0xFFFFFFFF
        self._item = item
        self._outputs = outputs
        self._reply = reply
        self._sent_s = time.monotonic()
        self._answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

    def parcel(self) -> frames.Parcel:
        """The item as it is sent to the first stage."""
        self._sent_s = time.monotonic()
        meta = msgspec.json.encode(ItemMeta(reply=self._reply, rows=self._item.rows))
        tensor = frames.Tensor.of(self._item.data)
        return frames.Parcel(frames.Kind.ITEM, self._epoch, self.number, 0, frames.FLAG_FINAL, tensor, meta)

    def close_parcel(self) -> frames.Parcel:
        """Nobody waits for it any more."""
        return frames.Parcel(frames.Kind.CLOSE, self._epoch, self.number)

    def feed(self, parcel: frames.Parcel) -> None:
        """Take a parcel with this item's number; what is no answer to it fails it."""
        if self._answer.done() or parcel.epoch != self._epoch:
            return
        if parcel.kind is frames.Kind.ERROR:
            self.fail(stage_error(parcel.meta))
        elif parcel.kind is frames.Kind.ITEM and parcel.tensor is not None:
            try:
                self._answer.set_result(self._result(parcel.tensor, parcel.meta))
            except PeerError as error:
                self.fail(error)

    def fail(self, error: EdgelamError) -> None:
        if not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()  # somebody may have stopped waiting: asyncio need not complain

    async def result(self, timeout_s: float) -> Result:
        """Wait for the answer; raise what ended it, Lost if none came in time."""
        await asyncio.wait({self._answer}, timeout=timeout_s)
        if not self._answer.done():
            self._answer.cancel()
            raise Lost(f"no answer to an item came for {timeout_s:.0f} s", try_="edgelam devices; then run again")
        return self._answer.result()

    def _result(self, tensor: frames.Tensor, meta_bytes: bytes) -> Result:
        meta = decode(meta_bytes, ItemMeta, "an item's answer")
        wanted = bundle_bytes(self._outputs, self._item.rows)
        if tensor.dtype is not Dtype.U8 or len(tensor.shape) != 1 or tensor.nbytes != wanted:
            raise PeerError(f"the last stage answered with {tensor.nbytes} bytes, {wanted} were due")
        taken_s = time.monotonic() - self._sent_s
        return Result(data=tensor.array().copy(), rows=self._item.rows, item_s=taken_s, stages=meta.stages)
