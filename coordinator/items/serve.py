"""Items through a deployment: as many at once as it has slots, so that all stages work; results in the order given.

Stages keep nothing of an item. So one that was lost, with a board, a stage, the broker, or a message of it, is sent
again from the start, on the same deployment or on what is planned in its place; those that were answered are not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct

from coordinator.adapters import AdapterShelf
from coordinator.asked import checked
from coordinator.items.labels import Labels, Say
from coordinator.items.live import Item, LiveItem, Result
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.losses import Interrupted, Lost
from coordinator.operations import Operations
from coordinator.planning.plan import Plan
from coordinator.service import Coordinator
from coordinator.shelf import Prepared, Shelf
from coordinator.turns import Hold
from models.items.pack import PackedItems
from wire.errors import Busy, Degraded, EdgelamError, Refused, Unreachable, UsageError
from wire.frames import Parcel
from wire.ids import new_request_id
from wire.limits import MAX_BACKLOG_BYTES

MOST_ITEMS: Final = 1024
"""In one request."""
MOST_REQUESTS: Final = 64
"""At one time, over all deployments."""
ITEM_TIMEOUT_S: Final = 30.0
"""For an answer, at least; else MARGIN times what the plan predicts for all that is before it in the stages."""
MARGIN: Final = 4.0
RECOVERY_TIMEOUT_S: Final = 60.0
"""From a loss until an item was answered again."""
RETRY_S: Final = 0.5


class Answers(Struct, frozen=True, eq=False, kw_only=True):
    """`results` in the order of the items; `wall_s` for all of them, planning and loading left out."""

    prepared: Prepared
    packed: PackedItems
    plan: Plan
    results: tuple[Result, ...]
    wall_s: float
    losses: int


class ItemServing:
    """All items of one coordinator that are on their way."""

    def __init__(self, coordinator: Coordinator, operations: Operations, adapters: AdapterShelf, shelf: Shelf) -> None:
        """Hears what the coordinator hears from now on, and passes it on to who heard it before."""
        self._coordinator = coordinator
        self._operations = operations
        self.labels = Labels(coordinator, operations, adapters, shelf)
        self._live: dict[int, LiveItem] = {}
        self._turns: dict[str, tuple[int, asyncio.Semaphore]] = {}
        """Deployment -> epoch, and a turn for each item that may be on its way."""
        self._requests = 0
        parcels, lost, removed = (
            coordinator.on_parcel,
            coordinator.on_deployment_lost,
            coordinator.on_deployment_removed,
        )

        def on_parcel(parcel: Parcel) -> None:
            live = self._live.get(parcel.request)
            if live is not None:
                live.feed(parcel)
            else:
                parcels(parcel)

        def on_lost(name: str, reason: str) -> None:
            self._fail(name, Lost(reason, try_="run again: what is missing is planned anew"))
            lost(name, reason)

        def on_removed(name: str, reason: str) -> None:
            self._fail(name, Unreachable(reason, try_="run again: it is deployed anew"))
            removed(name, reason)

        coordinator.on_parcel = on_parcel
        coordinator.on_deployment_lost = on_lost
        coordinator.on_deployment_removed = on_removed

    @property
    def live(self) -> int:
        """Items that the stages work on."""
        return len(self._live)

    async def run(
        self, request: DeployRequest, make: Callable[[Prepared, PackedItems], Sequence[Item]], say: Say
    ) -> Answers:
        """Answer the items that `make` gives for the model (off the event loop); plans and deploys first if need be.

        Raises what `make`, planning and the stages raise; Refused for a language model.
        """
        if self._requests >= MOST_REQUESTS:
            raise Busy(f"busy: {MOST_REQUESTS} requests are under way", try_="run again in a moment")
        self._requests += 1
        hold = Hold()
        try:
            request = checked(request)
            prepared = await self._operations.preparing.prepare(request.model, request.precision, say)
            packed = item_model(prepared)
            items = await asyncio.to_thread(make, prepared, packed)
            if not 1 <= len(items) <= MOST_ITEMS:
                raise UsageError(f"{len(items)} items in one request", try_=f"1 to {MOST_ITEMS}")
            return await self._run(request, prepared, packed, items, hold, say)
        finally:
            hold.close()
            self._requests -= 1

    async def _run(
        self,
        request: DeployRequest,
        prepared: Prepared,
        packed: PackedItems,
        items: Sequence[Item],
        hold: Hold,
        say: Say,
    ) -> Answers:
        results: dict[int, Result] = {}
        losses, until_s, wall_s = 0, None, 0.0
        while True:
            answered, began_s = len(results), None
            try:
                record, _ = await self._operations.ensure(request, say, hold, in_haste=until_s is not None)
                began_s = time.monotonic()
                await self._send_all(record, packed, items, results)
                wall_s += time.monotonic() - began_s
                ordered = tuple(results[index] for index in range(len(items)))
                return Answers(
                    prepared=prepared, packed=packed, plan=record.plan, results=ordered, wall_s=wall_s, losses=losses
                )
            except (UsageError, Degraded):
                raise
            except EdgelamError as error:
                now_s = time.monotonic()
                wall_s += now_s - began_s if began_s is not None else 0.0
                if until_s is None or len(results) > answered:
                    if not isinstance(error, Interrupted):
                        raise
                    losses, until_s = losses + 1, now_s + RECOVERY_TIMEOUT_S
                if now_s + RETRY_S >= until_s:
                    raise
                say(f"{error.message}; sending again what was not answered")
                hold.release()
                await asyncio.sleep(RETRY_S)

    async def _send_all(
        self, record: DeploymentRecord, packed: PackedItems, items: Sequence[Item], results: dict[int, Result]
    ) -> None:
        """Put the results that are missing into `results`; raise the first error, those under way given up."""
        turn = self._turn(record, packed)

        async def one(index: int) -> None:
            async with turn:
                results[index] = await self._send(record, packed, items[index])

        tasks = [asyncio.ensure_future(one(index)) for index in range(len(items)) if index not in results]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()

    async def _send(self, record: DeploymentRecord, packed: PackedItems, item: Item) -> Result:
        hub, plan = self._coordinator.hub, record.plan
        live = LiveItem(new_request_id(), record.name, plan.epoch, item, packed.config.outputs, hub.reply_inbox)
        self._live[live.number] = live
        answered = False
        try:
            hub.send(plan.stages[0].inbox, live.parcel(), lambda why: live.fail(Lost(why)))
            result = await live.result(timeout_s(plan, packed, item.rows))
            answered = True
            return result
        finally:
            del self._live[live.number]
            if not answered:
                hub.send(plan.stages[0].inbox, live.close_parcel(), lambda _why: None)

    def _fail(self, name: str, error: EdgelamError) -> None:
        for live in list(self._live.values()):
            if live.deployment == name:
                live.fail(error)

    def _turn(self, record: DeploymentRecord, packed: PackedItems) -> asyncio.Semaphore:
        epoch, turn = self._turns.get(record.name, (-1, asyncio.Semaphore(1)))
        if epoch != record.plan.epoch:
            turn = asyncio.Semaphore(at_once(record.plan, packed))
            in_force = {other.name for other in self._coordinator.records()}
            self._turns = {name: kept for name, kept in self._turns.items() if name in in_force}
            self._turns[record.name] = (record.plan.epoch, turn)
        return turn


def at_once(plan: Plan, packed: PackedItems) -> int:
    """Items on their way at one time: as many as there are slots, unless their tensors could be more than a sender
    queues for a receiver that is slower than itself."""
    return max(1, min(plan.slots, MAX_BACKLOG_BYTES // 2 // packed.parts.widest_bytes()))


def timeout_s(plan: Plan, packed: PackedItems, rows: int) -> float:
    """How long an item may take: longer ones in proportion, and all slots may be before it."""
    typical = packed.graph.items.rows if packed.graph.items is not None else 1
    share = max(1.0, rows / typical)
    return max(ITEM_TIMEOUT_S, MARGIN * share**2 * (plan.predicted_token_s + plan.slots * plan.predicted_slowest_s))


def item_model(prepared: Prepared) -> PackedItems:
    """Raise Refused if it is a language model."""
    if not isinstance(prepared.packed, PackedItems):
        raise Refused(f"{prepared.name} is a language model: it takes prompts", try_="edgelam run")
    return prepared.packed
