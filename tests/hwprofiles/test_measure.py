"""Sampling stops for a reason, says it, and does not call a bad run good."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwprofiles import measure, stats
from hwprofiles.measure import (
    BATCHES,
    MeasurePlan,
    Point,
    StepEstimate,
    StopRule,
    estimate,
    forget_peak,
    measure_module,
    peak_bytes,
    plan_for,
    resident_bytes,
    sample,
)
from hwprofiles.profile import ModuleMeasurement, ModuleTiming, Phase, Samples
from tests.hwprofiles import examples
from tests.hwprofiles.simulated import Clock

RULE = StopRule()


class Board:
    """Steps that take the given times, one after the other, the last one for ever."""

    def __init__(self, *times_s: float) -> None:
        self.clock = Clock()
        self.times_s = times_s
        self.steps = 0

    def __call__(self) -> float:
        taken_s = self.times_s[min(self.steps, len(self.times_s) - 1)]
        self.steps += 1
        self.clock.now_s += taken_s
        return taken_s

    def sampled(self, rule: StopRule = RULE) -> Samples:
        return sample(self, rule, self.clock)


def test_steady_step_is_known_after_the_fewest_samples() -> None:
    found = Board(0.01).sampled()
    assert found.samples_s == (0.01,) * RULE.min_samples
    assert found.valid and "median known to 0.0%" in found.stopped_because


def test_slow_first_steps_are_dropped_as_warm_up() -> None:
    found = Board(0.5, 0.2, 0.1, 0.01).sampled()
    assert max(found.samples_s) == 0.01 and found.warmup == 6


def test_warm_up_that_never_settles_ends_by_number() -> None:
    board = Board(*[0.001 * (1 + at % 2) for at in range(500)])
    assert board.sampled().warmup == RULE.warmup_max


def test_warm_up_of_slow_steps_ends_by_time() -> None:
    assert Board(5.0, 9.0, 5.0, 9.0, 5.0).sampled().warmup == RULE.warmup_min


def test_noisy_step_is_sampled_until_its_median_is_known() -> None:
    draw = random.Random(3)
    noisy = [0.001 * draw.uniform(0.7, 1.3) for _ in range(400)]
    found = Board(*noisy).sampled()
    width = stats.relative_half_width(found.samples_s)
    assert found.valid and width is not None
    assert len(found.samples_s) > RULE.min_samples
    assert width <= RULE.target


def test_number_budget_ends_a_run_that_never_agrees_and_says_so() -> None:
    wild = [0.0001 * (1 + (at * 37) % 101) for at in range(400)]
    found = Board(*wild).sampled(StopRule(max_samples=40, target=0.001))
    assert len(found.samples_s) == 40 and found.stopped_because == "40 samples taken"


def test_slow_step_gets_the_least_samples_even_over_the_time_budget() -> None:
    found = Board(3.0).sampled()
    assert len(found.samples_s) == RULE.least_samples
    assert found.valid and "time budget of 2 s" in found.stopped_because


def test_step_too_slow_for_the_least_samples_is_invalid_with_the_reason() -> None:
    found = Board(25.0).sampled()
    assert len(found.samples_s) == 3 and "gave up after 60 s" in found.stopped_because
    assert not found.valid and found.invalid_because == "3 samples, at least 6 are needed"


def test_board_that_slows_down_all_the_time_is_invalid_for_drift() -> None:
    found = Board(*[0.01 * 1.02**at for at in range(300)]).sampled()
    assert not found.valid and found.invalid_because.startswith("drift")


def test_two_populations_are_invalid_for_spread() -> None:
    """What a quota with a long period does: most steps run at full speed, some wait."""
    found = Board(*[0.026 if at % 4 else 0.076 for at in range(400)]).sampled(StopRule(min_samples=40, target=0.01))
    assert not found.valid and "spread: p90 is 2.9 times the median" in found.invalid_because


def test_drift_early_in_a_run_that_then_settles_is_sampled_away() -> None:
    times_s = [0.010] * 4 + [0.010 + 0.0008 * at for at in range(12)] + [0.02] * 300
    found = Board(*times_s).sampled()
    assert found.valid and len(found.samples_s) > RULE.min_samples
    assert stats.median(found.samples_s) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_step_that_takes_no_time_at_all_is_an_error(bad: float) -> None:
    with pytest.raises(ValueError, match="a step took"):
        sample(lambda: bad, RULE)


def test_what_a_step_raises_passes_through() -> None:
    def broken() -> float:
        raise OSError("engine gone")

    with pytest.raises(OSError, match="engine gone"):
        sample(broken, RULE)


@given(st.lists(st.floats(1e-6, 2.0), min_size=1, max_size=60))
def test_any_board_is_sampled_within_its_budgets(times_s: list[float]) -> None:
    board = Board(*times_s)
    found = board.sampled()
    assert RULE.least_samples <= len(found.samples_s) <= RULE.max_samples
    assert found.warmup <= RULE.warmup_max and found.stopped_because
    assert found.valid == (not found.invalid_because)


def test_plan_has_two_contexts_for_blocks_and_none_for_what_has_no_cache() -> None:
    assert {point.context for point in plan_for("block", (6, 1)).points} == {16, 256}
    assert plan_for("block", (6, 1)).stacks == (1, 6)
    chunks = (Point("prefill", 32, 0), Point("prefill", 128, 0))
    assert plan_for("head").points == (
        Point("decode", 1, 0),
        *(Point("decode", batch, 0) for batch in BATCHES),
        *chunks,
    )
    assert plan_for("embedding").points == (Point("decode", 1, 0), *chunks)
    assert {Point("decode", batch, 16) for batch in BATCHES} < set(plan_for("block").points)
    with pytest.raises(ValueError, match="stack"):
        plan_for("block", ())


def measured(block_s: float, overhead_s: float, retries: int = 1) -> tuple[ModuleMeasurement, list[Point]]:
    clock, asked = Clock(), []

    def run(phase: Phase, tokens: int, context: int, stack: int):  # type: ignore[no-untyped-def]
        asked.append(Point(phase, tokens, context))
        taken_s = overhead_s + stack * block_s * tokens * (1 + context / 1000)

        def step() -> float:
            clock.now_s += taken_s
            return taken_s

        return step

    plan = msgspec.structs.replace(plan_for("block", (1, 6)), retries=retries)
    return measure_module("key", "block", "engine", 2, run, plan, base_bytes=5, clock=clock), asked


def test_module_is_timed_at_every_point_and_depth_shallow_and_deep_in_turn() -> None:
    found, asked = measured(0.001, 0.0005)
    assert len(asked) == len(found.timings) == 16
    assert asked[::2] == asked[1::2] == list(plan_for("block").points)
    assert [timing.stack for timing in found.timings] == [1, 6] * 8
    assert (found.key, found.kind, found.engine, found.threads, found.base_bytes) == ("key", "block", "engine", 2, 5)


def test_estimate_gives_back_the_cost_of_block_and_step() -> None:
    found = estimate(measured(0.001, 0.0005)[0])
    for step in found.steps:
        assert step.valid and step.because == "depths 1 and 6"
        assert step.block_s == pytest.approx(0.001 * step.tokens * (1 + step.context / 1000))
        assert step.overhead_s == pytest.approx(0.0005)
    assert [step.context for step in found.at("decode", 1)] == [16, 256]
    assert found.at("decode", 7) == ()


def test_invalid_run_is_measured_once_more_and_the_better_one_kept() -> None:
    clock, runs = Clock(), []

    def run(phase: Phase, tokens: int, context: int, stack: int):  # type: ignore[no-untyped-def]
        def step() -> float:
            runs.append(1)
            taken_s = 0.01 * 1.02 ** len(runs) if len(runs) < 80 else 0.05
            clock.now_s += taken_s
            return taken_s

        return step

    plan = MeasurePlan(points=(Point("decode", 1, 0),), stacks=(1,))
    found = measure_module("key", "head", "engine", 1, run, plan, base_bytes=0, clock=clock)
    assert found.timings[0].samples.valid
    assert set(found.timings[0].samples.samples_s) == {0.05}


def test_of_several_rounds_over_all_points_the_quickest_valid_run_of_each_counts() -> None:
    clock, asked = Clock(), []

    def run(phase: Phase, tokens: int, context: int, stack: int):  # type: ignore[no-untyped-def]
        asked.append(tokens)
        visit = asked.count(tokens)
        taken = {1: [0.03, 0.02, 0.04], 2: [0.05, 0.07, 0.01]}[tokens][visit - 1]
        samples = iter([taken] * 100)

        def step() -> float:
            taken_s = next(samples)
            # The third run of two rows would be quickest, but takes ever longer.
            taken_s *= 1.1 ** (100 - samples.__length_hint__()) if taken == 0.01 else 1
            clock.now_s += taken_s
            return taken_s

        return step

    points = (Point("decode", 1, 0), Point("decode", 2, 0))
    plan = MeasurePlan(points=points, stacks=(1,), rounds=3, retries=0)
    found = measure_module("key", "head", "engine", 1, run, plan, base_bytes=0, clock=clock)
    assert asked == [1, 2, 1, 2, 1, 2]
    assert [set(timing.samples.samples_s) for timing in found.timings] == [{0.02}, {0.05}]


@pytest.mark.parametrize(("disturbed_runs", "valid"), [(0, True), (1, True), (3, True), (4, False)])
def test_a_step_that_took_longer_behind_fewer_rows_is_measured_again_and_not_believed(
    disturbed_runs: int, valid: bool
) -> None:
    clock, asked = Clock(), []

    def run(phase: Phase, tokens: int, context: int, stack: int):  # type: ignore[no-untyped-def]
        asked.append(context)
        taken_s = 0.02 if context == 16 and asked.count(16) <= disturbed_runs else 0.01

        def step() -> float:
            clock.now_s += taken_s
            return taken_s

        return step

    plan = MeasurePlan(points=(Point("decode", 1, 16), Point("decode", 1, 256)), stacks=(1,), retries=3)
    found = measure_module("key", "block", "engine", 1, run, plan, base_bytes=0, clock=clock)
    short, long = found.timings
    assert (short.context, long.context) == (16, 256)
    assert short.samples.valid is valid and long.samples.valid
    assert asked.count(16) == min(1 + disturbed_runs, 4) and asked.count(256) == 1
    if not valid:
        assert "behind 16 rows than behind 256" in short.samples.invalid_because


@pytest.mark.parametrize(("disturbed_runs", "known"), [(1, True), (3, True), (9, False)])
def test_a_deep_stack_that_was_no_slower_than_a_shallow_one_is_measured_again_with_it(
    disturbed_runs: int, known: bool
) -> None:
    clock, asked = Clock(), []

    def run(phase: Phase, tokens: int, context: int, stack: int):  # type: ignore[no-untyped-def]
        asked.append(stack)
        taken_s = 0.05 if stack == 1 and asked.count(1) <= disturbed_runs else 0.01 * stack

        def step() -> float:
            clock.now_s += taken_s
            return taken_s

        return step

    plan = MeasurePlan(points=(Point("decode", 1, 16),), stacks=(1, 4), retries=3)
    found = measure_module("key", "block", "engine", 1, run, plan, base_bytes=0, clock=clock)
    [made] = estimate(found).steps
    assert asked == [1, 4] * min(1 + disturbed_runs, 4)
    assert (made.block_s > 0 and made.valid) is known
    assert known or "no longer than 1" in made.because


class Memory:
    """A process whose resident memory grows by what its stacks and steps take, and by nothing else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held_bytes = 300 << 20
        monkeypatch.setattr(measure, "resident_bytes", lambda: self.held_bytes)


def test_resident_growth_of_the_deepest_stack_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)
    loaded: set[int] = set()

    def run(phase: Phase, tokens: int, context: int, stack: int):  # type: ignore[no-untyped-def]
        if stack not in loaded:
            loaded.add(stack)
            memory.held_bytes += (64 if stack == 6 else 16) << 20
        return lambda: 0.001

    points = (Point("decode", 1, 0), Point("decode", 1, 16))
    plan = MeasurePlan(points=points, stacks=(1, 6), rule=StopRule(time_budget_s=0.1))
    found = measure_module("key", "block", "engine", 1, run, plan, base_bytes=memory.held_bytes)
    assert found.resident_bytes == 64 << 20
    assert found.shallow_bytes == 16 << 20


def test_memory_that_shrank_meanwhile_was_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)

    def run(phase: Phase, tokens: int, context: int, stack: int):  # type: ignore[no-untyped-def]
        memory.held_bytes -= 1 << 20
        return lambda: 0.001

    plan = MeasurePlan(points=(Point("decode", 1, 0),), stacks=(1, 6), rule=StopRule(time_budget_s=0.1))
    found = measure_module("key", "block", "engine", 1, run, plan, base_bytes=memory.held_bytes)
    assert found.resident_bytes == found.shallow_bytes == 1


def test_what_larger_steps_need_for_a_moment_is_not_counted_as_held(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)

    def run(phase: Phase, tokens: int, context: int, stack: int):  # type: ignore[no-untyped-def]
        memory.held_bytes += (64 << 20) if tokens == 128 else (1 << 20)
        return lambda: 0.001

    points = (Point("decode", 1, 0), Point("prefill", 128, 0))
    plan = MeasurePlan(points=points, stacks=(1, 6), rule=StopRule(time_budget_s=0.1))
    found = measure_module("key", "block", "engine", 1, run, plan, base_bytes=memory.held_bytes)
    assert found.resident_bytes == 1 << 20


def test_resident_memory_is_what_the_kernel_counts() -> None:
    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_the_peak_of_what_is_given_back_is_known_until_it_is_forgotten() -> None:
    held = resident_bytes()
    del_me = np.ones(64 << 20, np.uint8)
    del del_me
    assert peak_bytes() >= held + (60 << 20)
    forget_peak()
    assert peak_bytes() <= resident_bytes() + (16 << 20)


def single(*timings: ModuleTiming) -> StepEstimate:
    (step,) = estimate(examples.module("block", *timings)).steps
    return step


def test_one_depth_counts_the_step_into_the_module_and_says_so() -> None:
    step = single(examples.timing(0.003))
    assert step.valid and step.overhead_s == 0 and step.block_s == pytest.approx(0.003)
    assert step.because.startswith("one depth of 1")


def test_deep_stack_faster_than_a_shallow_one_is_no_estimate() -> None:
    step = single(examples.timing(0.003), examples.timing(0.002, stack=6))
    assert not step.valid and step.because == "6 stacked took no longer than 1"


def test_overhead_is_never_negative() -> None:
    step = single(examples.timing(0.001), examples.timing(0.012, stack=6))
    assert step.overhead_s == 0 and step.block_s == pytest.approx(0.0022, rel=0.01)


def test_estimate_from_an_invalid_run_is_invalid_but_still_told() -> None:
    bad = ModuleTiming(
        phase="decode",
        tokens=1,
        context=16,
        stack=6,
        samples=examples.samples(0.015, valid=False, invalid_because="drift: x"),
    )
    step = single(examples.timing(0.003), bad)
    assert not step.valid and step.block_s > 0 and step.because == "depth 6: drift: x"


def test_interval_of_a_block_contains_it_and_narrows_with_steadier_samples() -> None:
    steady, noisy = (
        single(
            *(
                ModuleTiming(
                    phase="decode", tokens=1, context=16, stack=stack, samples=examples.samples(time_s, spread=spread)
                )
                for stack, time_s in ((1, 0.003), (6, 0.0155))
            )
        )
        for spread in (0.01, 0.3)
    )
    for step in (steady, noisy):
        assert step.block_low_s <= step.block_s <= step.block_high_s
    assert steady.block_high_s - steady.block_low_s < noisy.block_high_s - noisy.block_low_s


@given(
    st.lists(st.floats(0, 1e6), max_size=8),
    st.lists(st.floats(0, 1e6), max_size=8),
    st.integers(1, 3),
    st.integers(1, 1024),
)
def test_estimate_of_whatever_a_peer_sends_never_fails(a: list[float], b: list[float], low: int, high: int) -> None:
    timings = [
        ModuleTiming(
            phase="decode",
            tokens=1,
            context=0,
            stack=stack,
            samples=Samples(samples_s=tuple(values), warmup=0, stopped_because=""),
        )
        for stack, values in ((low, a), (high, b))
    ]
    (step,) = estimate(examples.module("block", *timings)).steps
    assert not step.valid or step.block_s > 0
    assert step.overhead_s >= 0
