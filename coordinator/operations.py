"""What a user can ask for: prepare a model, plan it, deploy it, make sure that it runs.

Decisions are made by pure functions (coordinator.planning, coordinator.deployments); here they get their inputs, and
their results are journaled first and published then.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec

from coordinator.calls import MeasureRequest
from coordinator.deployments import deployment_name, held_elsewhere, loading_text, make_orders, readiness
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.notices import boards_hint
from coordinator.planning.plan import Plan, PlannedStage
from coordinator.planning.planner import Candidate, Infeasible, PlanRequest, make_plan, repriced, worth_moving
from coordinator.planning.request import check, check_numbers
from coordinator.service import Coordinator
from coordinator.shelf import Prepared, Shelf, canonical
from coordinator.turns import Hold, Holds, Key, Lines
from models.build.stage import build_stage_graph
from models.graph import Graph
from wire import topics
from wire.errors import Degraded, Refused, Unreachable, UsageError
from wire.messages import ArtifactRef, InboxAddress, Kit, KitModule

Progress = Callable[[str], None]

PREFILL_CHUNK_TOKENS = 64
"""Rows per prefill step: chunking costs no compute down to 32, and lets all stages work at once."""
MEASURE_TIMEOUT_S = 180.0
MEASURE_AGAIN_TIMEOUT_S = 900.0
"""For all that was ever measured; the boards of one machine take turns."""
READY_TIMEOUT_S = 600.0
BUSY_TIMEOUT_S = 120.0
"""How long a change of a deployment waits for the requests that run on it: most answers are over by then, and who
waits at a terminal still does. docs/architecture.md states it."""
PROGRESS_PERIOD_S = 2.0
"""Between two lines about the same thing: people read them, and logs keep them."""
MORE_BOARDS_TIMEOUT_S = 6.0
"""For boards that are just joining: found over mDNS, connected and heard within it."""
FIRST_BOARD_TIMEOUT_S = 15.0
BROKER_TIMEOUT_S = 6.0
"""A broker that we supervise is back within three seconds of its end; one of somebody else may never be."""
MAX_KIT_MODULES = 64
"""What a Kit message holds (wire.messages); of more models than that, the earliest offered are measured no more."""
PRECISIONS = ("int4", "int8", "f32")
OBJECTIVES = ("latency", "throughput")


class Operations:
    """Operations on one coordinator; those that change deployments run one at a time."""

    def __init__(self, coordinator: Coordinator, shelf: Shelf) -> None:
        self._coordinator = coordinator
        self._shelf = shelf
        self._changing = asyncio.Lock()
        self._lines = Lines()
        self._holds = Holds(coordinator.changes.ring)
        self._kit: dict[str, KitModule] = {}

    async def prepare(self, model: str, precision: str, progress: Progress) -> Prepared:
        """Pack a model and ask all devices to measure its modules (those that have not)."""
        check_precision(precision)
        prepared = await self._shelf.prepare(canonical(model), precision, progress)
        await self._offer_kit(prepared)
        return prepared

    async def _offer_kit(self, prepared: Prepared) -> None:
        keys = {module.profile_key for module in prepared.packed.graph.modules}
        if keys <= self._kit.keys():
            return
        entries = await asyncio.to_thread(self._shelf.kit_of, prepared)
        coordinator = self._coordinator
        for entry in entries:
            self._kit[entry.key] = KitModule(
                key=entry.key,
                kind=entry.kind,
                graphs=tuple(
                    (stack, coordinator.artifacts.add_bytes(data, f"{entry.kind}-x{stack}.onnx"))
                    for stack, data in sorted(entry.graphs.items())
                ),
                hidden=entry.hidden,
                vocabulary=entry.vocabulary,
                wire_dtype=entry.wire_dtype,
            )
        while len(self._kit) > MAX_KIT_MODULES:
            del self._kit[next(iter(self._kit))]
        coordinator.offer_kit(Kit(artifacts_url=coordinator.artifacts_url, modules=tuple(self._kit.values())))

    async def measure(self, request: MeasureRequest, progress: Progress) -> list[str]:
        """Have every online device measure the model's modules; give the devices that have not in time. With `again`
        the devices asked for measure what they know too; raises CallFailed if one of them can't."""
        self._check_known(request.devices)
        prepared = await self.prepare(request.model, request.precision, progress)
        deploy = DeployRequest(model=request.model, precision=request.precision)
        unmeasured = await self._await_boards(deploy, prepared, progress)
        if request.again:
            devices = list(dict.fromkeys(request.devices)) or self._coordinator.online()
            progress(f"measuring again on {', '.join(devices)}")
            calls = [self._measure_again(device, progress) for device in devices]
            failures = [found for found in await asyncio.gather(*calls, return_exceptions=True) if found is not None]
            if failures:
                raise failures[0]
        return unmeasured

    async def _measure_again(self, device: str, progress: Progress) -> None:
        coordinator = self._coordinator
        if not coordinator.is_online(device):
            raise Unreachable(f"{device} is offline", try_="edgelam devices")
        result = await coordinator.calls.call(
            device, "measure", lambda: coordinator.is_online(device), MEASURE_AGAIN_TIMEOUT_S
        )
        measured, failed = result.get("measured"), result.get("failed")
        count = len(measured) if isinstance(measured, list) else 0
        progress(f"{device} measured {count} modules" + (f", {len(failed)} could not be" if failed else ""))

    async def plan(self, request: DeployRequest, progress: Progress) -> tuple[Plan, Prepared, list[Candidate]]:
        """Plan a model on the devices that are online and measured; waits for measurements that are under way."""
        request = checked(request)
        prepared = await self.prepare(request.model, request.precision, progress)
        name = deployment_name(request.model)
        check(prepared.packed.graph, self._plan_request(request, name))
        await self._await_boards(request, prepared, progress)
        self._check_excluded(request)
        candidates = self._candidates(request)
        plan = await asyncio.to_thread(
            best_plan,
            prepared.packed.graph,
            candidates,
            self._plan_request(request, name),
            lambda stage: self._inbox(name, stage),
        )
        return plan, prepared, candidates

    def _check_excluded(self, request: DeployRequest) -> None:
        """Raise UsageError for a board to leave out that nobody has heard of: most likely a slip of the pen."""
        self._check_known(request.excluded, " to leave out")

    def _check_known(self, names: Iterable[str], what: str = "") -> None:
        known = [device.name for device in self._coordinator.devices()]
        for name in names:
            if name not in known:
                raise UsageError(f"no board {name!r}{what}", try_=f"one of: {', '.join(known) or 'none is here'}")

    def _plan_request(self, request: DeployRequest, name: str) -> PlanRequest:
        return PlanRequest(
            deployment=name,
            epoch=0,
            objective="throughput" if request.objective == "throughput" else "latency",
            context_tokens=request.context_tokens,
            slots=request.slots,
            boards_at_least=request.boards_at_least,
            boards_at_most=request.boards_at_most,
            pins=dict(request.pins),
            excluded=request.excluded,
            prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
        )

    def _inbox(self, deployment: str, stage: int) -> InboxAddress:
        return InboxAddress(topic=topics.INBOX.on(self._coordinator.site, deployment, str(stage)))

    def _candidates(self, request: DeployRequest) -> list[Candidate]:
        coordinator = self._coordinator
        records = coordinator.records()
        name = deployment_name(request.model)
        found = []
        for device, profile in sorted(coordinator.profiles().items()):
            if coordinator.is_online(device):
                usable = profile.memory.usable_bytes - held_elsewhere(records, name, device)
                found.append(Candidate(device=device, profile=profile, usable_memory_bytes=max(0, usable)))
        return found

    async def _await_broker(self) -> None:
        """Without a broker no board is heard, and what is known of them is of before."""
        coordinator = self._coordinator
        if not await coordinator.changes.wait(lambda: coordinator.broker_up, BROKER_TIMEOUT_S):
            raise Unreachable(
                f"the broker at {coordinator.mqtt_url} is gone",
                try_="start it again; the boards come back to it by themselves (edgelam devices shows them)",
            )

    async def _await_boards(self, request: DeployRequest, prepared: Prepared, progress: Progress) -> list[str]:
        """Wait until every online device has measured the model's modules; give those that have not in time."""
        await self._await_broker()
        coordinator = self._coordinator
        wanted = max(1, request.boards_at_least)
        online = len(coordinator.online())
        if online < wanted:
            progress(f"waiting for boards: {online or 'none'} of site {coordinator.site} online yet, {wanted} wanted")
        await coordinator.changes.wait(lambda: len(coordinator.online()) >= wanted, MORE_BOARDS_TIMEOUT_S)
        if not await coordinator.changes.wait(lambda: bool(coordinator.online()), FIRST_BOARD_TIMEOUT_S):
            raise Unreachable(
                f"no board is online at site {coordinator.site!r}",
                try_=boards_hint(coordinator.site),
            )
        keys = {module.profile_key for module in prepared.packed.graph.modules}
        said: set[str] = set()

        def pending() -> list[str]:
            return [device for device in coordinator.online() if not coordinator.has_measured(device, keys)]

        def done() -> bool:
            left = pending()
            text = f"measuring on {', '.join(left)}" if left else ""
            if text and text not in said:
                said.add(text)
                progress(text)
            return not left

        if not await coordinator.changes.wait(done, MEASURE_TIMEOUT_S):
            progress(f"going on without the measurements of {', '.join(pending())}")
        return pending()

    async def ensure(self, request: DeployRequest, progress: Progress, hold: Hold) -> tuple[DeploymentRecord, Prepared]:
        """Give a deployment that answers `request` and is ready: the one in force, or a new one.

        `hold` holds it from the moment it is chosen, so that nobody replaces it; the caller closes it, also when
        this raises. Raises Refused when requests with other settings run too long on a deployment of this name.
        """
        request = checked(request)
        prepared = await self.prepare(request.model, request.precision, progress)
        await self._await_broker()
        async with self._line(request, progress):
            record = self._in_force_for(request) or await self._deploy(request, progress)
            hold.take(self._holds, _key(record))
        await self._await_ready(record, progress)
        return record, prepared

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

    def _in_force_for(self, request: DeployRequest) -> DeploymentRecord | None:
        """The usable deployment in force for this request."""
        records = (record for record in self._coordinator.records() if record.request == request)
        return next((record for record in records if self.usable(record)), None)

    def usable(self, record: DeploymentRecord) -> bool:
        """Whether a deployment is in force, all its devices are there, and none of its stages has failed."""
        coordinator = self._coordinator
        failed = readiness(record.plan, coordinator.applied(), coordinator.is_online).failed
        there = all(coordinator.is_online(stage.device) for stage in record.plan.stages)
        return there and not failed and coordinator.in_force(record)

    async def deploy(self, request: DeployRequest, progress: Progress) -> DeploymentRecord:
        """Plan anew and put the plan in force; keeps the running placement when moving is not worth it."""
        request = checked(request)
        hold = Hold()
        try:
            async with self._line(request, progress):
                record = await self._deploy(request, progress)
                hold.take(self._holds, _key(record))
            await self._await_ready(record, progress)
        finally:
            hold.close()
        return record

    async def _deploy(self, request: DeployRequest, progress: Progress) -> DeploymentRecord:
        """Plan and put in force, without waiting until it is ready. The caller has the turn in the name's line."""
        while True:
            async with self._turn(progress):
                plan, prepared, candidates = await self.plan(request, progress)
                running = self._in_force_for(request)
                if running is not None:
                    move = await asyncio.to_thread(_worth_moving, running.plan, plan, prepared, candidates)
                    if not move:
                        return running
                if self._in_use(plan.deployment) is None:
                    record = await self._put_in_force(request, plan, prepared)
                    progress(
                        f"epoch {record.plan.epoch}: {len(record.plan.stages)} stages on {len(record.orders)} boards"
                    )
                    return record
            # Other models need not wait meanwhile; and then the boards' memory may be another, so it is planned again.
            await self._await_unused(plan.deployment, progress)

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
            raise Refused(
                f"busy for {BUSY_TIMEOUT_S:.0f} s: {_use_text(record, self._holds.count(_key(record)))}",
                try_="run again when that is over, or ask with the same settings",
            )

    async def _put_in_force(self, request: DeployRequest, plan: Plan, prepared: Prepared) -> DeploymentRecord:
        """Journal, then publish."""
        coordinator = self._coordinator
        plan = _with_epoch(plan, coordinator.next_epoch())
        packed = prepared.packed
        graphs: dict[int, ArtifactRef] = {}
        for stage in plan.stages:
            data = await asyncio.to_thread(_stage_graph, prepared, plan, stage)
            graphs[stage.stage] = coordinator.artifacts.add_bytes(data, f"{plan.deployment}-{stage.stage}.onnx")
        orders = make_orders(
            plan,
            packed.graph,
            packed.config,
            lambda stage: graphs[stage.stage],
            lambda digest: coordinator.artifacts.add_file(digest, packed.files[digest], packed.files[digest].name),
        )
        record = DeploymentRecord(
            name=plan.deployment, request=request, plan=plan, orders=orders, checkpoint=str(prepared.checkpoint.path)
        )
        coordinator.put_in_force(record)
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
            raise Refused(f"{record.name} was replaced or removed before it was ready", try_="run again")
        state = readiness(record.plan, coordinator.applied(), coordinator.is_online)
        if state.failed:
            device, detail = state.failed[0]
            raise Degraded(f"{device} could not load its stage: {detail}", try_="edgelam devices; then run again")
        if not state.ready:
            late = "" if in_time else f" after {READY_TIMEOUT_S:.0f} s"
            raise Unreachable(f"the deployment is not ready{late}: {state.text()}", try_="edgelam devices")

    async def remove(self, name: str) -> None:
        """Take a deployment out of force; raise UsageError if there is none of that name."""
        async with self._changing:
            if not any(record.name == name for record in self._coordinator.records()):
                names = ", ".join(record.name for record in self._coordinator.records()) or "none"
                raise UsageError(f"no deployment {name!r}", try_=f"deployments in force: {names}")
            self._coordinator.take_out_of_force(name)


def _worth_moving(running: Plan, plan: Plan, prepared: Prepared, candidates: list[Candidate]) -> bool:
    """Compare the new plan with the running placement at today's figures."""
    try:
        today = repriced(running, prepared.packed.graph, candidates)
    except Infeasible:
        return True
    return bool(worth_moving(today, plan))


def best_plan(
    graph: Graph, candidates: list[Candidate], request: PlanRequest, address: Callable[[int], InboxAddress]
) -> Plan:
    """The plan on steady figures; where there is none, on unsteady ones too, and the plan says so.

    A noisy minute on a board must not make the planner refuse what the boards can do. Raises Infeasible.
    """
    try:
        return make_plan(graph, candidates, request, address)
    except Infeasible as refused:
        try:
            plan = make_plan(graph, candidates, msgspec.structs.replace(request, accept_unsteady=True), address)
        except Infeasible:
            raise refused from None
    caution = "Some of the figures are unsteady (edgelam bench shows which), so the prediction is rough"
    return msgspec.structs.replace(plan, because=f"{plan.because}. {caution}")


def _key(record: DeploymentRecord) -> Key:
    return record.name, record.plan.epoch


def _use_text(record: DeploymentRecord, count: int) -> str:
    """'2 requests use smollm2 as it is deployed (int4, latency, context 1024, 4 boards)'."""
    asked, boards = record.request, len(record.orders)
    who = "1 request uses" if count == 1 else f"{count} requests use"
    where = "1 board" if boards == 1 else f"{boards} boards"
    return (
        f"{who} {record.name} as it is deployed "
        f"({asked.precision}, {asked.objective}, context {asked.context_tokens}, {where})"
    )


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown", try_=", ".join(PRECISIONS))


def checked(request: DeployRequest) -> DeployRequest:
    """The request with the model's one name; raise UsageError for what can be refused before any work is done."""
    check_precision(request.precision)
    if request.objective not in OBJECTIVES:
        raise UsageError(f"objective {request.objective!r} is unknown", try_=", ".join(OBJECTIVES))
    check_numbers(request.context_tokens, request.slots, request.boards_at_least, request.boards_at_most)
    return msgspec.structs.replace(request, model=canonical(request.model))


def _with_epoch(plan: Plan, epoch: int) -> Plan:
    return msgspec.structs.replace(plan, epoch=epoch)


def _stage_graph(prepared: Prepared, plan: Plan, stage: PlannedStage) -> bytes:
    return build_stage_graph(
        prepared.packed.config,
        plan.precision,
        plan.wire_dtype,
        first_block=stage.first_block,
        end_block=stage.end_block,
        embedding=stage.embedding,
        head=stage.head,
    )
