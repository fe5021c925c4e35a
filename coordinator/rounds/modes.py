"""Mode 'auto': whether boards train the whole model each, or its ends alone, with the blocks on one of them or several.

A model that boards with data can't hold is split. Of the modes that are possible a simpler one is taken, unless a round
is foretold to take clearly less time with another, by how fast boards multiply and send, as their profiles say. Mode
'looped' is never taken: it makes another model of it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal

import msgspec

from coordinator.rounds.bases import Base
from coordinator.rounds.contradictions import against_split
from coordinator.rounds.foretold import federated_s, rates_of, split_s
from coordinator.rounds.job import Job
from coordinator.rounds.orders import able_devices, ways_of
from coordinator.rounds.trunks import Found, keeps_all, trunk_of
from coordinator.service import Coordinator
from wire.units import seconds_text

CLEARLY: Final = 0.8
"""Of the other's time: what is not clearly less sends no states over the network, or has no more boards wait."""

Mode = Literal["federated", "split", "pipeline"]


def settled_mode(coordinator: Coordinator, job: Job, base: Base) -> tuple[Job, str]:
    """The job with a mode, and why; the reason is '' where the job says its mode."""
    if job.mode != "auto":
        return job, ""
    whole = msgspec.structs.replace(job, mode="federated", trunk="")
    split = msgspec.structs.replace(job, mode="split")
    if problems := against_split(split):
        return whole, f"federated: {problems[0]}"
    can_whole, unable = able_devices(coordinator, whole, base)
    can_ends, _ = able_devices(coordinator, split, base)
    modes: dict[Mode, Job] = {"split": split}
    if not job.trunks:  # boards that are named have the blocks, one or several, with 'split', too
        modes["pipeline"] = msgspec.structs.replace(job, mode="pipeline")
    trunks = {mode: trunk_of(coordinator, one, base, can_ends) for mode, one in modes.items()}
    if not trunks["split"].cuts:
        return whole, "federated: no boards can have the blocks"
    small = sorted(set(can_ends) - set(can_whole))
    if small:
        because = f"{len(small)} of {len(can_ends)} boards with data can't hold the model"
        because += f" ({small[0]} {unable[small[0]]})"
    else:
        modes = {"federated": whole, **modes}
        because = "all boards with data can hold the model"
    times = {
        mode: _foretold_s(coordinator, one, base, can_ends, trunks.get(mode))
        for mode, one in modes.items()
        if mode == "federated" or trunks[mode].cuts
    }
    taken = chosen(times)
    return modes[taken], f"{taken}: {because}, and {_times_text(times)}"


def chosen(times: Mapping[Mode, float | None]) -> Mode:
    """Of modes that are possible, the simplest first: one that is clearly faster than what would be taken else. Where a
    time is not known nothing is taken for it."""
    taken, *others = times
    for other in others:
        other_s, taken_s = times[other], times[taken]
        if other_s is not None and taken_s is not None and other_s < CLEARLY * taken_s:
            taken = other
    return taken


def _foretold_s(
    coordinator: Coordinator, job: Job, base: Base, devices: Collection[str], trunk: Found | None
) -> float | None:
    profiles = coordinator.profiles()
    rates = {device.name: rates_of(profiles.get(device.name)) for device in coordinator.devices()}
    if trunk is None:
        again = {device for device, way in ways_of(coordinator, job, devices, base).items() if not way.remember}
        return federated_s(base, job, rates, devices, again)
    again = {one.device for one in trunk.cuts if not keeps_all(coordinator, job, base, one, devices)}
    return split_s(base, job, rates, devices, trunk.cuts, again)


def _times_text(times: Mapping[Mode, float | None]) -> str:
    known = [f"{seconds_text(taken_s)} {mode}" for mode, taken_s in times.items() if taken_s is not None]
    if len(known) == len(times):
        return f"a round is foretold to take {', '.join(known)}"
    lacks = "of some it was not measured how fast they are"
    return f"{lacks}; a round is foretold to take {', '.join(known)}" if known else lacks
