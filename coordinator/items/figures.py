"""What a request of items took, beside what the plan promised."""

from __future__ import annotations

from typing import Any

from coordinator.items.serve import Answers
from hwprofiles.stats import median


def figures(answers: Answers) -> dict[str, Any]:
    """Medians over the items, and how many came out in a second."""
    plan, results = answers.plan, answers.results
    rows = []
    for stage in plan.stages:
        times = [result.stages[stage.stage] for result in results if len(result.stages) > stage.stage]
        rows.append(
            {
                "stage": stage.stage,
                "device": stage.device,
                "predicted_compute_s": stage.compute_s,
                "measured_compute_s": median([time.busy_s for time in times]) if times else None,
                "sent_bytes_per_item": median([float(time.sent_bytes) for time in times]) if times else None,
                "predicted_hop_bytes": stage.hop_bytes,
            }
        )
    return {
        "deployment": plan.deployment,
        "epoch": plan.epoch,
        "items": len(results),
        "rows": sum(result.rows for result in results),
        "item_s": median([result.item_s for result in results]),
        "predicted_item_s": plan.predicted_token_s,
        "items_per_s": len(results) / answers.wall_s if answers.wall_s > 0 else None,
        "predicted_items_per_s": 1 / plan.predicted_slowest_s if plan.predicted_slowest_s > 0 else None,
        "losses": answers.losses,
        "stages": rows,
    }
