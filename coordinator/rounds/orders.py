"""What boards are told of a job: the whole model as one stage, and what to do in its rounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

import msgspec

from coordinator.rounds.adapters import spec_of
from coordinator.rounds.bases import Base
from coordinator.rounds.job import Job
from coordinator.rounds.store import JobRecord, topic_name
from coordinator.service import Coordinator
from wire import topics
from wire.limits import MAX_DEVICES
from wire.messages import ArtifactRef, InboxAddress, StageOrder, TrainingTask
from wire.units import bytes_text

AMPLE: Final = 0.7
"""Of a board's memory: other programs want some, too."""


class Way(NamedTuple):
    """How a board trains: wire.messages.TrainingTask says what these are."""

    remember: bool
    rows_at_once: int


def make_orders(
    site: str,
    record: JobRecord,
    able: Collection[str],
    base: Base,
    task: TrainingTask,
    graph: ArtifactRef,
    weights: tuple[ArtifactRef, ...],
    ways: Mapping[str, Way],
) -> dict[str, tuple[StageOrder, ...]]:
    """The orders of all boards that have one, and of those that can take part now. Who has a number keeps it."""
    stages = {device: order.stage for device, (order,) in record.orders.items()}
    for device in sorted(able):
        stages.setdefault(device, max(stages.values(), default=-1) + 1)
    deployment, config = topic_name(record.name), base.config
    orders: dict[str, tuple[StageOrder, ...]] = {}
    for device, stage in sorted(stages.items()):
        inbox = InboxAddress(topic=topics.INBOX.on(site, deployment, str(stage)))
        order = StageOrder(
            deployment=deployment,
            epoch=record.epoch,
            stage=stage,
            stages=MAX_DEVICES,  # whoever comes later changes nothing of the others' orders
            model=record.job.model,
            engine="torch",
            graph=graph,
            weights=weights,
            embedding=True,
            head=True,
            first_block=0,
            end_block=config.blocks,
            hidden=config.hidden,
            vocabulary=config.vocabulary,
            wire_dtype=base.wire_dtype,  # type: ignore[arg-type]
            context_tokens=max(2, record.job.rounds.row_tokens),
            slots=1,
            prefill_chunk_tokens=2,
            inbox=inbox,
            next=inbox,
            config=msgspec.json.encode(config).decode(),
            runs="rounds",
            training=msgspec.structs.replace(
                task,
                rank=record.job.adapter.rank_of(device),
                alpha=spec_of(record.job, device).alpha,
                remember=ways[device].remember if device in ways else True,
                rows_at_once=ways[device].rows_at_once if device in ways else rows_at_once(record.job),
            ),
        )
        orders[device] = (order,)
    return orders


def task_of(job: Job, tokenizer: ArtifactRef, end_id: int | None) -> TrainingTask:
    """What a board of the adapter's rank does in each round."""
    rounds = job.rounds
    return TrainingTask(
        data=job.data,
        tokenizer=tokenizer,
        end_id=end_id,
        rank=job.adapter.rank,
        alpha=job.adapter.scale_alpha,
        matrices=job.adapter.matrices,
        row_tokens=rounds.row_tokens,
        batch_rows=rounds.batch_rows,
        steps=rounds.steps,
        learning_rate=rounds.learning_rate,
        most_norm=rounds.most_norm,
        held_out=rounds.held_out,
        seed=job.seed,
        rounds=rounds.count,
        privacy=job.privacy,
        labels=job.labels,
    )


def able_devices(coordinator: Coordinator, job: Job, base: Base) -> tuple[tuple[str, ...], dict[str, str]]:
    """Boards that can take part, and why others can't."""
    able: list[str] = []
    unable: dict[str, str] = dict.fromkeys(job.devices, "not heard of")
    for device in coordinator.devices():
        if job.devices and device.name not in job.devices:
            continue
        info = device.info
        torch = next((engine for engine in info.engines if engine.name == "torch"), None) if info is not None else None
        unable.pop(device.name, None)
        if info is None or not coordinator.is_online(device.name):
            unable[device.name] = "offline"
        elif job.data not in info.data:
            unable[device.name] = f"has no data {job.data!r}"
        elif job.data in info.private_data and (job.privacy is None or job.privacy.losses):
            unable[device.name] = "its data are for private jobs alone, without losses"
        elif job.privacy is not None and not info.knows_privacy:
            unable[device.name] = f"its software, {info.software}, knows no private jobs"
        elif torch is None or not torch.version:
            unable[device.name] = f"no torch: {torch.because if torch is not None else 'not looked for'}"
        elif (least := base.peak_bytes(job, device.name, 1, remember=False)) > info.memory_bytes:
            unable[device.name] = (
                f"would take {bytes_text(least)} of its {bytes_text(info.memory_bytes)} of memory;"
                " fewer rounds.row_tokens need less"
            )
        else:
            able.append(device.name)
    return tuple(sorted(able)), unable


def rows_at_once(job: Job) -> int:
    """Samples whose gradients are made at one time, where memory is no matter."""
    if job.privacy is not None and job.privacy.unit == "sample":
        return 1
    return min(job.rounds.batch_rows, job.rounds.rows_at_once or job.rounds.batch_rows)


def ways_of(coordinator: Coordinator, job: Job, devices: Collection[str], base: Base) -> dict[str, Way]:
    """How each board can train in its memory: all of a batch at once, keeping what gradients need, if that is ample;
    else computing it again; else with fewer samples at once, since the weights are expanded for each piece anew."""
    memory = {device.name: device.info.memory_bytes for device in coordinator.devices() if device.info is not None}
    found = {}
    for device in set(devices) & memory.keys():
        way = Way(remember=True, rows_at_once=rows_at_once(job))
        if base.peak_bytes(job, device, way.rows_at_once, way.remember) > AMPLE * memory[device]:
            way = way._replace(remember=False)
            while way.rows_at_once > 1 and base.peak_bytes(job, device, way.rows_at_once, False) > memory[device]:
                way = way._replace(rows_at_once=-(-way.rows_at_once // 2))
        found[device] = way
    return found
