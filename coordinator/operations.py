"""What a user can have done: a plan put in force, kept ready, moved, removed.

What is to be done was decided before (coordinator.preparing, coordinator.planning); here it is journaled first and
published then.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Set

import msgspec

from coordinator.adapters import alike, answers
from coordinator.asked import checked
from coordinator.deployments import deployment_name, loading_text, make_orders, needs_standard, readiness
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.losses import Lost, Overtaken
from coordinator.planning.plan import Plan, PlannedStage
from coordinator.planning.planner import Candidate, Infeasible, worth_moving
from coordinator.preparing import Preparing, Progress
from coordinator.presence import Presence
from coordinator.replicas import Replicas
from coordinator.service import Coordinator
from coordinator.shelf import Prepared, Shelf, canonical
from coordinator.standbys import with_copies
from coordinator.turns import Hold, Holds, Key, Lines
from models.build.stage import build_stage_graph
from models.build.standard import build_standard_graph
from models.items.pack import PackedItems
from wire.errors import Busy, Degraded, EdgelamError, Refused, Unreachable, UsageError
from wire.limits import MAX_ADAPTERS
from wire.messages import ArtifactRef

READY_TIMEOUT_S = 600.0
BUSY_TIMEOUT_S = 120.0
"""How long a change of a deployment waits for the requests that run on it: most answers are over by then, and who
waits at a terminal still does. docs/architecture.md states it."""
NOT_YET = (Presence.SEEN, Presence.JOINING)
RETURN_S = 5.0
"""After its broker is there, a board needs a second to try it again, and one until its name is its own."""
MOST_REMEMBERED = 256
"""Adapters of which it is known when they were used."""
PROGRESS_PERIOD_S = 2.0
"""Between two lines about the same thing: people read them, and logs keep them."""


class Operations:
    """Operations on one coordinator; those that change deployments run one at a time."""

    def __init__(self, coordinator: Coordinator, shelf: Shelf) -> None:
        self._coordinator = coordinator
        self._changing = asyncio.Lock()
        self._lines = Lines()
        self._holds = Holds(coordinator.changes.ring)
        self._used: dict[str, float] = {}
        """Adapter -> when somebody wanted it last."""
        self.superseded: Set[str] = frozenset()
        """Adapters whose jobs have later ones: they stay until something is deployed anew."""
        self.preparing = Preparing(coordinator, shelf, self._is_used)
        self.replicas = Replicas(
            coordinator,
            lambda request: shelf.prepare(canonical(request.model), request.precision, _silent, request.adapters),
            self.preparing.candidates,
            lambda: self._turn(_silent),
            self.preparing.ways.round_trips,
        )

    async def ensure(
        self, request: DeployRequest, progress: Progress, hold: Hold, in_haste: bool = False
    ) -> tuple[DeploymentRecord, Prepared]:
        """Give a deployment that answers `request` and is ready: the one in force, or a new one, planned with the
        boards that are there if it is wanted `in_haste`.

        `hold` holds it from the moment it is chosen, so that nobody replaces it; the caller closes it, also when
        this raises. Raises Refused when requests with other settings run too long on a deployment of this name, and
        Interrupted when what was chosen is gone before it was ready.
        """
        request = checked(request)
        prepared = await self.preparing.prepare(request.model, request.precision, progress)
        self._note_use(request.adapters)
        await self.preparing.await_broker()
        await self._await_return(request, progress)
        async with self._line(request, progress):
            record = self._in_force_for(request) or await self._deploy_beside(request, progress, in_haste)
            hold.take(self._holds, _key(record))
        await self._await_ready(record, progress)
        return record, prepared

    async def _await_return(self, request: DeployRequest, progress: Progress) -> None:
        """Give the boards of what is in force time to be heard of, after a start of the coordinator or of its broker:
        they hold their stages, and a plan without them would move these."""
        coordinator = self._coordinator

        def away() -> list[str]:
            records = (record for record in coordinator.records() if answers(record.request, request))
            record = next((record for record in records if not coordinator.given_up(record)), None)
            stages = record.plan.stages if record is not None else ()
            presence = {device.name: device.presence for device in coordinator.devices()}
            return [stage.device for stage in stages if presence.get(stage.device, Presence.SEEN) in NOT_YET]

        until_s = coordinator.up_since_s + RETURN_S
        if away() and time.monotonic() < until_s:
            progress(f"waiting for {', '.join(dict.fromkeys(away()))} to be heard of")
            await coordinator.changes.wait(lambda: not away(), until_s - time.monotonic())

    def _line(self, request: DeployRequest, progress: Progress) -> contextlib.AbstractAsyncContextManager[None]:
        name = deployment_name(request.model)
        return self._lines.turn(name, lambda: progress(f"waiting for another change of {name}"))

    @contextlib.asynccontextmanager
    async def _turn(self, progress: Progress) -> AsyncIterator[None]:
        """One change of deployments at a time. Waiting for stages to load is no change and needs no turn."""
        if self._changing.locked():
            progress("waiting for another deployment to be planned")
        async with self._changing:
            yield

    def _in_force_for(self, request: DeployRequest, exactly: bool = False) -> DeploymentRecord | None:
        """The usable deployment in force that answers this request, or `exactly` this."""
        records = (
            record
            for record in self._coordinator.records()
            if (record.request == request if exactly else answers(record.request, request))
        )
        return next((record for record in records if self.usable(record)), None)

    def _note_use(self, adapters: tuple[str, ...]) -> None:
        for adapter in adapters:
            self._used[adapter] = time.monotonic()
        while len(self._used) > MOST_REMEMBERED:
            del self._used[min(self._used, key=lambda adapter: self._used[adapter])]

    async def _deploy_beside(self, request: DeployRequest, progress: Progress, in_haste: bool) -> DeploymentRecord:
        """With the adapters of what is in force for the same, so that they go on sharing one base; without them, if
        they are what keeps it from being planned."""
        together = await self._joined(request, progress)
        if together != request:
            try:
                return await self._deploy(together, progress, in_haste)
            except Infeasible as error:
                progress(f"not beside the adapters that are deployed: {error.message}")
        return await self._deploy(request, progress, in_haste)

    async def _joined(self, request: DeployRequest, progress: Progress) -> DeployRequest:
        """With those adapters of what is in force for the same that no later ones of their jobs have taken the place
        of; of too many those that were used longest ago are left out."""
        coordinator = self._coordinator
        for record in coordinator.records():
            failed = readiness(record.plan, coordinator.applied(), coordinator.is_online).failed
            if failed or not alike(record.request, request):
                continue
            there = [one for one in record.request.adapters if one not in {*request.adapters, *self.superseded}]
            there.sort(key=lambda adapter: self._used.get(adapter, 0.0))
            there = there[max(0, len(there) + len(request.adapters) - MAX_ADAPTERS) :]
            while there:
                together = (*there, *request.adapters)
                try:
                    await self.preparing.prepare(request.model, request.precision, progress, together)
                except EdgelamError as error:
                    progress(f"not beside adapter {there.pop(0)[:8]}, which is deployed: {error.message}")
                else:
                    return msgspec.structs.replace(request, adapters=together)
        return request

    def usable(self, record: DeploymentRecord) -> bool:
        """Whether a deployment is in force, all its devices are there, with their brokers where the plan says, and none
        of its stages has failed or was given up."""
        coordinator = self._coordinator
        failed = readiness(record.plan, coordinator.applied(), coordinator.is_online).failed
        there = all(coordinator.is_online(stage.device) for stage in record.plan.stages)
        brokers = coordinator.data_brokers()
        reached = all(stage.inbox.broker in ("", brokers.get(stage.device)) for stage in record.plan.stages)
        wanted = coordinator.in_force(record) and not coordinator.given_up(record)
        return there and reached and not failed and wanted

    async def deploy(self, request: DeployRequest, progress: Progress) -> DeploymentRecord:
        """Plan anew and put the plan in force; keeps the running placement when moving is not worth it."""
        request = checked(request)
        hold = Hold()
        try:
            async with self._line(request, progress):
                record = await self._deploy(request, progress, exactly=True)
                hold.take(self._holds, _key(record))
            await self._await_ready(record, progress)
        finally:
            hold.close()
        return record

    async def _deploy(
        self, request: DeployRequest, progress: Progress, in_haste: bool = False, exactly: bool = False
    ) -> DeploymentRecord:
        """Plan and put in force, without waiting until it is ready. The caller has the turn in the name's line. What is
        in force with more adapters does, unless it is to be `exactly` this."""
        while True:
            async with self._turn(progress):
                if in_haste and (found := self._in_force_for(request) or self.replicas.take_over(request)) is not None:
                    return found
                plan, prepared, candidates = await self.preparing.plan(request, progress, in_haste)
                running = self._in_force_for(request, exactly)
                if running is not None and in_haste:
                    return running  # what was lost has come back meanwhile
                if running is not None and _boards(running) >= request.boards_at_least:
                    move = await asyncio.to_thread(
                        self._worth_moving, request, running.plan, plan, prepared, candidates
                    )
                    if not move:
                        return running
                if self._in_use(plan.deployment) is None:
                    record = await self._put_in_force(request, plan, prepared)
                    progress(f"epoch {record.plan.epoch}: {len(record.plan.stages)} stages on {_boards(record)} boards")
                    return record
            # Other models need not wait meanwhile; and then the boards' memory may be another, so it is planned again.
            await self._await_unused(plan.deployment, progress)

    async def move(
        self, record: DeploymentRecord, may: Callable[[Plan | None, Plan, Prepared], bool], because: str
    ) -> DeploymentRecord | None:
        """Plan a deployment in force anew on what is known now, and put the new plan in force if `may` agrees, also
        while requests run on it: they go on behind what was given, as after a loss. None if it stays as it is.

        `may` is given what runs at today's figures (None: it could not be planned any more) and the new plan."""
        async with self._line(record.request, _silent), self._turn(_silent):
            if not self.usable(record):
                return None
            plan, prepared, candidates = await self.preparing.plan(record.request, _silent, in_haste=True)
            today = await asyncio.to_thread(self.preparing.today, record.request, record.plan, prepared, candidates)
            if not (self.usable(record) and may(today, plan, prepared)):
                return None
            return await self._put_in_force(record.request, plan, prepared, because)

    def in_use(self, name: str) -> bool:
        """Whether somebody uses the deployment of this name."""
        return self._in_use(name) is not None

    def _is_used(self, device: str) -> bool:
        """Whether answers run on a board."""
        return any(device in record.orders and self.in_use(record.name) for record in self._coordinator.records())

    def _in_use(self, name: str) -> DeploymentRecord | None:
        """The deployment of this name that works and that somebody holds."""
        for record in self._coordinator.records():
            if record.name == name and self._holds.count(_key(record)) and self.usable(record):
                return record
        return None

    async def _await_unused(self, name: str, progress: Progress) -> None:
        """Wait until nobody uses a deployment; raise Refused naming what runs after BUSY_TIMEOUT_S."""
        record = self._in_use(name)
        if record is not None:
            progress(
                f"{_use_text(record, self._holds.count(_key(record)))}; waiting for it, {BUSY_TIMEOUT_S:.0f} s at most"
            )
        if await self._coordinator.changes.wait(lambda: self._in_use(name) is None, BUSY_TIMEOUT_S):
            return
        record = self._in_use(name)
        if record is not None:
            raise Busy(
                f"busy for {BUSY_TIMEOUT_S:.0f} s: {_use_text(record, self._holds.count(_key(record)))}",
                try_="run again when that is over, or ask with the same settings",
            )

    async def _put_in_force(
        self, request: DeployRequest, plan: Plan, prepared: Prepared, because: str = ""
    ) -> DeploymentRecord:
        """Journal, then publish. `because` is told to the requests that run on what is replaced."""
        coordinator = self._coordinator
        plan = _with_epoch(plan, coordinator.next_epoch())
        packed = prepared.packed
        graphs: dict[int, ArtifactRef] = {}
        standard: dict[int, ArtifactRef] = {}
        for stage in plan.stages:
            data = await asyncio.to_thread(_stage_graph, prepared, plan, stage)
            graphs[stage.stage] = coordinator.artifacts.add_bytes(data, f"{plan.deployment}-{stage.stage}.onnx")
            if needs_standard(plan, stage):
                data = await asyncio.to_thread(_stage_graph, prepared, plan, stage, build_standard_graph)
                name = f"{plan.deployment}-{stage.stage}-standard.onnx"
                standard[stage.stage] = coordinator.artifacts.add_bytes(data, name)
        orders = make_orders(
            plan,
            packed.graph,
            packed.config,
            lambda stage: graphs[stage.stage],
            lambda digest: coordinator.artifacts.add_file(digest, packed.files[digest], packed.files[digest].name),
            lambda stage: standard.get(stage.stage),
        )
        record = DeploymentRecord(
            name=plan.deployment,
            request=request,
            plan=plan,
            orders=with_copies(plan, orders, coordinator.site),
            checkpoint=str(prepared.checkpoint.path),
        )
        coordinator.put_in_force(record, because)
        return record

    async def _await_ready(self, record: DeploymentRecord, progress: Progress) -> None:
        coordinator = self._coordinator
        said, next_line_s = "", 0.0

        def settled() -> bool:
            nonlocal said, next_line_s
            state = readiness(record.plan, coordinator.applied(), coordinator.is_online)
            text, now_s = loading_text(record.plan, coordinator.applied()), time.monotonic()
            if text != said and not state.ready and now_s >= next_line_s:
                said, next_line_s = text, now_s + PROGRESS_PERIOD_S
                progress(text)
            return (
                state.ready
                or bool(state.failed)
                or any("offline" in why for why in state.waiting)
                or not coordinator.in_force(record)
            )

        in_time = await coordinator.changes.wait(settled, READY_TIMEOUT_S)
        if not coordinator.in_force(record):
            if any(other.name == record.name for other in coordinator.records()):
                raise Overtaken(f"{record.name} was replaced before it was ready", try_="run again")
            raise Refused(f"{record.name} was removed before it was ready", try_="run again")
        state = readiness(record.plan, coordinator.applied(), coordinator.is_online)
        if state.failed:
            device, detail = state.failed[0]
            raise Degraded(f"{device} could not load its stage: {detail}", try_="edgelam devices; then run again")
        if not state.ready:
            late = "" if in_time else f" after {READY_TIMEOUT_S:.0f} s"
            kind = Lost if in_time else Unreachable
            raise kind(f"the deployment is not ready{late}: {state.text()}", try_="edgelam devices")

    def _worth_moving(
        self, request: DeployRequest, running: Plan, plan: Plan, prepared: Prepared, candidates: list[Candidate]
    ) -> bool:
        """Compare the new plan with the running placement at today's figures."""
        today = self.preparing.today(request, running, prepared, candidates)
        return today is None or bool(worth_moving(today, plan))

    async def remove(self, name: str) -> None:
        """Take a deployment out of force; raise UsageError if there is none of that name."""
        async with self._changing:
            if not any(record.name == name for record in self._coordinator.records()):
                names = ", ".join(record.name for record in self._coordinator.records()) or "none"
                raise UsageError(f"no deployment {name!r}", try_=f"deployments in force: {names}")
            self._coordinator.take_out_of_force(name)


def _silent(_text: str) -> None:
    return


def _key(record: DeploymentRecord) -> Key:
    return record.name, record.plan.epoch


def _use_text(record: DeploymentRecord, count: int) -> str:
    """'2 requests use smollm2 as it is deployed (int4, latency, context 1024, 4 boards)'."""
    asked, boards = record.request, _boards(record)
    who = "1 request uses" if count == 1 else f"{count} requests use"
    where = "1 board" if boards == 1 else f"{boards} boards"
    return (
        f"{who} {record.name} as it is deployed "
        f"({asked.precision}, {asked.objective}, context {asked.context_tokens}, {where})"
    )


def _boards(record: DeploymentRecord) -> int:
    """Boards that work on a deployment; others may hold copies."""
    return len({stage.device for stage in record.plan.stages})


def _with_epoch(plan: Plan, epoch: int) -> Plan:
    return msgspec.structs.replace(plan, epoch=epoch)


def _stage_graph(
    prepared: Prepared, plan: Plan, stage: PlannedStage, build: Callable[..., bytes] = build_stage_graph
) -> bytes:
    packed = prepared.packed
    if isinstance(packed, PackedItems):
        return packed.parts.stage_graph(stage.embedding, stage.first_block, stage.end_block, stage.head)
    adapters = {} if packed.adapters is None else {"adapters": packed.adapters}
    return build(
        packed.config,
        plan.precision,
        plan.wire_dtype,
        first_block=stage.first_block,
        end_block=stage.end_block,
        embedding=stage.embedding,
        head=stage.head,
        **adapters,
    )
