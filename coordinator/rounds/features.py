"""What a job trains that has other samples than texts: a task module on features that boards compute of these once, and
connectors before it where they are of several modalities."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping

import msgspec

from coordinator.operations import Operations
from coordinator.rounds.anchors import anchors_of
from coordinator.rounds.bases import Base, Part, base_of
from coordinator.rounds.job import Job, Modality
from coordinator.shelf import Prepared
from models.families.features import FeatureConfig
from models.families.modalities import ModalitiesConfig
from models.items.features import FeaturesPart, features_part, features_tensor
from models.items.pack import PackedItems
from models.training.features import AT_ONCE
from models.training.kernels import FLOAT, VERSION, WORKING_BYTES, working_bytes
from models.training.memory import NET_BYTES, NET_COPIES, PIXEL_BYTES, TENSOR_COPIES
from wire.errors import UsageError
from wire.samples import Images, Series


async def base_for(operations: Operations, job: Job, say: Callable[[str], None]) -> Base:
    """Raises what packing a model and `base_of` raise."""
    if job.modalities:
        bases = {name: await _one_of(operations, job, one, say) for name, one in _each(job)}
        if not job.space.anchors:
            return modalities_base(job, bases)
        prepared = await operations.preparing.prepare(job.space.anchors, job.precision, say)
        anchors = await asyncio.to_thread(anchors_of, prepared, job.labels, job.space.width, job.seed)
        return modalities_base(job, bases, anchors.astype("<f4").tobytes())
    if job.series is not None:
        return series_base(job.series, job.seed)
    prepared = await operations.preparing.prepare(job.model, job.precision, say)
    if job.images is not None:
        return await asyncio.to_thread(images_base, prepared, job.name, job.model, job.images)
    return await asyncio.to_thread(base_of, prepared, job)


def modalities_base(job: Job, bases: Mapping[str, Base], anchors: bytes = b"") -> Base:
    """Connectors from the features of each modality, and a task module."""
    config = ModalitiesConfig(
        width=job.space.width, features={name: base.config.hidden for name, base in sorted(bases.items())}
    )
    told = msgspec.json.encode(config)
    made = hashlib.sha256(told)
    for name, base in sorted(bases.items()):
        made.update(f"/{name}/{base.digest}".encode())
    made.update(anchors)
    return Base(
        config=config,
        parts={"whole": Part(graph=told, files={}, ends=True, end_block=0)},
        tokenizer=b"",
        digest=f"sha256:{made.hexdigest()}",
        end_id=None,
        wire_dtype="f32",
        modalities=bases,
        anchors=anchors,
    )


def _each(job: Job) -> list[tuple[str, Modality]]:
    return sorted(job.modalities.items())


async def _one_of(operations: Operations, job: Job, one: Modality, say: Callable[[str], None]) -> Base:
    if one.series is not None:
        return series_base(one.series, job.seed)
    assert one.images is not None, "coordinator.rounds.contradictions asks for one of both"
    prepared = await operations.preparing.prepare(one.model, job.precision, say)
    return await asyncio.to_thread(images_base, prepared, job.name, one.model, one.images)


def images_base(prepared: Prepared, job: str, model: str, images: Images) -> Base:
    """The net as far as the features. Raises UsageError for one that takes no pictures, or has no such tensor."""
    packed = prepared.packed
    try:
        if not isinstance(packed, PackedItems):
            raise ValueError(f"model: {model} takes no pictures")
        found = features_part(packed, features_tensor(model, images))
    except ValueError as error:
        raise UsageError(f"job {job}: {error}", try_="docs/tuning.md, labels of pictures") from None
    part = Part(graph=found.graph, files=found.files, ends=True, end_block=0)
    return Base(
        config=FeatureConfig(hidden=found.hidden),
        parts={"whole": part},
        tokenizer=b"",
        digest=found.digest,
        end_id=None,
        wire_dtype="f32",
        most_samples=images.most_images,
        working_bytes=net_working_bytes(found, images),
    )


def net_working_bytes(part: FeaturesPart, images: Images) -> int:
    """What it takes to make features of pictures."""
    weights = sum(path.stat().st_size for path in part.files.values())
    net = NET_BYTES + NET_COPIES * weights + TENSOR_COPIES * part.widest_bytes
    return net + PIXEL_BYTES * images.most_pixels


def series_base(series: Series, seed: int) -> Base:
    """Boards make the kernels of the seed, so there are no files."""
    told, columns = msgspec.json.encode(series), len(series.columns)
    one = working_bytes(columns, series.window, series.kernels)
    return Base(
        config=FeatureConfig(hidden=series.kernels),
        parts={"whole": Part(graph=told, files={}, ends=True, end_block=0)},
        tokenizer=b"",
        digest=f"sha256:{hashlib.sha256(f'{VERSION}/{seed}/'.encode() + told).hexdigest()}",
        end_id=None,
        wire_dtype="f32",
        most_samples=series.most_windows,
        working_bytes=AT_ONCE * FLOAT * series.window * columns + max(WORKING_BYTES, one),
    )
