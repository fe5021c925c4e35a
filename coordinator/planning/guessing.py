"""Whether it pays on a plan to guess tokens, and what a further row of a step costs there. Pure.

A round of the ring with guesses gives several tokens, and takes longer by what further rows cost (docs/decisions/0011):

    row = sum over stages of (chunk_s - compute_s) / (chunk_tokens - 1) + transfer_s, as a share of a round of one row

Where links take most of a round, that is little, and what text repeats comes several times as fast. How many tokens are
guessed follows from the text alone: the same prompt has the same steps on all plans on which it pays.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from coordinator.planning.plan import Plan

LEAST_SHARE: Final = 0.5
"""Of a round, that links must take."""

UNMEASURED: Final = 0.4
"""Of a step of one row, what a further row is taken to cost on a board that has not measured chunks of a prompt: two
rows were measured to take 1.2 to 1.4 times one."""

MOST_ROW_COST: Final = 0.3
"""What a further row may add to a round. Its steps are chosen as if it were 0.2 (agent.workers.drafting)."""


class Guessing(Struct, frozen=True):
    """Whether it pays, and why."""

    pays: bool
    because: str


def guessing_of(plan: Plan) -> Guessing:
    """Decide for requests that leave it to the plan."""
    round_s = plan.predicted_token_s
    links_s = sum(stage.hop_s for stage in plan.stages) if len(plan.stages) > 1 else 0.0
    share = links_s / round_s if round_s > 0 else 0.0
    if share < LEAST_SHARE:
        return _not(f"links take {share:.0%} of a round, below {LEAST_SHARE:.0%}")
    row_s = 0.0
    for stage in plan.stages:
        row_s += stage.transfer_s
        if stage.prefill_chunk_s is None or plan.prefill_chunk_tokens < 2:
            row_s += UNMEASURED * stage.compute_s
        else:
            row_s += max(0.0, stage.prefill_chunk_s - stage.compute_s) / (plan.prefill_chunk_tokens - 1)
    cost = row_s / round_s
    if cost > MOST_ROW_COST:
        return _not(f"a further row adds {cost:.0%} to a round, above {MOST_ROW_COST:.0%}")
    return Guessing(True, f"tokens are guessed: links take {share:.0%} of a round, a further row adds {cost:.0%}")


def _not(because: str) -> Guessing:
    return Guessing(False, f"no tokens are guessed: {because}")
