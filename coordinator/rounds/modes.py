"""Mode 'auto': whether boards train the whole model each, or its ends alone with the blocks on one of them.

A model that boards with data can't hold is split. One that all can hold is split where a round of all together is
foretold to take clearly less time than one of the slowest of them, by how fast boards multiply and send, as their
profiles say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from coordinator.rounds.adapters import spec_of
from coordinator.rounds.bases import Base
from coordinator.rounds.contradictions import against_split
from coordinator.rounds.cutting import Cut, step_s
from coordinator.rounds.job import Job
from coordinator.rounds.offers import link_rate
from coordinator.rounds.orders import able_devices, states_bytes
from coordinator.rounds.trunks import operations_of, product_rate, trunk_of
from coordinator.service import Coordinator
from hwprofiles.profile import Profile
from models.lora.adapter import length_of, shapes
from wire.units import seconds_text

CLEARLY: Final = 0.8
"""Of the other's time: what is not clearly less sends no states over the network."""


def settled_mode(coordinator: Coordinator, job: Job, base: Base) -> tuple[Job, str]:
    """The job with a mode, and why; the reason is '' where the job says its mode."""
    if job.mode != "auto":
        return job, ""
    whole = msgspec.structs.replace(job, mode="federated", trunk="")
    parts = msgspec.structs.replace(job, mode="split")
    problems = against_split(parts)
    if problems:
        return whole, f"federated: {problems[0]}"
    can_whole, unable = able_devices(coordinator, whole, base)
    can_ends, _ = able_devices(coordinator, parts, base)
    found = trunk_of(coordinator, parts, base, can_ends)
    if not found.cuts:
        return whole, "federated: no boards can have the blocks"
    small = sorted(set(can_ends) - set(can_whole))
    if small:
        first = f"{small[0]} {unable[small[0]]}"
        return parts, f"split: {len(small)} of {len(can_ends)} boards with data can't hold the model ({first})"
    profiles, all_can = coordinator.profiles(), "federated: all boards with data can hold the model"
    apart_s = federated_s(base, whole, profiles, can_whole)
    together_s = split_s(base, parts, profiles, can_ends, found.cuts)
    if apart_s is None or together_s is None:
        return whole, f"{all_can}, and of some it was not measured how fast they are"
    times = f"a round is foretold to take {seconds_text(together_s)} split, {seconds_text(apart_s)} federated"
    if together_s < CLEARLY * apart_s:
        return parts, f"split: {times}"
    return whole, f"{all_can}, and {times}"


def federated_s(base: Base, job: Job, profiles: Mapping[str, Profile], devices: Collection[str]) -> float | None:
    """What a round is foretold to take at most, computing and sending factors both ways; None where some board's rates
    are not known."""
    sent_bytes = 8 * length_of(shapes(base.config, spec_of(job)))
    found = []
    for device in devices:
        rate, link = _rates(profiles.get(device))
        if not rate or not link:
            return None
        found.append(job.rounds.steps * operations_of(base, job) / rate + sent_bytes / link)
    return max(found, default=None)


def split_s(
    base: Base, job: Job, profiles: Mapping[str, Profile], devices: Collection[str], cuts: Sequence[Cut]
) -> float | None:
    """The same of a split model: the trunk computes for all of them, and they send states and gradients."""
    links = [_rates(profiles.get(device))[1] for device in devices]
    trunk = [(one.blocks / base.config.blocks, *_rates(profiles.get(one.device))) for one in cuts]
    if not all(rate and link for _, rate, link in trunk) or not all(links) or not devices:
        return None
    one_way_bytes = states_bytes(base, job)
    compute_s = [share * operations_of(base, job) / rate for share, rate, _ in trunk]
    hop_s = [one_way_bytes / link for _, _, link in trunk]
    return job.rounds.steps * (step_s(compute_s, hop_s, len(devices)) + 2 * one_way_bytes / min(links))


def _rates(profile: Profile | None) -> tuple[float, float]:
    """Operations/s and bytes/s; 0 for what was not measured."""
    return product_rate(profile) or 0.0, link_rate(profile) or 0.0
