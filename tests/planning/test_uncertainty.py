"""How sure a prediction is; and that noise no larger than that changes no plan."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning import aims
from coordinator.planning.cost import DeviceCost, Workload, device_cost
from coordinator.planning.explain import explain
from coordinator.planning.plan import Plan
from coordinator.planning.planner import Candidate, make_plan, repriced, same_placement, worth_moving
from coordinator.planning.uncertainty import stage_error_s
from hwprofiles.profile import Profile, Samples
from tests.planning.boards import MB, address, board, graph, profile, request

WORKLOAD = Workload(context_tokens=512, slots=1, prefill_chunk_tokens=64, expected_tokens=128)


def spread(samples: Samples, share: float, shift: float = 0.0) -> Samples:
    """Eleven samples around the same middle (moved by `shift`), whose median has an interval of plus, minus `share`."""
    middle = samples.samples_s[0] * (1 + shift)
    # The second smallest and the second largest of eleven enclose the median at 95 %.
    values = [middle * (1 + share * step) for step in (-1.2, -1, -0.5, -0.2, -0.1, 0, 0.1, 0.2, 0.5, 1, 1.2)]
    return msgspec.structs.replace(samples, samples_s=tuple(values))


def noisy(made: Profile, share: float, draw: random.Random | None = None) -> Profile:
    """The profile with such spreads; with `draw` its medians are anywhere within their intervals, too."""

    def around(samples: Samples) -> Samples:
        return spread(samples, share, draw.uniform(-share, share) if draw else 0.0)

    modules = tuple(
        msgspec.structs.replace(
            module,
            timings=tuple(msgspec.structs.replace(one, samples=around(one.samples)) for one in module.timings),
        )
        for module in made.modules
    )
    return msgspec.structs.replace(made, modules=modules)


def shelf(share: float, draw: random.Random | None = None, memory_bytes: int = 4_096 * MB) -> list[Candidate]:
    boards = [board(name, slower, memory_bytes) for name, slower in (("a", 1.0), ("b", 1.3), ("c", 2.0), ("d", 2.6))]
    return [msgspec.structs.replace(one, profile=noisy(one.profile, share, draw)) for one in boards if one.profile]


def plan(candidates: list[Candidate], **changes: object) -> Plan:
    return make_plan(graph(), candidates, request(**changes), address)


def test_the_error_of_a_stage_is_that_of_its_blocks_step_and_head() -> None:
    cost = device_cost(graph(), "pi5", noisy(profile("pi5", block_s=1e-3, overhead_s=2e-4), 0.05), 4096 * MB, WORKLOAD)
    assert isinstance(cost, DeviceCost)
    # Depths 1 and 6 take 1.2 and 6.2 ms, each plus or minus 5 %.
    block_error_s = ((0.05 * 1.2e-3) ** 2 + (0.05 * 6.2e-3) ** 2) ** 0.5 / 5
    assert cost.decode_error_s["tiny/block"] == pytest.approx(block_error_s)
    overhead_error_s = ((0.05 * 1.2e-3) ** 2 + block_error_s**2) ** 0.5
    head_error_s = 0.05 * 4e-3
    parts = (overhead_error_s, 12 * block_error_s, head_error_s)
    expected = sum(part**2 for part in parts) ** 0.5
    assert stage_error_s(cost, graph().modules[-13:]) == pytest.approx(expected, rel=1e-6)


def test_steady_samples_leave_no_doubt_and_unsteady_ones_are_said() -> None:
    steady, unsteady = plan(shelf(0.0)), plan(shelf(0.03))
    assert steady.token_error_s == pytest.approx(0.0, abs=1e-12)
    assert 0.01 < unsteady.token_error_s / unsteady.predicted_token_s < 0.1
    assert not any("by the spread" in line for line in explain(steady, graph(), shelf(0.0)))
    lines = explain(unsteady, graph(), shelf(0.03))
    assert any(line.startswith("by the spread of what was measured:") and "(95 %)" in line for line in lines)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.01, 0.03, 0.06]),
    objective=st.sampled_from(["latency", "throughput"]),
    memory_bytes=st.sampled_from([190 * MB, 4_096 * MB]),
)
def test_noise_within_the_interval_moves_no_boundary(
    seed: int, share: float, objective: str, memory_bytes: int
) -> None:
    before = shelf(share, memory_bytes=memory_bytes)
    running = plan(before, objective=objective)
    assert same_placement(running, plan(before, objective=objective)), "the same figures give the same plan"
    after = shelf(share, random.Random(seed), memory_bytes)
    today, better = repriced(running, graph(), after), plan(after, objective=objective)
    verdict = worth_moving(today, better)
    if verdict:
        gain = 1 - figure(better) / figure(today)
        assert gain > 0.10, "only for what is more than noise"
    assert figure(better) <= figure(today) * 1.10, "what is called equal is nearly as good"


def figure(made: Plan) -> float:
    return aims.figure(made)


def test_of_plans_that_profiles_cannot_tell_apart_the_one_over_fewer_boards_is_taken() -> None:
    boards = [board("a", 1.0), board("b", 1.0), board("c", 12.0)]
    sharp = plan(boards, objective="throughput")
    assert len(sharp.stages) == 3
    unsure = [msgspec.structs.replace(one, profile=noisy(one.profile, 0.06)) for one in boards if one.profile]
    fewer = plan(unsure, objective="throughput")
    assert [stage.device for stage in fewer.stages] == ["a", "b"]
    assert "3 boards would be faster by less than profiles tell apart" in fewer.because
    assert len(plan(unsure, objective="throughput", boards_at_least=3).stages) == 3


def test_a_gain_that_may_be_noise_moves_nothing() -> None:
    made = plan(shelf(0.0), objective="throughput")
    other = plan(
        shelf(0.0), objective="latency", boards_at_least=2, slots=made.slots, context_tokens=made.context_tokens
    )
    running = msgspec.structs.replace(other, objective="throughput", predicted_slowest_s=aims.pace_s(made) * 1.2)
    assert worth_moving(running, made)
    error_s = aims.pace_s(running) - aims.pace_s(made)
    unsure = msgspec.structs.replace(running, slowest_error_s=error_s, token_error_s=error_s * len(running.stages))
    assert not worth_moving(unsure, made)
    assert "no sharper than that" in worth_moving(unsure, made).because
