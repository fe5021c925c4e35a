"""What boards are told of a job: the whole model as one stage, or its parts, and what to do in its rounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

import msgspec

from coordinator.rounds.adapters import most_held, parts_of, spec_of
from coordinator.rounds.bases import Base, Part
from coordinator.rounds.job import COUNTED, Job
from coordinator.rounds.modules import owned_by
from coordinator.rounds.store import JobRecord, topic_name
from coordinator.service import Coordinator
from models.lora.adapter import length_of, shapes
from wire import topics
from wire.errors import UsageError
from wire.limits import MAX_DEVICES, MAX_ENDS, MAX_PARTIAL_BYTES, MAX_SEGMENTS, MAX_TENSOR_BYTES
from wire.messages import ArtifactRef, DeviceInfo, InboxAddress, Role, StageOrder, TrainingTask
from wire.modalities import Connected, Owned
from wire.units import bytes_text

TRUNK: Final = "the trunk"
"""Among boards, none of which can be called so."""


HUB: Final = "the hub"
"""The same, before the shards."""


def trunk_names(segments: int, looped: bool = False) -> tuple[str, ...]:
    """As which those who have the blocks count in a round, in their order."""
    if looped:
        return (HUB, *(f"shard {number + 1}" for number in range(segments - 1)))
    return (TRUNK,) if segments == 1 else tuple(f"{TRUNK}, part {number + 1}" for number in range(segments))


AMPLE: Final = 0.7
"""Of a board's memory: other programs want some, too."""


class Way(NamedTuple):
    """How a board trains: wire.messages.TrainingTask says what these are."""

    remember: bool
    rows_at_once: int


class Placed(NamedTuple):
    """A part of the model as boards fetch it."""

    part: Part
    graph: ArtifactRef
    weights: tuple[ArtifactRef, ...]


PartName = tuple[Role, int]
"""A role, and the first block of a segment."""


def make_orders(
    site: str,
    record: JobRecord,
    able: Collection[str],
    base: Base,
    task: TrainingTask,
    placed: Mapping[PartName, Placed],
    ways: Mapping[str, Way],
    nets: Mapping[str, Placed] = {},
    anchors: ArtifactRef | None = None,
) -> dict[str, tuple[StageOrder, ...]]:
    """The orders of all boards that have one, and of those that can take part now; and those of the trunk, if the model
    is split. Who has a number keeps it. `nets`: that make features, by modality; `anchors`:
    of labels in their space."""
    job = record.job
    stages = {device: order.stage for device, order in record.with_data.items()}
    for device in sorted(able):
        stages.setdefault(device, max(stages.values(), default=-1) + 1)
    role: Role = "whole" if job.mode == "federated" else "ends"
    orders: dict[str, tuple[StageOrder, ...]] = {}
    for device, stage in sorted(stages.items()):
        way = ways.get(device, Way(True, rows_at_once(job)))
        mine = msgspec.structs.replace(
            task, role=role, rank=job.adapter.rank_of(device), alpha=spec_of(job, device).alpha, **way._asdict()
        )
        mine, its_files = _of_modalities(record, device, mine, nets, anchors)
        whole = placed[role, 0]
        its_own = whole._replace(weights=(*whole.weights, *its_files))
        orders[device] = (_order(site, record, base.of(record.owns.get(device, ())), its_own, stage, mine),)
    for name, at in zip(trunk_names(len(record.trunk), job.mode == "looped"), record.trunk, strict=True):
        mine = msgspec.structs.replace(task, role=at.role, remember=ways[name].remember, share=at.share)
        order = _order(site, record, base, placed[at.role, at.first_block], at.stage, mine)
        orders[at.device] = (*orders.get(at.device, ()), order)
    return orders


def _of_modalities(
    record: JobRecord, device: str, task: TrainingTask, nets: Mapping[str, Placed], anchors: ArtifactRef | None
) -> tuple[TrainingTask, tuple[ArtifactRef, ...]]:
    """What a device does with the modalities that it owns, and the files that it needs for that."""
    job = record.job
    if not job.modalities:
        return task, ()
    files: dict[str, ArtifactRef] = {}
    modalities: dict[str, Owned] = {}
    for name in record.owns[device]:
        one, net = job.modalities[name], nets.get(name)
        refs = () if net is None else (net.graph, *net.weights)
        files.update({ref.digest: ref for ref in refs})
        modalities[name] = Owned(
            data=one.data,
            series=one.series,
            images=one.images,
            graph=None if net is None else net.graph.digest,
            weights=() if net is None else tuple(ref.digest for ref in net.weights),
        )
    first = job.modalities[record.owns[device][0]].data
    files.update({} if anchors is None else {anchors.digest: anchors})
    connected = Connected(
        width=job.space.width,
        modalities=modalities,
        anchors=None if anchors is None else anchors.digest,
        temperature=job.space.temperature,
    )
    return msgspec.structs.replace(task, data=first, connected=connected), tuple(files.values())


def _order(site: str, record: JobRecord, base: Base, placed: Placed, stage: int, task: TrainingTask) -> StageOrder:
    deployment, config, part = topic_name(record.name), base.config, placed.part
    inbox = InboxAddress(topic=topics.INBOX.on(site, deployment, str(stage)))
    return StageOrder(
        deployment=deployment,
        epoch=record.epoch,
        stage=stage,
        stages=MAX_DEVICES,  # whoever comes later changes nothing of the others' orders
        model=record.job.model,
        engine="torch",
        graph=placed.graph,
        weights=placed.weights,
        embedding=part.ends,
        head=part.ends,
        first_block=part.first_block,
        end_block=part.end_block,
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
        training=task,
    )


def task_of(job: Job, tokenizer: ArtifactRef | None, end_id: int | None) -> TrainingTask:
    """What a board of the adapter's rank does in each round."""
    rounds = job.rounds
    return TrainingTask(
        data=job.data_sets[0],
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
        series=job.series,
        images=job.images,
        refuse_bad_rows=job.bad_rows == "refuse",
        blocks=job.train == "blocks",
        last_only=job.adapter.blocks == "last",
        uplink_grad=job.uplink_grad,
        secure=job.secure,
        begins=job.begins,
    )


def able_devices(coordinator: Coordinator, job: Job, base: Base) -> tuple[tuple[str, ...], dict[str, str]]:
    """Boards that can take part, and why others can't."""
    able: list[str] = []
    unable: dict[str, str] = dict.fromkeys(job.devices, "not heard of")
    for device in coordinator.devices():
        if job.devices and device.name not in job.devices:
            continue
        info = device.info
        unable.pop(device.name, None)
        if info is None or not coordinator.is_online(device.name):
            unable[device.name] = "offline"
        elif not (there := set(job.data_sets) & set(info.data)):
            unable[device.name] = f"has no data {' or '.join(map(repr, job.data_sets))}"
        elif there <= set(info.private_data) and (job.privacy is None or job.privacy.losses):
            unable[device.name] = "its data are for private jobs alone, without losses"
        elif job.data in info.private_data and job.is_split and job.data not in info.told_states:
            unable[device.name] = "states of its data, which no noise covers, are not to leave it"
        elif job.is_split and not info.knows_split:
            unable[device.name] = f"its software, {info.software}, knows no split models"
        elif job.on_features and not info.knows_features:
            unable[device.name] = f"its software, {info.software}, knows samples that are texts alone"
        elif job.modalities and not info.knows_modalities:
            unable[device.name] = f"its software, {info.software}, knows samples of one kind alone"
        elif job.privacy is not None and not info.knows_privacy:
            unable[device.name] = f"its software, {info.software}, knows no private jobs"
        elif job.privacy is not None and job.is_split and not info.knows_private_split:
            unable[device.name] = f"its software, {info.software}, knows no private jobs of split models"
        elif job.secure and not info.knows_secure:
            unable[device.name] = (
                f"its software, {info.software}, can't mask updates; pip install 'edgelam[train]' there may help"
            )
        elif job.begins != "shared" and not info.knows_own:
            unable[device.name] = f"its software, {info.software}, knows no aggregation {job.rounds.aggregation}"
        elif because := without_torch(info):
            unable[device.name] = because
        elif (least := least_bytes(base.of(owned_by(job, info)), job, device.name)) > info.memory_bytes:
            unable[device.name] = (
                f"would take {bytes_text(least)} of its {bytes_text(info.memory_bytes)} of memory;"
                " fewer rounds.row_tokens need less"
            )
        else:
            able.append(device.name)
    return tuple(sorted(able)), unable


def check_messages(base: Base, job: Job, boards: int) -> None:
    """Raise UsageError where what so many boards send at one time would be more than messages may hold."""
    at_once = min(boards, job.rounds.devices) if job.rounds.who in COUNTED else boards
    if job.is_split:
        at_once = min(at_once, MAX_ENDS)
    most = min(MAX_TENSOR_BYTES, MAX_PARTIAL_BYTES // at_once)
    if job.mode == "looped":  # backwards a state goes with its gradient, and each shard sends its part of the sum
        most = min(MAX_TENSOR_BYTES // 2, MAX_PARTIAL_BYTES // (at_once + MAX_SEGMENTS))
    shaped = shapes(base.config, spec_of(job))
    adapter = 4 * length_of(shaped)
    if job.mode == "federated":
        adapter = adapter if job.begins != "own-b" else 4 * length_of(shaped, parts_of(job, 0))
        held = 4 * most_held(base.config, job)
        if held > MAX_TENSOR_BYTES:
            raise UsageError(
                f"factors of rank {job.adapter.most_rank}, {bytes_text(held)}: {bytes_text(MAX_TENSOR_BYTES)} at most",
                try_="a smaller adapter.most_rank, or fewer adapter.matrices",
            )
        if adapter > most:
            raise UsageError(
                f"an adapter of {bytes_text(adapter)} on {at_once} boards at once: {bytes_text(most)} at most",
                try_="a smaller adapter.rank, fewer adapter.matrices, or fewer rounds.devices with rounds.who",
            )
        return
    if job.rounds.who in COUNTED and job.rounds.devices > MAX_ENDS:
        raise UsageError(
            f"rounds.devices: {job.rounds.devices} boards with one trunk, {MAX_ENDS} at most", try_="fewer of them"
        )
    if adapter > MAX_TENSOR_BYTES:
        raise UsageError(
            f"an adapter of {bytes_text(adapter)}: {bytes_text(MAX_TENSOR_BYTES)} at most",
            try_="a smaller adapter.rank, or fewer adapter.matrices",
        )
    if (states := states_bytes(base, job)) > most:
        raise UsageError(
            f"a batch's states are up to {bytes_text(states)}, of {at_once} boards at once: {bytes_text(most)} at most",
            try_="a smaller rounds.batch_rows or rounds.row_tokens",
        )


def states_bytes(base: Base, job: Job) -> int:
    """The most that a board of a split job, or its trunk, sends at one time."""
    rounds, shaped, width = job.rounds, shapes(base.config, spec_of(job)), base.config.hidden
    behind = length_of(shaped, ("c",))
    if job.uplink_grad == "lowrank":
        width, behind = width + job.adapter.rank, length_of(shaped, ("b",))
    return 4 * (job.step_rows * rounds.row_tokens * width + behind)


def most_ends(base: Base, job: Job) -> int:
    """Boards with data that one trunk can work with."""
    shards = MAX_SEGMENTS if job.mode == "looped" else 0  # that send a hub as much as boards with data do
    return max(1, min(MAX_ENDS, MAX_PARTIAL_BYTES // states_bytes(base, job) - shards))


def without_torch(info: DeviceInfo) -> str:
    """Why a board can't train at all; '' if it can."""
    torch = next((engine for engine in info.engines if engine.name == "torch"), None)
    if torch is not None and torch.version:
        return ""
    return f"no torch: {torch.because if torch is not None else 'not looked for'}"


def least_bytes(base: Base, job: Job, device: str) -> int:
    """What a board with data takes at its peak, trained as sparingly as can be."""
    return base.ends_bytes(job) if job.is_split else base.peak_bytes(job, device, 1, remember=False)


def rows_at_once(job: Job) -> int:
    """Samples whose gradients are made at one time, where memory is no matter."""
    if job.privacy is not None and job.privacy.unit == "sample":
        return 1
    return min(job.rounds.batch_rows, job.rounds.rows_at_once or job.rounds.batch_rows)


def ways_of(coordinator: Coordinator, job: Job, devices: Collection[str], base: Base) -> dict[str, Way]:
    """How each board can train in its memory: all of a batch at once, keeping what gradients need, if that is ample;
    else computing it again; else with fewer samples at once, since the weights are expanded for each piece anew."""
    infos = {device.name: device.info for device in coordinator.devices() if device.info is not None}
    found: dict[str, Way] = {}
    for device in set(devices) & infos.keys() if job.mode == "federated" else ():
        memory_bytes, mine = infos[device].memory_bytes, base.of(owned_by(job, infos[device]))
        way = Way(remember=True, rows_at_once=rows_at_once(job))
        if mine.peak_bytes(job, device, way.rows_at_once, way.remember) > AMPLE * memory_bytes:
            way = way._replace(remember=False)
            while way.rows_at_once > 1 and mine.peak_bytes(job, device, way.rows_at_once, False) > memory_bytes:
                way = way._replace(rows_at_once=-(-way.rows_at_once // 2))
        found[device] = way
    return found


def way_of(order: StageOrder) -> Way:
    """How a board was told to train."""
    assert order.training is not None
    return Way(order.training.remember, order.training.rows_at_once)
