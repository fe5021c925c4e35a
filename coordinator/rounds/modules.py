"""A job of several modalities, module by module: who has which, what is trained in a round, what comes of it. Pure.

A board has the connectors of the modalities that it owns, and the task module: these alone it is sent, and of them it
sends back what was trained. Each module is a group of its own: what becomes of it is made of the updates of those that
trained it, weighted by their samples of its modality; of the task module by all of their samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from coordinator.rounds.adapters import down_length, parts_of, spec_of
from coordinator.rounds.job import Job
from coordinator.rounds.store import JobRecord
from models.families.modalities import ModalitiesConfig
from models.lora.adapter import Config, flat, length_of, named, shapes
from models.lora.aggregate import mixed, shortened_to
from wire.errors import PeerError
from wire.messages import DeviceInfo, UpdateMeta
from wire.modalities import CONNECTOR, HEAD, Objective, connector_of, modules_of

Floats = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, int]]


def owned_by(job: Job, info: DeviceInfo) -> tuple[str, ...]:
    """Modalities of which a device has data that any job may use."""
    return tuple(
        name
        for name, one in sorted(job.modalities.items())
        if one.data in info.data and one.data not in info.private_data
    )


def objectives_of(job: Job, number: int, device: str, owned: Sequence[str]) -> tuple[Objective, ...]:
    """What a device with these modalities trains in a round, and for what; nothing, if nothing is planned for it."""
    mine = (*map(connector_of, sorted(owned)), HEAD)
    if not job.plan:
        return (Objective(modules=mine, objective="task"),)
    found = []
    for planned in job.plan:
        modules = tuple(module for module in mine if module in planned.modules)
        if modules and planned.at(number) and (not planned.devices or device in planned.devices):
            found.append(Objective(modules=modules, objective=planned.objective))
    return tuple(found)


def trained_by(job: Job, number: int, device: str, owned: Sequence[str]) -> bool:
    """Whether a device has something to train in a round; it has always, unless there is a plan."""
    return not job.plan or bool(objectives_of(job, number, device, owned))


def held_by(config: Config, record: JobRecord, device: str) -> Shapes:
    """The factors that a device has, by name."""
    mine = config.of(record.owns[device]) if isinstance(config, ModalitiesConfig) else config
    return shapes(mine, spec_of(record.job, device))


def parts_by(record: JobRecord, number: int, device: str) -> tuple[str, ...]:
    """Which of them it trains and sends back."""
    job = record.job
    if not job.modalities:
        return parts_of(job, number)
    return modules_of(objectives_of(job, number, device, record.owns[device]))


def lengths_of(config: Config, record: JobRecord, number: int, device: str, factors: int) -> tuple[int, int]:
    """Numbers that go to a device in a round, of so many of the job's factors, and come from it."""
    shaped = held_by(config, record, device)
    down = length_of(shaped) if record.job.modalities else down_length(config, record.job, device, factors)
    return down, length_of(shaped, parts_by(record, number, device))


def taken_of(config: Config, record: JobRecord, device: str, factors: Floats) -> Floats:
    """What a device is sent of the job's factors."""
    return flat(named(factors, shapes(config, spec_of(record.job))), held_by(config, record, device))


def check_told(meta: UpdateMeta, owned: Sequence[str]) -> None:
    """Raise PeerError for an update that says of modalities what can't be."""
    if set(meta.by_modality) != set(owned):
        said = ", ".join(sorted(meta.by_modality)) or "none"
        raise PeerError(f"is of modalities {said}, {', '.join(owned)} were due")
    if sum(told.samples for told in meta.by_modality.values()) != meta.samples:
        raise PeerError(f"has other samples of modalities than {meta.samples} in all")
    if sum(told.held_out_count for told in meta.by_modality.values()) != meta.held_out_count:
        raise PeerError(f"has other held-out labels of modalities than {meta.held_out_count} in all")


def grouped(
    config: Config, record: JobRecord, number: int, start: Floats, updates: Sequence[tuple[UpdateMeta, Floats]]
) -> Floats:
    """What the factors become by the updates, which hold the modules that were trained: the same bits in whatever
    order. A module that nobody trained, or of whose modality nobody has samples to train on, stays as it was."""
    shaped = shapes(config, spec_of(record.job))
    found = dict(named(start, shaped))
    sent_in = [
        (meta, named(vector, held_by(config, record, meta.device), parts_by(record, number, meta.device)))
        for meta, vector in sorted(updates, key=lambda one: one[0].device)
    ]
    for name, before in found.items():
        group = [
            (weight, factors[name])
            for meta, factors in sent_in
            if name in factors and (weight := _weight(meta, name[:-2])) > 0
        ]
        if not group:
            continue
        matrices = [matrix for _, matrix in group]
        if record.job.rounds.most_change is not None:
            changes = shortened_to(record.job.rounds.most_change, [matrix - before for matrix in matrices])
            matrices = [before + change for change in changes]
        found[name] = mixed(matrices, [weight for weight, _ in group], record.job.rounds.middle)
    return flat(found, shaped)


def _weight(meta: UpdateMeta, module: str) -> int:
    if module.startswith(CONNECTOR):
        return meta.by_modality[module.removeprefix(CONNECTOR)].samples
    return meta.samples
