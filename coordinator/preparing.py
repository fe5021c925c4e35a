"""From a request to a plan: the model packed, the boards there and measured, the ways between them known.

The planner is pure (coordinator.planning); here it gets its inputs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import msgspec

from coordinator.asked import check_measured, check_precision, checked, topology_of
from coordinator.calls import MeasureRequest
from coordinator.deployments import deployment_name, held_elsewhere
from coordinator.journal import DeployRequest
from coordinator.notices import boards_hint
from coordinator.pairs import BUDGET_S, Pairs, pairs_worth
from coordinator.planning.aims import check_objective
from coordinator.planning.codecs import with_codecs
from coordinator.planning.copied import planned_with_copies
from coordinator.planning.cost import link_cost
from coordinator.planning.moving import held_by
from coordinator.planning.pairs import PairCost, direct_of
from coordinator.planning.plan import Plan
from coordinator.planning.planner import Candidate, Infeasible, PlanRequest, repriced
from coordinator.planning.request import check
from coordinator.planning.topology import RoundTrips, why_central, with_slow_links, with_topology
from coordinator.replicas import ways_after_losses
from coordinator.service import Coordinator
from coordinator.shelf import Prepared, Shelf, canonical
from coordinator.ways import Ways
from hwprofiles.samples import Codings
from models.build.pack import Packed
from models.codecs import load_report
from models.engine.names import PROCESSOR
from wire import topics
from wire.errors import Unreachable, UsageError
from wire.messages import InboxAddress, Kit, KitModule

Progress = Callable[[str], None]

PREFILL_CHUNK_TOKENS = 64
"""Rows per prefill step, unless smaller ones are measured to be better."""
SMALLER_CHUNKS = (32,)
"""Boards measure prefill at 32 and 128 rows; below 32 a chunk costs compute."""
MEASURE_TIMEOUT_S = 180.0
MEASURE_AGAIN_TIMEOUT_S = 900.0
"""For all that was ever measured; the boards of one machine take turns."""
REPLAYED = "its profile is of a recording, and was not measured on it"
SUSTAINED_SPARE_S = 120.0
"""To load what is run, and to wait for another agent's turn."""
MORE_BOARDS_TIMEOUT_S = 6.0
"""For boards that are just joining: found over mDNS, connected and heard within it."""
FIRST_BOARD_TIMEOUT_S = 15.0
BROKER_TIMEOUT_S = 6.0
"""A broker that we supervise is back within three seconds of its end; one of somebody else may never be."""
MAX_KIT_MODULES = 64
"""What a Kit message holds (wire.messages); of more models than that, the earliest offered are measured no more."""


class Preparing:
    """Prepares models and plans on one coordinator; changes nothing that runs."""

    def __init__(
        self, coordinator: Coordinator, shelf: Shelf, is_used: Callable[[str], bool] = lambda _device: False
    ) -> None:
        """`is_used(device)` says that answers run on a board."""
        self._coordinator = coordinator
        self._shelf = shelf
        self._kit: dict[str, KitModule] = {}
        self.ways = Ways(coordinator.calls, coordinator.is_online)
        self.pairs = Pairs(coordinator.calls, coordinator.is_online, is_used)

    async def prepare(self, model: str, precision: str, progress: Progress, adapters: tuple[str, ...] = ()) -> Prepared:
        """Pack a model, with adapters beside it, and ask all devices to measure its modules (those that have not)."""
        check_precision(precision)
        prepared = await self._shelf.prepare(canonical(model), precision, progress, adapters)
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
                standard=tuple(
                    (stack, coordinator.artifacts.add_bytes(data, f"{entry.kind}-x{stack}-standard.onnx"))
                    for stack, data in sorted(entry.standard.items())
                ),
                hidden=entry.hidden,
                vocabulary=entry.vocabulary,
                wire_dtype=entry.wire_dtype,
                runs=entry.runs,
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
        if request.sustained_s:
            for device in list(dict.fromkeys(request.devices)) or self._coordinator.online():
                progress(f"{device} is under load for {request.sustained_s:g} s")
                await self._sustain(device, request.sustained_s)
        return unmeasured

    async def _sustain(self, device: str, seconds: float) -> None:
        """One board after the other, since boards of one machine would slow each other. Raises CallFailed."""
        coordinator = self._coordinator
        there, patience_s = (lambda: coordinator.is_online(device)), seconds + SUSTAINED_SPARE_S
        await coordinator.calls.call(device, "sustain", there, patience_s, seconds=seconds)

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

    async def plan(
        self, request: DeployRequest, progress: Progress, in_haste: bool = False
    ) -> tuple[Plan, Prepared, list[Candidate]]:
        """Plan a model on the devices that are online and measured; waits for boards that join and for measurements
        that are under way, and has ways measured that were not; in haste it does with what is known."""
        request = checked(request)
        prepared = await self.prepare(request.model, request.precision, progress, request.adapters)
        name = deployment_name(request.model)
        check(prepared.packed.graph, plan_request(request, name))
        if not in_haste:
            check_measured(request, prepared)
            await self._await_boards(request, prepared, progress)
        self._check_excluded(request)
        wanted = topology_of(request)
        left_s = 0.0 if in_haste else BUDGET_S
        while True:
            candidates = self.candidates(request)
            plan = await asyncio.to_thread(
                planned_with_copies,
                prepared.packed.graph,
                candidates,
                msgspec.structs.replace(plan_request(request, name), held=self._held(name, prepared)),
                request.slots,
                lambda stage: self._inbox(name, stage),
                in_haste,
            )
            brokers = self._coordinator.data_brokers()
            if in_haste or why_central(plan, wanted, brokers):
                break
            # With other figures of its pairs another plan may be the best, whose pairs are not known yet.
            boards = [board.device for board in candidates if board.device not in request.excluded]
            due = self.pairs.due(pairs_worth(plan, boards), self._direct(), brokers, time.time())
            if not due or left_s <= 0:
                if plan.standbys or not all(stage.central_hop_s for stage in plan.stages):
                    await self.ways.measure(ways_after_losses(plan, brokers), progress)
                break
            left_s = await self.pairs.measure(due, brokers, progress, left_s)
        plan = with_topology(plan, wanted, brokers, self._round_trips())
        return await asyncio.to_thread(coded, plan, request, prepared, candidates), prepared, candidates

    async def boards(self, request: DeployRequest, progress: Progress) -> list[Candidate]:
        """The boards that a plan of this model would be made with, measured as for one."""
        request = checked(request)
        prepared = await self.prepare(request.model, request.precision, progress, request.adapters)
        await self._await_boards(request, prepared, progress)
        return self.candidates(request)

    def _held(self, name: str, prepared: Prepared) -> dict[str, tuple[str, ...]]:
        """What the boards have loaded of a deployment of this name, at this precision."""
        graph = prepared.packed.graph
        for record in self._coordinator.records():
            if record.name == name and record.plan.precision == graph.precision:
                return held_by(record.plan, graph)
        return {}

    def _check_excluded(self, request: DeployRequest) -> None:
        """Raise UsageError for a board to leave out that nobody has heard of: most likely a slip of the pen."""
        self._check_known(request.excluded, " to leave out")

    def _check_known(self, names: Iterable[str], what: str = "") -> None:
        known = [device.name for device in self._coordinator.devices()]
        for name in names:
            if name not in known:
                raise UsageError(f"no board {name!r}{what}", try_=f"one of: {', '.join(known) or 'none is here'}")

    def _inbox(self, deployment: str, stage: int) -> InboxAddress:
        return InboxAddress(topic=topics.INBOX.on(self._coordinator.site, deployment, str(stage)))

    def candidates(self, request: DeployRequest) -> list[Candidate]:
        coordinator = self._coordinator
        records = coordinator.records()
        name = deployment_name(request.model)
        direct = self._direct() if topology_of(request) != "central" else {}
        found = []
        for device, profile in sorted(coordinator.profiles().items()):
            if coordinator.is_online(device):
                borne = coordinator.borne.of(device)
                usable = profile.memory.usable_bytes - held_elsewhere(records, name, device)
                found.append(
                    Candidate(
                        device=device,
                        profile=profile,
                        usable_memory_bytes=max(0, usable),
                        unavailable=REPLAYED if profile.source == "replayed" else "",
                        slowed=coordinator.slowed(device),
                        link_slowed=coordinator.slow_links.of(device),
                        direct={other: cost for (sender, other), cost in direct.items() if sender == device},
                        borne_out=borne.text if borne is not None else "",
                        without=coordinator.without_engines(device, name),
                    )
                )
        return found

    def _direct(self) -> dict[tuple[str, str], PairCost]:
        """What is known of the ways straight from board to board, and of their links now."""
        coordinator = self._coordinator
        found = direct_of(coordinator.profiles(), coordinator.data_brokers())
        slow = coordinator.slow_links
        return {
            ends: msgspec.structs.replace(cost, times=max(map(slow.times, ends)), more_s=slow.between_s(*ends))
            for ends, cost in found.items()
        }

    def _round_trips(self) -> RoundTrips:
        """What was asked for of the ways between boards, as slow as their links are now."""
        coordinator = self._coordinator
        return with_slow_links(self.ways.round_trips, coordinator.data_brokers(), coordinator.slow_links.between_s)

    async def await_broker(self) -> None:
        """Without a broker no board is heard, and what is known of them is of before."""
        coordinator = self._coordinator
        if not await coordinator.changes.wait(lambda: coordinator.broker_up, BROKER_TIMEOUT_S):
            raise Unreachable(
                f"the broker at {coordinator.mqtt_url} is gone",
                try_="start it again; the boards come back to it by themselves (edgelam devices shows them)",
            )

    async def _await_boards(self, request: DeployRequest, prepared: Prepared, progress: Progress) -> list[str]:
        """Wait until every online device has measured the model's modules; give those that have not in time."""
        await self.await_broker()
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
            text = f"measuring on {', '.join(map(coordinator.progress_of, left))}" if left else ""
            if text and text not in said:
                said.add(text)
                progress(text)
            return not left

        if not await coordinator.changes.wait(done, MEASURE_TIMEOUT_S):
            progress(f"going on without the measurements of {', '.join(pending())}")
        return pending()

    def today(
        self, request: DeployRequest, running: Plan, prepared: Prepared, candidates: list[Candidate]
    ) -> Plan | None:
        """The running placement at today's figures; None if it could not be planned any more."""
        try:
            today = repriced(running, prepared.packed.graph, candidates)
        except Infeasible:
            return None
        brokers = self._coordinator.data_brokers()
        today = with_topology(today, topology_of(request), brokers, self._round_trips())
        return coded(today, request, prepared, candidates)


def plan_request(request: DeployRequest, name: str) -> PlanRequest:
    """What the planner is asked for. Without a number of slots it is asked again for others."""
    return PlanRequest(
        deployment=name,
        epoch=0,
        objective=check_objective(request.objective, dict(request.weights), request.tokens_per_s),
        context_tokens=request.context_tokens,
        slots=1 if request.slots is None else request.slots,
        boards_at_least=request.boards_at_least,
        boards_at_most=request.boards_at_most,
        pins=dict(request.pins),
        excluded=request.excluded,
        replicas=request.replicas,
        tokens_per_s=request.tokens_per_s,
        weights=dict(request.weights),
        reserve_percent=request.reserve_percent,
        engine=PROCESSOR if request.adapters else request.engine,
        prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
        smaller_chunks=SMALLER_CHUNKS,
    )


def coded(plan: Plan, request: DeployRequest, prepared: Prepared, candidates: list[Candidate]) -> Plan:
    """The plan with the codecs that the request allows at its cuts."""
    if not request.error_budget_percent:
        return plan
    priced = {board.device: link_cost(board.profile)[0] for board in candidates if board.profile is not None}
    links = {device: link for device, link in priced.items() if link is not None}
    packed = prepared.packed
    report = load_report(packed) if isinstance(packed, Packed) else None
    profiles = {board.device: board.profile for board in candidates if board.profile is not None}
    codings = {name: profile.codings for name, profile in profiles.items() if isinstance(profile.codings, Codings)}
    return with_codecs(plan, packed.graph.hidden, links, report, request.error_budget_percent, codings)
