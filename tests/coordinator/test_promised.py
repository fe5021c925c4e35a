"""Steps are compared with what the profile says of the same steps: same context, same rows, nothing beside them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planning.planner import make_plan
from coordinator.promised import (
    LONGEST_WINDOW_S,
    WINDOW_STEPS,
    Stint,
    Stints,
    Work,
    profiles_differ,
    promised_s,
    ratio_of,
    stage_modules,
    stage_of,
)
from tests.planning import boards
from wire.messages import StageCounters, Telemetry

GRAPH = boards.graph(12)


def counters(
    steps: int, *, rows: int | None = None, busy_s: float = 0.0, context: int = 0, **more: Any
) -> StageCounters:
    told = StageCounters(
        deployment="tiny", epoch=3, stage=0, decode_steps=steps, decode_rows_run=steps if rows is None else rows,
        decode_busy_s=busy_s, decode_context_tokens=context,
    )  # fmt: skip
    return msgspec.structs.replace(told, **more)


def test_a_window_needs_time_and_steps_and_is_what_happened_within_it() -> None:
    stint = Stint()
    assert stint.saw(counters(100, busy_s=1.0, context=1000), 0.0) is None
    assert stint.saw(counters(140, busy_s=1.4, context=9000), 1.0) is None, "too short"
    assert stint.saw(counters(150, rows=160, busy_s=1.6, context=7000), 2.0) == Work(50, 60, pytest.approx(0.6), 100.0)
    assert stint.saw(counters(155, rows=165, busy_s=1.7, context=7500), 4.0) is None, "too few steps"
    assert stint.saw(counters(170, rows=180, busy_s=2.0, context=9000), 9.0) is not None


def test_a_window_begins_when_work_begins() -> None:
    stint = Stint()
    for second in range(300):
        assert stint.saw(counters(100), float(second)) is None
    assert stint.saw(counters(120), 300.0) is None, "of these twenty steps nobody knows when in the second they were"
    assert stint.saw(counters(140), 301.0) == Work(40, 40, 0.0, 0.0)


def test_a_new_worker_or_epoch_or_a_long_rest_begins_anew() -> None:
    for changed in (
        counters(40),
        counters(400, busy_s=0.5),
        counters(400, rows=10, busy_s=9.0),
        counters(400, busy_s=9.0, epoch=4),
    ):
        stint = Stint()
        stint.saw(counters(100, busy_s=1.0), 0.0)
        assert stint.saw(changed, 5.0) is None
    stint = Stint()
    stint.saw(counters(100), 0.0)
    assert stint.saw(counters(110), 1.0) is None
    assert stint.saw(counters(110 + WINDOW_STEPS), LONGEST_WINDOW_S + 1) is None


def telemetry(*stages: StageCounters) -> Telemetry:
    return Telemetry(seq=1, boot="b0", mono_s=0.0, cpu_fraction=0.0, memory_used_bytes=1, memory_bytes=2, stages=stages)


def test_two_deployments_that_work_at_once_on_a_board_slow_each_other_and_say_nothing_of_it() -> None:
    stints = Stints()

    def at(second: float, tiny: int, other: int, disturbed: bool = False) -> int:
        told = telemetry(counters(tiny), counters(other, deployment="other"))
        return len(list(stints.saw("pi4", told, disturbed, second)))

    assert [at(second, 30 * second, 30 * second) for second in range(8)] == [0] * 8
    assert sum(at(second, 30 * second, 210) for second in range(8, 16)) >= 3, "the other one rests"
    assert [at(second, 30 * second, 210, disturbed=True) for second in range(16, 24)] == [0] * 8
    assert at(24, 720, 210) == at(25, 750, 210) == 0, "and then it begins anew"


def test_devices_are_counted_apart_and_can_be_forgotten() -> None:
    stints = Stints()
    list(stints.saw("a", telemetry(counters(0)), False, 0.0))
    list(stints.saw("b", telemetry(counters(0)), False, 0.0))
    list(stints.saw("a", telemetry(counters(10)), False, 1.0))
    list(stints.saw("b", telemetry(counters(10)), False, 1.0))
    stints.forget(["a"])
    assert not list(stints.saw("a", telemetry(counters(90)), False, 3.0))
    assert [work.steps for _, work in stints.saw("b", telemetry(counters(90)), False, 3.0)] == [90]


PLAN = make_plan(GRAPH, [boards.board("a"), boards.board("b")], boards.request(boards_at_least=2), boards.address)


def test_the_promise_is_the_plans_own_figure_where_the_plan_was_priced() -> None:
    profile = boards.board("a").profile
    assert profile is not None
    for stage in PLAN.stages:
        promised = promised_s(GRAPH, PLAN, stage, profile, PLAN.limits.expected_tokens)
        assert promised == pytest.approx(stage.compute_s)


@given(st.floats(16, 2000), st.integers(16, 400))
def test_a_context_that_grows_is_no_slowness(begin: float, steps: int) -> None:
    block_s, per_context_s = 1e-3, 2e-6
    profile = boards.profile("a", block_s=block_s, per_context_s=per_context_s)
    stage = PLAN.stages[0]
    modules = stage_modules(GRAPH, stage)
    blocks = sum(module.kind == "block" for module in modules)
    contexts = [begin + step for step in range(steps)]
    fixed_s = promised_s(GRAPH, PLAN, stage, profile, 16)
    assert fixed_s is not None
    # What this board takes: what was measured at 16 rows, and what each further row costs.
    busy_s = sum(fixed_s + blocks * per_context_s * (context - 16) for context in contexts)
    work = Work(steps, steps, busy_s, sum(contexts) / steps)
    ratio = ratio_of(work, promised_s(GRAPH, PLAN, stage, profile, work.context_tokens))
    assert ratio is not None and 0.97 < ratio.least == ratio.most < 1.03


def test_steps_of_several_rows_give_a_band() -> None:
    ratio = ratio_of(Work(10, 40, 0.2, 0.0), 0.01)
    assert ratio == (pytest.approx(0.5), pytest.approx(2.0))


@pytest.mark.parametrize(
    ("work", "step_s"),
    [
        (Work(10, 10, 0.1, 0.0), None),
        (Work(10, 10, 0.1, 0.0), 0.0),
        (Work(10, 10, 0.1, 0.0), 0.0004),
        (Work(10, 10, 0.0, 0.0), 0.01),
        (Work(10, 9, 0.1, 0.0), 0.01),
        (Work(0, 0, 0.1, 0.0), 0.01),
    ],
)
def test_what_can_not_be_says_nothing(work: Work, step_s: float | None) -> None:
    assert ratio_of(work, step_s) is None


def test_a_board_without_figures_is_not_judged() -> None:
    profile = msgspec.structs.replace(boards.profile("a"), modules=())
    assert promised_s(GRAPH, PLAN, PLAN.stages[0], profile, 100) is None


def test_counters_belong_to_a_stage_of_the_plan_on_that_device_in_that_epoch() -> None:
    here = counters(1, deployment=PLAN.deployment, epoch=PLAN.epoch)
    first = PLAN.stages[0]
    assert stage_of(PLAN, first.device, here) is first
    assert stage_of(PLAN, PLAN.stages[1].device, here) is None
    assert stage_of(PLAN, first.device, msgspec.structs.replace(here, epoch=9)) is None
    assert stage_of(PLAN, first.device, msgspec.structs.replace(here, deployment="other")) is None


def test_profiles_differ_when_modules_were_measured_anew() -> None:
    one = boards.profile("a")
    assert not profiles_differ(one, boards.profile("a", link_to_broker=boards.link(0.1, 1e6)))
    assert profiles_differ(one, boards.profile("a", block_s=2e-3))
