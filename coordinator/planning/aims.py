"""What a plan may be made for, in words and in figures. Pure.

latency      a token of one stream soon
ttft         the first token of a long prompt soon
throughput   many tokens in little time; with a load asked for, that load carried, and then a token soon
energy       few joules per token of one stream; only where power was measured
memory       the fullest board as empty as can be, and then a token soon
weighted     a sum of these, each as a multiple of the best that is possible (memory: as a share)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple, get_args

from coordinator.planning.partition import between
from coordinator.planning.plan import Objective, Plan, PlannedStage
from wire.errors import UsageError
from wire.units import seconds_text

OBJECTIVES: Final[tuple[Objective, ...]] = get_args(Objective)

WEIGHED: Final[tuple[Objective, ...]] = ("latency", "ttft", "throughput", "energy", "memory")
"""What a weighted sum may hold."""

LARGEST_WEIGHT: Final = 1000.0

BUSY_SHARE: Final = 0.9
"""Of its time the busiest stage or link may work at the load asked for: at all of it requests would pile up."""

MOST_TOKENS_PER_S: Final = 1e6


class Aim(NamedTuple):
    words: str
    figure: str
    """What its figure is of, behind the figure."""


AIMS: Final[Mapping[Objective, Aim]] = {
    "latency": Aim("least time per token", "per token"),
    "ttft": Aim("least time to the first token", "to the first token"),
    "throughput": Aim("most tokens per second", "per token"),
    "energy": Aim("least energy per token", "per token"),
    "memory": Aim("most memory left free", "of the fullest board's memory"),
    "weighted": Aim("least weighted cost", "weighted"),
}


def value_text(objective: Objective, value: float) -> str:
    """'14.2 ms', '0.31 J', '43 %', '1.082'."""
    if objective == "energy":
        return f"{value:.3g} J"
    if objective == "memory":
        return f"{value:.0%}"
    return f"{value:.4g}" if objective == "weighted" else seconds_text(value)


def figure_text(objective: Objective, value: float) -> str:
    """'14.2 ms per token'."""
    return f"{value_text(objective, value)} {AIMS[objective].figure}"


def groups_of(plan: Plan) -> int:
    """How many steps are under way at once in a full pipeline: a group of requests each, and one per stage at most."""
    return max(1, min(len(plan.stages), plan.slots))


def filled_s(plan: Plan, stage: PlannedStage) -> float:
    """Predicted seconds of a stage for each token of a full pipeline, whose steps have the rows of a group."""
    if plan.runs == "items" or not stage.batches_s:
        return stage.compute_s
    rows = max(1.0, plan.slots / groups_of(plan))
    low, high, share = between(rows, [count for count, _ in stage.batches_s])
    steps_s = (stage.compute_s, *(step_s for _, step_s in stage.batches_s))
    return (steps_s[low] + share * (steps_s[high] - steps_s[low])) / rows


def pace_s(plan: Plan) -> float:
    """Predicted seconds from one token to the next of a full pipeline (coordinator.planning.filled). Of items as many
    are under way as it takes."""
    if plan.runs == "items":
        return plan.predicted_slowest_s
    hops_s = max(0.0, plan.predicted_token_s - sum(stage.compute_s for stage in plan.stages))
    stages_s = sum(filled_s(plan, stage) for stage in plan.stages)
    return max(plan.predicted_slowest_s, stages_s / groups_of(plan) + hops_s / max(1, plan.slots))


def pace_error_s(plan: Plan) -> float:
    """Half of its 95 % interval; 0 where that is not known."""
    if pace_s(plan) > plan.predicted_slowest_s:
        return plan.token_error_s / groups_of(plan)
    return plan.slowest_error_s


def figure(plan: Plan) -> float:
    """What a plan was made to keep small."""
    values: dict[Objective, float | None] = {
        "latency": plan.predicted_token_s,
        "ttft": plan.predicted_first_token_s,
        "throughput": plan.predicted_token_s if plan.limits.tokens_per_s else pace_s(plan),
        "energy": plan.predicted_token_j,
        "memory": plan.predicted_memory_share,
        "weighted": plan.predicted_cost,
    }
    value = values[plan.objective]
    return plan.predicted_token_s if value is None else value


def figure_error(plan: Plan) -> float:
    """Half of its 95 % interval; 0 where that is not known."""
    if plan.objective == "throughput" and plan.limits.tokens_per_s is None:
        return pace_error_s(plan)
    return plan.token_error_s if plan.objective in ("latency", "throughput") else 0.0


def check_objective(objective: str, weights: Mapping[str, float], tokens_per_s: float | None) -> Objective:
    """The objective as one of those that there are; raise UsageError if there is none, or if the rest contradicts."""
    found = next((known for known in OBJECTIVES if known == objective), None)
    if found is None:
        raise UsageError(f"objective {objective!r} is unknown", try_=", ".join(OBJECTIVES))
    if found == "weighted" and not weights:
        raise UsageError("objective weighted, and nothing is weighed", try_="--weigh latency=1 --weigh memory=0.5")
    if weights and found != "weighted":
        raise UsageError(f"weights, and objective {found}", try_="--objective weighted")
    for name, weight in weights.items():
        if name not in WEIGHED:
            raise UsageError(f"{name!r} can't be weighed", try_=", ".join(WEIGHED))
        if not 0 < weight <= LARGEST_WEIGHT:
            raise UsageError(f"a weight of {weight:g} for {name}", try_=f"above 0, at most {LARGEST_WEIGHT:g}")
    if tokens_per_s is not None:
        if found != "throughput":
            raise UsageError(
                f"a load of {tokens_per_s:g} tokens/s, and objective {found}", try_="--objective throughput"
            )
        if not 0 < tokens_per_s <= MOST_TOKENS_PER_S:
            raise UsageError(
                f"a load of {tokens_per_s:g} tokens/s is not possible", try_=f"above 0, at most {MOST_TOKENS_PER_S:g}"
            )
    return found
