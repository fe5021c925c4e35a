"""What a job trains that has other samples than texts: a task module on features that boards compute of these once."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import msgspec

from coordinator.operations import Operations
from coordinator.rounds.bases import Base, Part, base_of
from coordinator.rounds.job import Job
from models.families.features import FeatureConfig
from models.training.features import AT_ONCE
from models.training.kernels import FLOAT, VERSION, WORKING_BYTES, working_bytes
from wire.samples import Series


async def base_for(operations: Operations, job: Job, say: Callable[[str], None]) -> Base:
    """Raises what packing a model and `base_of` raise."""
    if job.series is not None:
        return series_base(job.series, job.seed)
    prepared = await operations.preparing.prepare(job.model, job.precision, say)
    return await asyncio.to_thread(base_of, prepared, job)


def series_base(series: Series, seed: int) -> Base:
    """Boards make the kernels of the seed, so there are no files."""
    told, columns = msgspec.json.encode(series), len(series.columns)
    one = working_bytes(columns, series.window, series.kernels)
    return Base(
        config=FeatureConfig(hidden=series.kernels),
        parts={"whole": Part(graph=told, files={}, ends=True, blocks=0)},
        tokenizer=b"",
        digest=f"sha256:{hashlib.sha256(f'{VERSION}/{seed}/'.encode() + told).hexdigest()}",
        end_id=None,
        wire_dtype="f32",
        most_samples=series.most_windows,
        working_bytes=AT_ONCE * FLOAT * series.window * columns + max(WORKING_BYTES, one),
    )
