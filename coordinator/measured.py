"""What a deployment really did, from the counters that the stages report: time, bytes, per decoded token."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from coordinator.planning.plan import Plan
from wire.messages import StageCounters, Telemetry

Key = tuple[str, int]
"""(device, stage)"""


class StageMeasured(Struct, frozen=True, kw_only=True):
    """Of one stage over a span of decode steps, per token. None: the stage made no such step, or has not reported yet.

    With several requests at once the span holds steps of all of them; a step that several share counts for each token
    with its part.
    """

    stage: int
    device: str
    blocks: str
    held_bytes: int
    predicted_compute_s: float
    measured_compute_s: float | None
    predicted_hop_s: float
    decode_rows: int
    """Tokens, of all requests."""
    drafts_sent: int = 0
    drafts_accepted: int = 0
    """Tokens that were guessed, at the first stage, and those of them that were right."""
    sent_bytes_per_token: float | None
    resident_bytes: int | None
    formula_bytes: int
    """Payload bytes per token that the formula predicts: hidden x width + header, or one token id + header."""


def counters_of(plan: Plan, telemetry: Mapping[str, Telemetry]) -> dict[Key, StageCounters]:
    """Counters of a plan's stages in its epoch, as last reported."""
    found: dict[Key, StageCounters] = {}
    for stage in plan.stages:
        heard = telemetry.get(stage.device)
        for counters in heard.stages if heard else ():
            if (counters.deployment, counters.stage, counters.epoch) == (plan.deployment, stage.stage, plan.epoch):
                found[stage.device, stage.stage] = counters
    return found


def of_same_workers(
    before: Mapping[Key, StageCounters], after: Mapping[Key, StageCounters]
) -> dict[Key, StageCounters]:
    """The counters before, without those of workers that ended since: their successors count from zero."""
    return {
        key: counters
        for key, counters in before.items()
        if key not in after or after[key].requests >= counters.requests
    }


def caught_up(before: Mapping[Key, StageCounters], after: Mapping[Key, StageCounters], plan: Plan, steps: int) -> bool:
    """Whether all stages have reported at least `steps` decoded rows more than before."""
    before = of_same_workers(before, after)
    return all(
        (key := (stage.device, stage.stage)) in after
        and after[key].decode_rows - (before[key].decode_rows if key in before else 0) >= steps
        for stage in plan.stages
    )


def measured(
    plan: Plan, before: Mapping[Key, StageCounters], after: Mapping[Key, StageCounters]
) -> tuple[StageMeasured, ...]:
    """What each stage did between two sets of counters."""
    before = of_same_workers(before, after)
    rows = []
    for stage in plan.stages:
        key = (stage.device, stage.stage)
        first, last = before.get(key), after.get(key)
        steps = (last.decode_rows if last else 0) - (first.decode_rows if first else 0)
        busy_s = (last.decode_busy_s if last else 0.0) - (first.decode_busy_s if first else 0.0)
        sent = (last.decode_sent_bytes if last else 0) - (first.decode_sent_bytes if first else 0)
        rows.append(
            StageMeasured(
                stage=stage.stage,
                device=stage.device,
                blocks=blocks_text(stage.embedding, stage.first_block, stage.end_block, stage.head),
                held_bytes=stage.held_bytes,
                predicted_compute_s=stage.compute_s,
                measured_compute_s=busy_s / steps if steps > 0 else None,
                predicted_hop_s=stage.hop_s,
                decode_rows=max(0, steps),
                drafts_sent=_grown(first, last, "drafts_sent"),
                drafts_accepted=_grown(first, last, "drafts_accepted"),
                sent_bytes_per_token=sent / steps if steps > 0 else None,
                resident_bytes=last.resident_bytes if last and last.resident_bytes else None,
                formula_bytes=stage.hop_bytes,
            )
        )
    return tuple(rows)


def _grown(first: StageCounters | None, last: StageCounters | None, name: str) -> int:
    before: int = getattr(first, name) if first else 0
    return max(0, (getattr(last, name) if last else 0) - before)


def blocks_text(embedding: bool, first_block: int, end_block: int, head: bool) -> str:
    """'embedding + 0-9', '10-19', '20-29 + head'."""
    parts = ["embedding"] if embedding else []
    if end_block > first_block:
        parts.append(f"{first_block}-{end_block - 1}" if end_block - first_block > 1 else str(first_block))
    parts += ["head"] if head else []
    return " + ".join(parts)
