"""How long a token may take: by the plan for the first one, which comes when the prompt has gone through all stages;
by what was measured for those that follow."""

from __future__ import annotations

from collections import deque
from math import ceil
from typing import Final

from coordinator.planning.plan import Plan, PlannedStage
from wire.limits import MIN_DEADLINE_S

MARGIN: Final = 4.0
"""Times the prediction. Every stage gives half of its time to the tokens of other requests while a prompt runs; the
other half of the margin is for figures that were measured on a better day."""

LONGEST_S: Final = 3600.0
"""What stages may be told to keep a silent request (wire.messages)."""

DEADLINE_FACTOR: Final = 3.0
"""Times the 99th percentile of what was measured, or times what the plan predicts until enough was."""

LEAST_ANSWER_S: Final = 0.5
"""For an answer between two steps. Boards stop for a quarter of a second now and then (an SD card, a full swap) and go
on; who is asked twice has a second in all."""

LEAST_SAMPLES: Final = 32
MOST_SAMPLES: Final = 512
REFRESH: Final = 16
"""Samples after which the percentile is computed anew."""

MOST_ALARMS: Final = 8
"""False alarms lengthen the deadline up to so many times."""


def first_token_timeout_s(
    plan: Plan, prompt_tokens: int, prompts: int, floor_s: float, replay_tokens: int = 0
) -> float:
    """How long to wait for the first token of a prompt, at least `floor_s`, at most LONGEST_S.

    `prompts`: requests that run on the deployment, this one included. Stages run prompts one after the other.
    `replay_tokens` of the prompt are run one by one.
    """
    predicted_s = prompts * (prefill_s(plan, prompt_tokens - replay_tokens) + replay_tokens * plan.predicted_token_s)
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
    return _compute_s(stage, chunk_tokens) + chunk_tokens * stage.hop_s


def _compute_s(stage: PlannedStage, chunk_tokens: int) -> float:
    return chunk_tokens * stage.compute_s if stage.prefill_chunk_s is None else stage.prefill_chunk_s


class Pace:
    """How fast one deployment gives tokens, and so how long a silence must be to mean something.

    `before` is what was known of the plan before this one: if a device that was given up there is needed again here, it
    may merely be too slow for its promise, and is given twice the time rather than given up again and again.
    """

    def __init__(self, plan: Plan, before: Pace | None = None) -> None:
        self.given_up: set[str] = set()
        """Devices that did not answer."""
        self._plan = plan
        self._gaps_s: deque[float] = deque(maxlen=MOST_SAMPLES)
        self._p99_s: float | None = None
        self._new = 0
        self._alarms = 1
        if before is not None and before.given_up & {stage.device for stage in plan.stages}:
            self._alarms = min(MOST_ALARMS, 2 * before._alarms)

    def add(self, gap_s: float) -> None:
        """Another gap between two tokens of a request was measured."""
        self._gaps_s.append(gap_s)
        self._new += 1
        if len(self._gaps_s) >= LEAST_SAMPLES and (self._p99_s is None or self._new >= REFRESH):
            self._new = 0
            ordered = sorted(self._gaps_s)
            self._p99_s = ordered[ceil(0.99 * len(ordered)) - 1]

    def false_alarm(self) -> None:
        """A silence meant nothing: take twice as long from now on."""
        self._alarms = min(MOST_ALARMS, 2 * self._alarms)

    def deadline_s(self, live: int) -> float:
        """Between two tokens, while so many requests run. By the plan, each of them may have the stages to itself for a
        step, and one of them for a chunk of its prompt."""
        expected_s = self._p99_s
        if expected_s is None:
            chunk_s = sum(_compute_s(stage, self._plan.prefill_chunk_tokens) for stage in self._plan.stages)
            expected_s = live * self._plan.predicted_token_s + chunk_s
        return self._alarms * max(MIN_DEADLINE_S, DEADLINE_FACTOR * expected_s)

    def first_deadline_s(self, prompt_tokens: int, live: int, replay_tokens: int) -> float:
        """From the sending of a prompt to its first token."""
        predicted_s = (
            prefill_s(self._plan, prompt_tokens - replay_tokens) + replay_tokens * self._plan.predicted_token_s
        )
        return self._alarms * max(MIN_DEADLINE_S, DEADLINE_FACTOR * live * predicted_s)

    def answer_s(self) -> float:
        """For the answer of a stage that is in the longest of its steps, to a question that has to reach it."""
        chunk = self._plan.prefill_chunk_tokens
        longest_s = max(_compute_s(stage, chunk) + 2 * stage.hop_s for stage in self._plan.stages)
        return self._alarms * max(LEAST_ANSWER_S, DEADLINE_FACTOR * longest_s)
