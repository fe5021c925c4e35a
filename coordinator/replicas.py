"""Copies of stages, kept: one takes over after a loss, and what is missing is made again on what is left."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import msgspec

from coordinator.adapters import answers
from coordinator.deployments import readiness
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.notices import notice
from coordinator.planning.plan import Plan
from coordinator.planning.replicas import Key, taken_over, with_standbys
from coordinator.planning.request import Candidate
from coordinator.planning.topology import RoundTrips, Way, direct_hop_s, shorter, ways_of
from coordinator.service import Coordinator
from coordinator.shelf import Prepared
from coordinator.standbys import failed_copies, lost_stages, ready_copies, with_copies
from wire.errors import EdgelamError

LOG = logging.getLogger("edgelam.replicas")

LOOK_PERIOD_S: Final = 1.0

MAKE_AGAIN_AFTER_S: Final = 10.0
"""From the loss of a copy until it is made elsewhere: a board that was only started again is back by then, with its
files; and answers that go on after a loss have the links for themselves."""


class Replicas:
    """Of one coordinator. `prepare(request)` gives the model, `candidates(request)` the boards that it may be on now,
    `turn()` the right to change deployments."""

    def __init__(
        self,
        coordinator: Coordinator,
        prepare: Callable[[DeployRequest], Awaitable[Prepared]],
        candidates: Callable[[DeployRequest], list[Candidate]],
        turn: Callable[[], AbstractAsyncContextManager[None]],
        round_trips: RoundTrips,
    ) -> None:
        self._coordinator = coordinator
        self._prepare = prepare
        self._candidates = candidates
        self._turn = turn
        self._round_trips = round_trips
        self._short_since_s: dict[tuple[str, int], float] = {}
        """Deployment and epoch -> since when copies are missing."""
        self._barred: dict[tuple[str, int], set[Key]] = {}
        """Where copies of a deployment failed."""
        self._tried: dict[str, tuple[object, ...]] = {}
        """Deployment -> the situation in which it was last tried to make its missing copies."""

    def take_over(self, request: DeployRequest) -> DeploymentRecord | None:
        """Put copies in the places of what was lost of a deployment; None if that does not do. The caller has the turn
        to change deployments."""
        coordinator = self._coordinator
        record = next((record for record in coordinator.records() if answers(record.request, request)), None)
        if record is None or not record.plan.standbys:
            return None
        plan, applied, online = record.plan, coordinator.applied(), coordinator.is_online
        lost = lost_stages(plan, applied, online, coordinator.data_brokers())
        gone = {standby.device for standby in plan.standbys if not online(standby.device)}
        taken = taken_over(plan, lost, ready_copies(plan, applied, online), gone, self._way(request))
        if taken is None:
            return None
        taken = msgspec.structs.replace(taken, epoch=coordinator.next_epoch())
        orders = with_copies(taken, record.orders, coordinator.site)
        record = msgspec.structs.replace(record, plan=taken, orders=orders)
        coordinator.put_in_force(record)
        moves = [f"stage {stage.stage} goes on on {stage.device}" for stage in taken.stages if stage.stage in lost]
        coordinator.note(notice("copy-took-over", what=f"{record.name}: {', '.join(moves)}"))
        return record

    def _way(self, request: DeployRequest) -> Callable[[str, str, float], tuple[str, float]]:
        brokers = self._coordinator.data_brokers()

        def way(sender: str, receiver: str, central_s: float) -> tuple[str, float]:
            found = direct_hop_s(sender, receiver, brokers, self._round_trips)
            if request.topology == "central" or isinstance(found, str):
                return "", central_s
            if request.topology == "auto" and not shorter(found, central_s):
                return "", central_s
            return brokers[receiver], found

        return way

    async def run(self) -> None:
        """Make copies again that are missing, for ever."""
        while True:
            await asyncio.sleep(LOOK_PERIOD_S)
            for record in self._coordinator.records():
                if record.request.replicas > 1:
                    try:
                        await self.complete(record, time.monotonic())
                    except (EdgelamError, OSError, sqlite3.Error) as error:  # tried again when something changes
                        LOG.warning("copies of %s: %s", record.name, error)

    async def complete(self, record: DeploymentRecord, now_s: float) -> bool:
        """Make missing copies of a deployment again if it is time to; True if its copies are others now."""
        coordinator, plan, key = self._coordinator, record.plan, (record.name, record.plan.epoch)
        self._forget()
        if not readiness(plan, coordinator.applied(), coordinator.is_online).ready:
            return False
        failed = failed_copies(plan, coordinator.applied())
        lasting = tuple(
            standby
            for standby in plan.standbys
            if coordinator.is_online(standby.device) and (standby.stage, standby.device) not in failed
        )
        if len(lasting) == (record.request.replicas - 1) * len(plan.stages):
            self._short_since_s.pop(key, None)
            return False
        if now_s - self._short_since_s.setdefault(key, now_s) < MAKE_AGAIN_AFTER_S:
            return False
        barred = self._barred.setdefault(key, set())
        barred.update(failed)
        situation = (key, tuple(coordinator.online()), lasting, frozenset(barred))
        if self._tried.get(record.name) == situation:
            return False
        self._tried[record.name] = situation
        prepared = await self._prepare(record.request)
        async with self._turn():
            if not any(found is record for found in coordinator.records()):
                return False
            made = await asyncio.to_thread(
                with_standbys,
                msgspec.structs.replace(plan, standbys=lasting),
                prepared.packed.graph,
                self._candidates(record.request),
                record.request.replicas,
                barred=barred,
                partly=True,
            )
            if made == plan or not any(found is record for found in coordinator.records()):
                return False
            orders = with_copies(made, record.orders, coordinator.site)
            coordinator.amend(msgspec.structs.replace(record, plan=made, orders=orders))
        if made.replicas_because:
            coordinator.note(notice("copies-missing", what=record.name, reason=made.replicas_because))
        return True

    def _forget(self) -> None:
        """What was of deployments that are in force no more."""
        keys = {(record.name, record.plan.epoch) for record in self._coordinator.records()}
        self._short_since_s = {key: since_s for key, since_s in self._short_since_s.items() if key in keys}
        self._barred = {key: barred for key, barred in self._barred.items() if key in keys}
        self._tried = {name: seen for name, seen in self._tried.items() if seen[0] in keys}


def ways_after_losses(plan: Plan, brokers: dict[str, str]) -> list[Way]:
    """What must be measured to know the ways of a plan's ring, and those round each copy that may take over."""
    found = ways_of(plan, brokers)
    for standby in plan.standbys:
        stages = [
            msgspec.structs.replace(stage, device=standby.device) if stage.stage == standby.stage else stage
            for stage in plan.stages
        ]
        found += ways_of(msgspec.structs.replace(plan, stages=tuple(stages)), brokers)
    return list(dict.fromkeys(found))
