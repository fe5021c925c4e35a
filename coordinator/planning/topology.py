"""Through which broker each stage is reached: the site's, or its own board's. Pure; docs/decisions/0007 has the why.

A message from board d to board e through the site's broker costs half of each one's round trip to it (see
coordinator.planning.cost). Through the broker of e it costs, by the same sum, half of d's round trip to that broker
(the way between them once, half of the broker) and half of e's own (the other half of the broker).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec

from coordinator.planning.plan import Plan, PlannedStage, Topology
from wire.units import seconds_text

TOPOLOGIES: Final[tuple[Topology, ...]] = ("auto", "central", "direct")

WORTH_MEASURING_S: Final = 0.001
"""A mean hop through the site's broker below which nothing is measured: it would save less than that."""

WORTH_GOING: Final = 0.9
"""A hop goes through a board's own broker by itself when it takes at most so much of the other way's time: measurements
differ by as much."""


class Way(NamedTuple):
    """From a board to the broker of another, or to its own."""

    device: str
    broker: str


RoundTrips = Mapping[Way, "float | str"]
"""Seconds, or in words why there are none."""


def hops_of(plan: Plan) -> list[tuple[str, str]]:
    """(sender, receiver) of each hop round the ring, in order of the sender's stage; empty for one stage."""
    devices = [stage.device for stage in plan.stages]
    return list(zip(devices, [*devices[1:], devices[0]], strict=True)) if len(devices) > 1 else []


def ways_of(plan: Plan, brokers: Mapping[str, str]) -> list[Way]:
    """What must be measured to know what a plan's hops take directly. `brokers`: device -> URL, '' if it has none."""
    found: list[Way] = []
    for sender, receiver in hops_of(plan):
        if sender != receiver and brokers.get(receiver):
            found += [Way(sender, brokers[receiver]), Way(receiver, brokers[receiver])]
    return list(dict.fromkeys(found))


def why_central(plan: Plan, wanted: Topology, brokers: Mapping[str, str]) -> str:
    """'' if the ways should be measured; else why the plan stays as it is."""
    if wanted == "central":
        return "as asked for"
    hops = hops_of(plan)
    if not ways_of(plan, brokers):
        return "no board has a broker of its own"
    mean_s = sum(stage.central_hop_s or stage.hop_s for stage in plan.stages) / max(1, len(hops))
    if wanted == "auto" and mean_s < WORTH_MEASURING_S:
        return f"a hop takes {seconds_text(mean_s)}, boards' own brokers can save no more"
    return ""


def is_straight(stage: PlannedStage, broker: str) -> bool:
    """Whether the plan was made with the measured way straight to the next board's own `broker`."""
    return bool(broker) and 0 < stage.hop_s < stage.central_hop_s


def shorter(direct_s: float, central_s: float) -> bool:
    """Whether a hop through the receiver's own broker is worth it."""
    return direct_s <= WORTH_GOING * central_s


def direct_hop_s(sender: str, receiver: str, brokers: Mapping[str, str], round_trips: RoundTrips) -> float | str:
    """Seconds of a hop through the receiver's own broker, or why that is no way."""
    broker = brokers.get(receiver, "")
    if not broker:
        return f"{receiver} has no broker of its own"
    there, own = round_trips.get(Way(sender, broker)), round_trips.get(Way(receiver, broker))
    if isinstance(there, str):
        return f"{sender} does not reach the broker of {receiver}: {there}"
    if isinstance(own, str):
        return f"{receiver} does not reach its own broker: {own}"
    if there is None or own is None:
        return f"the way from {sender} to {receiver} is not measured"
    return (there + own) / 2


def with_slow_links(
    round_trips: RoundTrips, brokers: Mapping[str, str], more_s: Callable[[str, str], float]
) -> RoundTrips:
    """The ways at what they take while links are slow: `more_s(one, other)` longer than measured, in each direction.
    What a board takes to its own broker crosses no link."""
    owners = {url: device for device, url in brokers.items() if url}
    return {
        way: seconds if isinstance(seconds, str) or way.device == owner else seconds + 2 * more_s(way.device, owner)
        for way, seconds in round_trips.items()
        for owner in (owners.get(way.broker, way.device),)
    }


def with_topology(plan: Plan, wanted: Topology, brokers: Mapping[str, str], round_trips: RoundTrips) -> Plan:
    """The plan with each inbox where it should be, its hops and its sum at that price, and the reason."""
    if not hops_of(plan):
        return plan
    because = why_central(plan, wanted, brokers)
    if because:
        return _said(_through_site(plan), f"Through the site's broker: {because}")
    hops: list[float] = []
    direct: list[bool] = []
    reasons: list[str] = []
    for stage, (sender, receiver) in zip(plan.stages, hops_of(plan), strict=True):
        if plan.runs == "items" and stage.head:
            hops.append(stage.hop_s)  # answers go to who asked, through the site's broker
            direct.append(False)
            continue
        straight = is_straight(stage, brokers.get(receiver, ""))
        found = stage.hop_s if straight else direct_hop_s(sender, receiver, brokers, round_trips)
        central_s = stage.central_hop_s or stage.hop_s
        if not isinstance(found, str) and wanted == "auto" and not shorter(found, central_s):
            found = f"{sender} to {receiver} takes {seconds_text(found)} instead of {seconds_text(central_s)}"
        hops.append(central_s if isinstance(found, str) else found)
        direct.append(not isinstance(found, str))
        if isinstance(found, str):
            reasons.append(found)
    unless = f"; {'; '.join(reasons)}" if reasons else ""
    if not any(direct):
        return _said(_through_site(plan), f"Through the site's broker: boards' own would gain nothing{unless}")
    through_site_s, direct_s = sum(stage.central_hop_s or stage.hop_s for stage in plan.stages), sum(hops)
    compared = f"all hops take {seconds_text(direct_s)} instead of {seconds_text(through_site_s)}"
    count = len(plan.stages)
    stages = []
    for number, stage in enumerate(plan.stages):
        # The hop into a stage is the one that leaves the stage before it.
        reached = direct[(number - 1) % count]
        inbox = msgspec.structs.replace(stage.inbox, broker=brokers[stage.device] if reached else "")
        central_s = stage.central_hop_s if direct[number] else 0.0
        stages.append(msgspec.structs.replace(stage, hop_s=hops[number], central_hop_s=central_s, inbox=inbox))
    return _said(
        msgspec.structs.replace(
            plan,
            topology="direct",
            stages=tuple(stages),
            predicted_token_s=plan.predicted_token_s - sum(stage.hop_s for stage in plan.stages) + direct_s,
        ),
        f"Through the boards' own brokers: {compared}{unless}",
    )


def _through_site(plan: Plan) -> Plan:
    """The plan at the price of the site's broker, where measured ways straight to boards' own were reckoned with."""
    more_s = sum(stage.central_hop_s - stage.hop_s for stage in plan.stages if stage.central_hop_s)
    stages = tuple(
        msgspec.structs.replace(stage, hop_s=stage.central_hop_s or stage.hop_s, central_hop_s=0.0)
        for stage in plan.stages
    )
    return msgspec.structs.replace(plan, stages=stages, predicted_token_s=plan.predicted_token_s + more_s)


def _said(plan: Plan, sentence: str) -> Plan:
    return msgspec.structs.replace(plan, because=f"{plan.because.rstrip('.')}. {sentence}.")
