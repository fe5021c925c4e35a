"""Small plans for tests."""

from __future__ import annotations

from coordinator.planning.plan import Plan, PlannedStage
from wire import topics
from wire.messages import InboxAddress


def inbox(stage: int) -> InboxAddress:
    return InboxAddress(topic=topics.INBOX.on("lab", "tiny", str(stage)))


def planned(stage: int, device: str, first: int, end: int, last: int) -> PlannedStage:
    return PlannedStage(
        stage=stage,
        device=device,
        embedding=stage == 0,
        head=stage == last,
        first_block=first,
        end_block=end,
        held_bytes=10_000_000,
        memory_bytes=110_000_000,
        memory_limit_bytes=500_000_000,
        compute_s=0.004,
        hop_s=0.001,
        hop_bytes=1232 if stage < last else 84,
        inbox=inbox(stage),
        because="a share by speed",
    )


def plan_of(*devices: str, epoch: int = 3) -> Plan:
    """Two blocks per device."""
    last = len(devices) - 1
    return Plan(
        deployment="tiny",
        epoch=epoch,
        model="tiny",
        precision="int4",
        wire_dtype="f16",
        objective="latency",
        topology="central",
        context_tokens=256,
        slots=2,
        prefill_chunk_tokens=32,
        stages=tuple(planned(i, device, 2 * i, 2 * i + 2, last) for i, device in enumerate(devices)),
        left_out=(),
        predicted_token_s=0.005 * len(devices),
        predicted_slowest_s=0.004,
        because="asked for",
    )
