"""A deployment moves away from a board that became too slow, and back when it is well: seldom, and only if it pays.

    telemetry -> coordinator.promised (windows, like with like) -> coordinator.alike (beside the others)
              -> coordinator.slowness (the judge) -> wishes to move
              -> coordinator.distrust (profiles that were never kept) -> wishes to move

A wish comes true when the planner, told what the judge found, has a plan that is better by LEAST_GAIN. Answers under
way go on on the new one behind what was given, as after a loss; so a wish waits

    while an answer runs that must not be disturbed: an exact one, or one that has no recoveries left,
    until nobody uses the deployment, if the weights that must travel would keep answers waiting for long,
    until nobody uses it, if it is about a board that became faster: nothing is wrong then,
    for a pause since the last move of this deployment, which doubles with each.

If all boards became slow alike none is slow beside the others, and nothing moves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct

from coordinator.alike import Alike
from coordinator.deployments import readiness
from coordinator.distrust import Verdict, claimed, modules_digest
from coordinator.fallen import Failure
from coordinator.journal import DeploymentRecord
from coordinator.linkwatch import LinkWatch
from coordinator.notices import notice
from coordinator.operations import Operations
from coordinator.planning.aims import figure
from coordinator.planning.cost import stage_modules
from coordinator.planning.plan import Plan
from coordinator.planning.planner import same_placement
from coordinator.promised import Stints, profiles_differ, promised_s, ratio_of, stage_of
from coordinator.service import Coordinator
from coordinator.shelf import Prepared
from coordinator.slowness import Change
from hwprofiles.link import bytes_per_s
from hwprofiles.profile import LinkMeasurement, Profile
from models.graph import Graph
from wire.errors import EdgelamError
from wire.messages import Telemetry

LOG = logging.getLogger("edgelam.replanning")

TICK_S: Final = 1.0
"""Telemetry comes so often."""

LEAST_GAIN: Final = 0.15
"""Predicted time per token that a move must save: more than for a plan that somebody asks for, since answers pause."""

UNUSED_S: Final = 5.0
"""Nobody uses a deployment that nobody used for so long: between two questions of a talk it is not unused."""

LONGEST_FETCH_S: Final = 10.0
"""Answers under way are not made to wait longer than this for weights to travel."""

FIRST_PAUSE_S: Final = 60.0
LONGEST_PAUSE_S: Final = 3600.0
CALM_S: Final = 7200.0
"""A deployment that did not move for so long begins anew with the first pause."""


class Gate:
    """How often a deployment may move: in an hour at most six times, whatever its boards do."""

    def __init__(self) -> None:
        self._moved_s: float | None = None
        self._pause_s = FIRST_PAUSE_S

    def open(self, now_s: float) -> bool:
        return self._moved_s is None or now_s - self._moved_s >= self._pause_s

    def moved(self, now_s: float) -> None:
        if self._moved_s is not None:
            calm = now_s - self._moved_s >= CALM_S
            self._pause_s = FIRST_PAUSE_S if calm else min(LONGEST_PAUSE_S, 2 * self._pause_s)
        self._moved_s = now_s


class _Wish(Struct):
    """To plan a deployment of this epoch anew. `disturb`: also while it is used."""

    epoch: int
    disturb: bool
    said_fetch: bool = False


def gain_of(today: Plan | None, better: Plan) -> float:
    """The share of time per token that a plan saves; `today` None is one that can't be kept at all."""
    if today is None:
        return 1.0
    if same_placement(today, better) or figure(today) <= 0:
        return 0.0
    return 1 - figure(better) / figure(today)


def fetch_s(running: Plan, plan: Plan, graph: Graph, profiles: Mapping[str, Profile]) -> float:
    """Seconds until every board of a plan has the weights that it does not run now, at its link's measured rate."""
    longest_s = 0.0
    for stage in plan.stages:
        held = {m.name for old in running.stages if old.device == stage.device for m in stage_modules(graph, old)}
        new_bytes = sum(module.weight_bytes for module in stage_modules(graph, stage) if module.name not in held)
        profile = profiles.get(stage.device)
        link = profile.link if profile is not None else None
        rate = bytes_per_s(link) if isinstance(link, LinkMeasurement) else None
        if new_bytes:
            longest_s = max(longest_s, new_bytes / rate if rate else float("inf"))
    return longest_s


class Replanner:
    """`why_stay(name)` says why the answers that run on a deployment can't be disturbed, '' if they can. Without
    `moves` slow boards are found, said, and reckoned with when something is planned, but nothing is moved."""

    def __init__(
        self,
        coordinator: Coordinator,
        operations: Operations,
        why_stay: Callable[[str], str],
        moves: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._coordinator = coordinator
        self._operations = operations
        self._why_stay = why_stay
        self._moves = moves
        self._clock = clock
        self._stints = Stints()
        self._alike = Alike()
        self._links = LinkWatch(coordinator, self._wish, clock)
        self._seen: dict[str, tuple[str, int]] = {}
        self._profiles: dict[str, Profile] = {}
        self._fallen: frozenset[Failure] = frozenset()
        self._graphs: dict[str, tuple[int, Graph]] = {}
        self._wishes: dict[str, _Wish] = {}
        self._gates: dict[str, Gate] = {}
        self._used_s: dict[str, float] = {}
        """When a deployment was last seen in use."""

    async def run(self) -> None:
        """Look and act until cancelled."""
        granting: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.sleep(TICK_S)
                await self.look()
                if granting is not None and granting.done():
                    granting.result()
                    granting = None
                if granting is None and self._wishes:
                    # Beside the looking: a move may have to wait for its turn.
                    granting = asyncio.create_task(self.grant())
        finally:
            if granting is not None:
                granting.cancel()
            self._links.close()

    # Looking.

    async def look(self) -> None:
        """Take what the boards report, and say and wish what follows from it."""
        coordinator, slowness, now_s = self._coordinator, self._coordinator.slowness, self._clock()
        for device, profile in coordinator.profiles().items():
            before = self._profiles.get(device)
            self._profiles[device] = profile
            if before is not profile:
                self._trusting(coordinator.trust.profiled(device, modules_digest(profile)))
            if before is not None and before is not profile and profiles_differ(before, profile):
                self._stints.forget([device])
                self._alike.forget([device])
                coordinator.borne.forget([device])
                coordinator.fallen.forget([device])
                self._heed(slowness.measured_anew(device, now_s))
                if before.pending and not profile.pending:  # it may be faster on what it has measured last
                    self._wish(device, slower=False)
        for failure in coordinator.fallen.all - self._fallen:
            self._wish(failure.device, slower=True)
        self._fallen = coordinator.fallen.all
        for device, telemetry in coordinator.telemetry().items():
            if coordinator.is_online(device) and self._seen.get(device) != (telemetry.boot, telemetry.seq):
                self._seen[device] = (telemetry.boot, telemetry.seq)
                self._links.saw(device, telemetry)
                await self._judge(device, telemetry, now_s)
        for change in slowness.tick(now_s):
            self._heed(change)
        self._links.tick()
        for record in coordinator.records():
            if self._operations.in_use(record.name):
                self._used_s[record.name] = now_s
        self._forget_others()

    async def _judge(self, device: str, telemetry: Telemetry, now_s: float) -> None:
        profile = self._profiles.get(device)
        busy = self._coordinator.is_measuring(device)
        for counters, work in self._stints.saw(device, telemetry, busy, now_s):
            record = self._record(counters.deployment)
            stage = stage_of(record.plan, device, counters) if record is not None else None
            if record is None or stage is None or profile is None:
                continue
            if stage.engine in self._coordinator.without_engines(device, record.name):
                continue  # it runs on another one, of which nothing was promised
            graph = await self._graph(record)
            promised = promised_s(graph, record.plan, stage, profile, work.context_tokens) if graph else None
            slowness, trust = self._coordinator.slowness, self._coordinator.trust
            claim = claimed(work, promised)
            if claim is not None:
                common = self._alike.common(record.name, device, slowness.slow, now_s)
                if self._trusting(trust.saw(device, claim, common, time.time())):
                    continue
            seen = ratio_of(work, promised * trust.times(device) if promised else None)
            if seen is not None:
                self._coordinator.borne.saw(device, seen)
            ratio = self._alike.beside(record.name, device, seen, slowness.slow, now_s) if seen is not None else None
            LOG.debug("%s, %s: %s, beside the others %s", device, work, seen, ratio)
            if ratio is not None:
                self._heed(slowness.saw(device, ratio, now_s, time.time()))

    def _trusting(self, verdict: Verdict | None) -> bool:
        """Say, keep and wish what follows from a profile that is not believed, or again; give whether there was one."""
        if verdict is None:
            return False
        coordinator, device = self._coordinator, verdict.device
        coordinator.keep_doubts(verdict)
        # What was seen so far was seen beside another promise.
        self._stints.forget([device])
        self._alike.forget([device])
        coordinator.borne.forget([device])
        coordinator.slowness.measured_anew(device, self._clock())
        if verdict.kind == "doubted":
            coordinator.note(notice("profile-doubted", device=device, what=verdict.distrust.because))
        else:
            coordinator.note(notice("profile-kept" if verdict.kind == "kept" else "profile-anew", device=device))
        self._wish(device, verdict.kind == "doubted")
        coordinator.changes.ring()
        return True

    async def _graph(self, record: DeploymentRecord) -> Graph | None:
        """The graph of a deployment whose stages work: somebody has prepared it already."""
        known = self._graphs.get(record.name)
        if known is None or known[0] != record.plan.epoch:
            try:
                asked = record.request
                prepared = await self._operations.preparing.prepare(asked.model, asked.precision, LOG.debug)
            except EdgelamError as error:
                LOG.info("%s can't be judged: %s", record.name, error.message)
                return None
            known = self._graphs[record.name] = (record.plan.epoch, prepared.packed.graph)
        return known[1]

    def _heed(self, change: Change | None) -> None:
        """Say what the judge found, and wish what follows."""
        if change is None:
            return
        coordinator, device = self._coordinator, change.device
        slowed = coordinator.slowness.of(device)
        what = slowed.because if slowed is not None else ""
        if change.kind == "slower":
            coordinator.note(notice("device-slow", device=device, what=what, heat=self._heat(device)))
        elif change.kind == "faster":
            coordinator.note(notice("device-faster", device=device, what=what))
        elif change.kind == "well":
            coordinator.note(notice("device-as-measured", device=device))
        else:
            coordinator.note(notice("device-forgiven", device=device, waited_s=change.waited_s))
        if change.kind != "forgotten":
            self._wish(device, change.kind == "slower")
        coordinator.changes.ring()

    def _wish(self, device: str, slower: bool) -> None:
        """A board or its link became slower, or faster: what follows for deployments."""
        for record in self._coordinator.records() if self._moves else ():
            if slower and device in record.orders:
                self._wishes[record.name] = _Wish(record.plan.epoch, disturb=True)
            elif not slower:
                self._wishes.setdefault(record.name, _Wish(record.plan.epoch, disturb=False))

    def _heat(self, device: str) -> str:
        told = self._coordinator.telemetry().get(device)
        return f" ({told.temperature_c:.0f} °C)" if told is not None and told.temperature_c is not None else ""

    def _record(self, name: str) -> DeploymentRecord | None:
        return next((record for record in self._coordinator.records() if record.name == name), None)

    def _forget_others(self) -> None:
        """Keep nothing of devices and deployments that are no more."""
        known = {device.name for device in self._coordinator.devices()}
        gone = self._seen.keys() - known
        if gone:
            self._stints.forget(gone)
            self._alike.forget(gone)
            self._coordinator.borne.forget(gone)
            self._coordinator.fallen.forget(gone)
        self._seen = {device: seen for device, seen in self._seen.items() if device in known}
        self._profiles = {device: profile for device, profile in self._profiles.items() if device in known}
        names = {record.name for record in self._coordinator.records()}
        self._alike.keep(names)
        self._coordinator.fallen.keep(names)
        self._graphs = {name: graph for name, graph in self._graphs.items() if name in names}
        self._used_s = {name: used_s for name, used_s in self._used_s.items() if name in names}
        self._gates = {name: gate for name, gate in self._gates.items() if name in names}
        self._wishes = {name: wish for name, wish in self._wishes.items() if name in names}

    # Acting.

    async def grant(self) -> None:
        """Plan anew what is wished and may be."""
        for name, wish in list(self._wishes.items()):
            record = self._record(name)
            if record is None or record.plan.epoch != wish.epoch:
                self._drop(name, wish)  # it was planned anew meanwhile, with what the judge knew
            elif self._may_now(record, wish):
                await self._consider(record, wish)

    def _may_now(self, record: DeploymentRecord, wish: _Wish) -> bool:
        """Whether a move would be allowed, before it is known whether it would pay."""
        coordinator = self._coordinator
        if not self._gates.setdefault(record.name, Gate()).open(self._clock()):
            return False
        if not (
            self._operations.usable(record)
            and readiness(record.plan, coordinator.applied(), coordinator.is_online).ready
        ):
            return False
        if not self._operations.in_use(record.name):
            return self._clock() - self._used_s.get(record.name, -UNUSED_S) >= UNUSED_S
        return wish.disturb and not wish.said_fetch and not self._why_stay(record.name)

    async def _consider(self, record: DeploymentRecord, wish: _Wish) -> None:
        name, because = record.name, self._because(record)

        def may(today: Plan | None, plan: Plan, prepared: Prepared) -> bool:
            gain = gain_of(today, plan)
            fewer = len(plan.standbys) < len(record.plan.standbys)
            if gain < LEAST_GAIN or fewer:
                self._drop(name, wish)
                if wish.disturb:
                    why = "has room for fewer copies" if fewer else f"saves {max(0.0, gain):.0%} of the time per token"
                    why = f"{because}: the best other plan {why}"
                    self._coordinator.note(notice("deployment-stays", name=name, because=why))
                return False
            if not self._may_now(record, wish):
                return False
            wait_s = fetch_s(record.plan, plan, prepared.packed.graph, self._coordinator.profiles())
            if self._operations.in_use(name) and wait_s > LONGEST_FETCH_S:
                wish.said_fetch = True
                why = f"{because}, until nobody uses it: weights would travel for {min(wait_s, 86400):.0f} s"
                self._coordinator.note(notice("deployment-stays", name=name, because=why))
                return False
            return True

        try:
            moved = await self._operations.move(record, may, because)
        except EdgelamError as error:
            self._drop(name, wish)
            self._coordinator.note(notice("deployment-stays", name=name, because=f"{because}: {error.message}"))
            return
        if moved is not None:
            self._drop(name, wish)
            self._gates.setdefault(name, Gate()).moved(self._clock())
            boards = ", ".join(dict.fromkeys(stage.device for stage in moved.plan.stages))
            self._coordinator.note(
                notice("deployment-moved", name=name, boards=boards, epoch=moved.plan.epoch, because=because)
            )

    def _because(self, record: DeploymentRecord) -> str:
        """Why it is planned anew, in words."""
        slow = [(device, self._coordinator.slowed(device)) for device in record.orders]
        parts = [f"{device} {found.because}" for device, found in slow if found is not None]
        links = [(device, self._coordinator.slow_links.of(device)) for device in record.orders]
        parts += [f"the link of {device} {found.because}" for device, found in links if found is not None]
        for device in record.orders:
            without = self._coordinator.without_engines(device, record.name)
            parts += [f"{device} can't run it on {engine}" for engine in without]
        return " and ".join(parts) or "a board or its link is faster than before"

    def _drop(self, name: str, wish: _Wish) -> None:
        if self._wishes.get(name) is wish:
            del self._wishes[name]
