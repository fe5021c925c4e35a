"""Watches the links of deployments in service, and finds out whose it is that changed.

    telemetry -> coordinator.laps (gaps) -> coordinator.hopchange (what changed)
              -> coordinator.slowlinks (whose link, and how much)

Before a link is called slow, the boards of the ring are asked once for a round trip to the site's broker, some 70 KB of
small messages each: on a busy machine hops scatter for other reasons, and all boards answer late. It also tells whose
link it is where the hops alone don't.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from coordinator.calls import CallFailed
from coordinator.hopchange import HopChange, HopWatch
from coordinator.journal import DeploymentRecord
from coordinator.laps import Laps, laps_of, of_plan
from coordinator.notices import notice
from coordinator.service import Coordinator
from hwprofiles.link import one_way_s
from hwprofiles.profile import LinkMeasurement, Profile
from hwprofiles.stats import median
from wire.messages import Telemetry

LOG = logging.getLogger("edgelam.linkwatch")

ASK_TIMEOUT_S: Final = 20.0
CHANGED: Final = 1.5
"""Times as long (or as short) as measured that a round trip takes over a link that changed, at the least."""

BESIDE: Final = 0.5
"""Of the ratio of the board whose round trip changed most: one that has so much of it changed too."""

PART: Final = 0.4
"""Of what the hop takes longer, a crossing of the link must take longer too: a busy board answers late on any link."""

LONGEST_S: Final = 60.0


class LinkWatch:
    """`changed(device, slower)` is told when a board's link is to be reckoned with otherwise."""

    def __init__(
        self,
        coordinator: Coordinator,
        changed: Callable[[str, bool], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._coordinator = coordinator
        self._changed = changed
        self._clock = clock
        self._rings: dict[str, tuple[int, Laps, HopWatch]] = {}
        self._links: dict[str, object] = {}
        self._asking: asyncio.Task[None] | None = None

    def saw(self, device: str, telemetry: Telemetry) -> None:
        """Take a heartbeat of a board."""
        for counters in telemetry.stages:
            record = next((one for one in self._coordinator.records() if one.name == counters.deployment), None)
            if record is None or not of_plan(record.plan, device, counters):
                continue
            ring = self._ring(record)
            if ring is None:
                continue
            laps, watch = ring
            boards = [stage.device for stage in record.plan.stages]
            if any(map(self._coordinator.is_measuring, boards)):
                laps.drop()  # who measures himself is slower to answer
                continue
            gaps = laps.saw(counters.stage, counters.marks, self._clock(), counters.live)
            if gaps is None:
                continue
            self._coordinator.slow_links.used(boards, self._clock())
            change = watch.saw(gaps)
            LOG.debug("%s: gaps %s, %s", record.name, gaps, change)
            if change is not None:
                self._heed(boards, change)

    def tick(self) -> None:
        """Call every second or so."""
        coordinator = self._coordinator
        for device in coordinator.slow_links.tick(self._clock()):
            coordinator.note(notice("link-forgiven", device=device))
        profiles = coordinator.profiles()
        for device, profile in profiles.items():
            before = self._links.get(device)
            if before is not None and before != profile.link and coordinator.slow_links.measured_anew(device):
                coordinator.note(notice("link-as-measured", device=device))
            self._links[device] = profile.link
        self._links = {device: link for device, link in self._links.items() if device in profiles}
        names = {record.name for record in coordinator.records()}
        self._rings = {name: ring for name, ring in self._rings.items() if name in names}
        if self._asking is not None and self._asking.done():
            self._asking.result()
            self._asking = None

    def close(self) -> None:
        if self._asking is not None:
            self._asking.cancel()

    def _ring(self, record: DeploymentRecord) -> tuple[Laps, HopWatch] | None:
        plan = record.plan
        known = self._rings.get(record.name)
        if known is None or known[0] != plan.epoch:
            laps = laps_of(plan)
            if laps is None:
                return None
            known = self._rings[record.name] = (plan.epoch, laps, HopWatch([stage.hop_s for stage in plan.stages]))
        return known[1], known[2]

    def _heed(self, boards: Sequence[str], change: HopChange) -> None:
        suspects = {boards[board]: change.of(board) for board in (*change.boards, *change.unsure)}
        if sum(change.seconds) < 0:
            for board in change.boards:
                self._reckon(boards[board], suspects.pop(boards[board]))
        if suspects and self._asking is None:
            self._asking = asyncio.get_running_loop().create_task(self._ask(suspects, boards))

    async def _ask(self, unsure: dict[str, float], boards: Sequence[str]) -> None:
        """Find those of `unsure` whose round trip to the site's broker changed, too, more than that of the others."""
        found = await asyncio.gather(*(self._round_trips(device) for device in boards))
        trips = {device: pair for device, pair in zip(boards, found, strict=True) if pair is not None}
        ratios = {device: now_s / then_s for device, (now_s, then_s) in trips.items()}
        slower = sum(unsure.values()) > 0
        LOG.debug("asked for round trips, beside what was measured: %s", ratios)
        if not slower:
            # Those that are reckoned slow, and are not any more.
            for device, ratio in ratios.items():
                if device in unsure and self._coordinator.slow_links.times(device) > 1 and ratio < CHANGED:
                    self._reckon(device, unsure[device])
            return
        most = max(ratios.values(), default=0.0)
        alike = max(1.0, min(ratios.values(), default=1.0))  # by so much all of them are slower
        changed = [
            device
            for device, (now_s, then_s) in trips.items()
            if device in unsure
            and ratios[device] >= max(CHANGED * alike, BESIDE * most)
            and (now_s - then_s) / 2 >= PART * unsure[device]
        ]
        for device in changed:
            self._reckon(device, unsure[device])
        if not changed:
            self._coordinator.note(notice("way-slow", what=" and ".join(unsure), more_ms=1e3 * max(unsure.values())))

    async def _round_trips(self, device: str) -> tuple[float, float] | None:
        """A board's round trip to the site's broker now, and as it was measured; None if it does not say."""
        coordinator = self._coordinator
        link = _link_of(coordinator.profiles().get(device))
        if link is None:
            return None
        try:
            said = await coordinator.calls.call(
                device, "probe-ways", lambda: coordinator.is_online(device), ASK_TIMEOUT_S, brokers=[link.broker]
            )
        except CallFailed as error:
            LOG.info("%s", error.message)
            return None
        times = said.get("round_trip_s")
        seconds = times.get(link.broker) if isinstance(times, dict) else None
        if not isinstance(seconds, (int, float)) or not 0 < seconds < LONGEST_S:
            return None
        return float(seconds), max(1e-6, median(link.round_trip.samples_s))

    def _reckon(self, device: str, more_s: float) -> None:
        coordinator = self._coordinator
        link = _link_of(coordinator.profiles().get(device))
        crossing_s = one_way_s(link) if link is not None else None
        if crossing_s is None:
            return
        if not coordinator.slow_links.changed(device, more_s, crossing_s, self._clock(), time.time()):
            return
        slowed = coordinator.slow_links.of(device)
        if slowed is None:
            coordinator.note(notice("link-as-measured", device=device))
        else:
            coordinator.note(notice("link-slow" if more_s > 0 else "link-faster", device=device, what=slowed.because))
        self._changed(device, more_s > 0)


def _link_of(profile: Profile | None) -> LinkMeasurement | None:
    link = profile.link if profile is not None else None
    return link if isinstance(link, LinkMeasurement) and link.round_trip.samples_s else None
