"""What a job trains that has other samples than texts: a task module on features that boards compute of these once."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import msgspec

from coordinator.operations import Operations
from coordinator.rounds.bases import Base, Part, base_of
from coordinator.rounds.job import Job
from coordinator.shelf import Prepared
from models.families.features import FeatureConfig
from models.items.features import FeaturesPart, features_part, features_tensor
from models.items.pack import PackedItems
from models.training.features import AT_ONCE
from models.training.kernels import FLOAT, VERSION, WORKING_BYTES, working_bytes
from models.training.memory import NET_BYTES, NET_COPIES, PIXEL_BYTES, TENSOR_COPIES
from wire.errors import UsageError
from wire.samples import Images, Series


async def base_for(operations: Operations, job: Job, say: Callable[[str], None]) -> Base:
    """Raises what packing a model and `base_of` raise."""
    if job.series is not None:
        return series_base(job.series, job.seed)
    prepared = await operations.preparing.prepare(job.model, job.precision, say)
    if job.images is not None:
        return await asyncio.to_thread(images_base, prepared, job, job.images)
    return await asyncio.to_thread(base_of, prepared, job)


def images_base(prepared: Prepared, job: Job, images: Images) -> Base:
    """The net as far as the features. Raises UsageError for one that takes no pictures, or has no such tensor."""
    packed = prepared.packed
    try:
        if not isinstance(packed, PackedItems):
            raise ValueError(f"model: {job.model} takes no pictures")
        found = features_part(packed, features_tensor(job.model, images))
    except ValueError as error:
        raise UsageError(f"job {job.name}: {error}", try_="docs/tuning.md, labels of pictures") from None
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
