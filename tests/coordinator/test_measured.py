"""Figures per token, however many tokens a step made, and over a worker that was started again."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from coordinator.measured import Key, caught_up, measured
from tests.coordinator.plans import plan_of
from wire.messages import StageCounters


def test_a_step_of_several_requests_counts_for_each_token_with_its_part() -> None:
    plan = plan_of("a")
    [stage] = plan.stages
    key: Key = (stage.device, stage.stage)
    first = StageCounters(deployment=plan.deployment, epoch=plan.epoch, stage=0, decode_steps=10, decode_rows=10)
    last = msgspec.structs.replace(first, decode_steps=30, decode_rows=70, decode_busy_s=3.0, decode_sent_bytes=6000)
    [row] = measured(plan, {key: first}, {key: last})
    assert row.decode_rows == 60
    assert row.measured_compute_s == pytest.approx(0.05) and row.sent_bytes_per_token == 100
    assert caught_up({key: first}, {key: last}, plan, 60)
    assert not caught_up({key: first}, {key: last}, plan, 61)


PLAN = plan_of("a", "b")


def counters(stage: int, requests: int, steps: int, **changes: Any) -> StageCounters:
    return StageCounters(
        deployment="tiny", epoch=PLAN.epoch, stage=stage, requests=requests, decode_steps=steps, decode_rows=steps,
        decode_busy_s=0.01 * steps, decode_sent_bytes=100 * steps, **changes,
    )  # fmt: skip


def test_counters_are_waited_for_until_they_hold_the_steps_of_this_answer() -> None:
    before = {("a", 0): counters(0, 3, 200), ("b", 1): counters(1, 3, 200)}
    after = {("a", 0): counters(0, 4, 220), ("b", 1): counters(1, 4, 219)}
    assert not caught_up(before, after, PLAN, 20)
    after["b", 1] = counters(1, 4, 220)
    assert caught_up(before, after, PLAN, 20)
    assert [row.decode_rows for row in measured(PLAN, before, after)] == [20, 20]


def test_a_worker_that_was_started_again_counts_from_zero() -> None:
    before = {("a", 0): counters(0, 3, 200), ("b", 1): counters(1, 3, 200)}
    after = {("a", 0): counters(0, 4, 220), ("b", 1): counters(1, 1, 20)}
    assert caught_up(before, after, PLAN, 20)
    rows = measured(PLAN, before, after)
    assert [row.decode_rows for row in rows] == [20, 20]
    assert [row.sent_bytes_per_token for row in rows] == [100, 100]
