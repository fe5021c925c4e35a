"""A device, or its link, that is slower than its profile says: how that enters its price. Pure; coordinator.slowness
and coordinator.slowlinks find it out."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from coordinator.planning.cost import Batch, DeviceCost


class Slowed(Struct, frozen=True, kw_only=True):
    """Steps take `times` as long as the profile says, above 1; `because` is words: 'runs at 0.40 of its profile'."""

    times: float
    because: str


def slowed(cost: DeviceCost, by: Slowed | None) -> DeviceCost:
    """The price of a device as it runs now. Its links and its memory are what they were."""
    if by is None:
        return cost
    return msgspec.structs.replace(
        cost,
        overhead_s=cost.overhead_s * by.times,
        decode_s={key: seconds * by.times for key, seconds in cost.decode_s.items()},
        batches=tuple(
            Batch(
                rows=batch.rows,
                overhead_s=batch.overhead_s * by.times,
                decode_s={key: seconds * by.times for key, seconds in batch.decode_s.items()},
            )
            for batch in cost.batches
        ),
        prefill_overhead_s=cost.prefill_overhead_s * by.times,
        prefill_s={key: seconds * by.times for key, seconds in cost.prefill_s.items()},
        overhead_error_s=cost.overhead_error_s * by.times,
        decode_error_s={key: seconds * by.times for key, seconds in cost.decode_error_s.items()},
        slowed_because=by.because,
    )


def slowed_link(cost: DeviceCost, by: Slowed | None) -> DeviceCost:
    """The price of a device whose link is slow: delay and rate alike, since what was seen does not tell them apart."""
    if by is None or cost.link is None:
        return cost
    link = msgspec.structs.replace(
        cost.link, one_way_s=cost.link.one_way_s * by.times, bytes_per_s=cost.link.bytes_per_s / by.times
    )
    return msgspec.structs.replace(cost, link=link, notes=(*cost.notes, f"its link {by.because}"))
