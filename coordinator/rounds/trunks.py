"""Which board gets all blocks of a split model: of those that can hold them, the one that multiplies fastest."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from coordinator.rounds.bases import Base
from coordinator.rounds.job import Job
from coordinator.rounds.orders import AMPLE, without_torch
from coordinator.service import Coordinator
from hwprofiles.ceilings import best, best_of_blocks
from hwprofiles.profile import Profile
from hwprofiles.samples import Ceilings
from wire.units import bytes_text


class Found(NamedTuple):
    """`device` is '' where there is none; `unable` says why each of the others can't be it."""

    device: str
    because: str
    unable: Mapping[str, str]


def trunk_of(
    coordinator: Coordinator, job: Job, base: Base, with_data: Collection[str], passed_over: Collection[str] = ()
) -> Found:
    """The board for the blocks. It may have data, too: then it has both parts. Those that are `passed_over` get them
    where nobody else can."""
    can: dict[str, float] = {}
    unable: dict[str, str] = {job.trunk: "not heard of"} if job.trunk else {}
    least_bytes = base.trunk_bytes(job, ends_of(job, with_data), remember=False)
    profiles = coordinator.profiles()
    for device in coordinator.devices():
        if job.trunk and device.name != job.trunk:
            continue
        unable.pop(device.name, None)
        info = device.info
        needs_bytes = least_bytes + (base.ends_bytes(job) if device.name in with_data else 0)
        if info is None or not coordinator.is_online(device.name):
            unable[device.name] = "offline"
        elif not info.knows_split:
            unable[device.name] = f"its software, {info.software}, knows no split models"
        elif because := without_torch(info):
            unable[device.name] = because
        elif needs_bytes > info.memory_bytes:
            unable[device.name] = (
                f"would take {bytes_text(needs_bytes)} of its {bytes_text(info.memory_bytes)} of memory"
            )
        else:
            can[device.name] = product_rate(profiles.get(device.name)) or 0.0
    if not can:
        return Found("", "", unable)
    chosen = max(sorted(can), key=lambda name: (name not in passed_over, can[name]))
    if job.trunk:
        return Found(chosen, "the job names it", unable)
    those = f"{len(can)} that can hold the blocks"
    if not can[chosen]:
        return Found(chosen, f"the first of {those}: none has measured how fast it multiplies", unable)
    return Found(chosen, f"multiplies fastest of {those}: {can[chosen] / 1e9:.3g} GFLOP/s", unable)


def keeps_all(coordinator: Coordinator, job: Job, base: Base, trunk: str, with_data: Collection[str]) -> bool:
    """Whether the trunk's board has ample memory to keep what the gradients of all others need."""
    memory = next(
        (device.info.memory_bytes for device in coordinator.devices() if device.name == trunk and device.info), 0
    )
    beside = base.ends_bytes(job) if trunk in with_data else 0
    return base.trunk_bytes(job, ends_of(job, with_data), remember=True) + beside <= AMPLE * memory


def ends_of(job: Job, with_data: Collection[str]) -> int:
    """Boards that make a step together, at most."""
    return min(len(with_data), job.rounds.devices) if job.rounds.who != "all" else len(with_data)


def product_rate(profile: Profile | None) -> float | None:
    """Operations a second in products of float32 matrices; where those were not measured, as on virtual boards, the
    most that the board's blocks make; None where there are none either."""
    if profile is None:
        return None
    found = profile.ceilings
    rate = best(tuple(one for one in found.products if one.what == "f32")) if isinstance(found, Ceilings) else None
    return rate or best_of_blocks(profile.modules)
