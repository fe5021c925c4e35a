"""How long the first token may take: the prompt has to go through all stages before it, and that takes time by plan."""

from __future__ import annotations

from math import ceil
from typing import Final

from coordinator.planning.plan import Plan, PlannedStage

MARGIN: Final = 4.0
"""Times the prediction. Every stage gives half of its time to the tokens of other requests while a prompt runs; the
other half of the margin is for figures that were measured on a better day."""

LONGEST_S: Final = 3600.0
"""What stages may be told to keep a silent request (wire.messages)."""


def first_token_timeout_s(plan: Plan, prompt_tokens: int, prompts: int, floor_s: float) -> float:
    """How long to wait for the first token of a prompt, at least `floor_s`, at most LONGEST_S.

    `prompts`: requests that run on the deployment, this one included. Stages run prompts one after the other.
    """
    predicted_s = prompts * prefill_s(plan, prompt_tokens)
    return min(LONGEST_S, max(floor_s, MARGIN * predicted_s))


def prefill_s(plan: Plan, prompt_tokens: int) -> float:
    """The plan's figures for one prompt if its chunks went through the stages one after the other. They overlap, so
    this is an upper bound."""
    chunk_tokens = min(plan.prefill_chunk_tokens, max(1, prompt_tokens))
    chunks = ceil(prompt_tokens / plan.prefill_chunk_tokens)
    return chunks * sum(_chunk_s(stage, chunk_tokens) for stage in plan.stages)


def _chunk_s(stage: PlannedStage, chunk_tokens: int) -> float:
    """One chunk on one stage and its hop. What was not measured is bounded by its decode steps: a row in a chunk costs
    no more than a row alone, on a board as on a link."""
    by_tokens_s = chunk_tokens * stage.compute_s
    compute_s = by_tokens_s if stage.prefill_chunk_s is None else stage.prefill_chunk_s
    return compute_s + chunk_tokens * stage.hop_s
