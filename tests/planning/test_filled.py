"""What a pipeline that few requests fill gives most of: against brute force, and by its properties."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning import aims, filled, solving
from coordinator.planning.bounds import lower_bound
from coordinator.planning.filled import CLOSE, solve
from coordinator.planning.ordered import solve_any
from coordinator.planning.partition import (
    TIE,
    BatchSteps,
    Infeasible,
    Placement,
    Problem,
    Run,
    Solution,
    hops,
    latency_s,
    pace_s,
)
from coordinator.planning.plan import Plan
from coordinator.planning.planner import make_plan
from coordinator.planning.request import PlanRequest, price
from coordinator.planning.solving import carrying
from tests.planning.boards import address, board, graph, link, request
from tests.planning.test_partition import chain_of_equal_blocks, every_placement, made_problem

NEAR = 1 + CLOSE + TIE


def by_hand(problem: Problem, placement: Placement, requests: int) -> float:
    """The pace from the sums and the worst of a placement, as the module's text says it: steps of a group's rows."""
    groups = min(requests, len(placement))
    rows = requests / groups

    def step_s(run: Run) -> float:
        known = [(1, problem.seconds, problem.overhead_s), *problem.batches]
        steps = [
            overhead_s[run.device] + seconds[run.device, run.first : run.end].sum() for _, seconds, overhead_s in known
        ]
        if len(known) == 1:
            return float(rows * steps[0])
        if rows > known[-1][0]:
            return float(steps[-1] + (rows - 8) * (steps[-1] - steps[-2]) / 6)
        return float(np.interp(rows, [count for count, _, _ in known], steps))

    ring = hops(problem, placement)
    steps_s = [step_s(run) for run in placement]
    round_s = sum(steps_s) + sum(float(problem.hop_s[hop]) for hop in ring)
    slowest = max([step / rows for step in steps_s] + [float(problem.transfer_s[hop]) for hop in ring])
    return max(slowest, round_s / requests)


def with_rows(problem: Problem, seed: int) -> Problem:
    """Steps of two and of eight rows that take less by the row, another share for each module and device."""
    draw = np.random.default_rng(seed)
    two, eight = draw.uniform(1.0, 2.0, problem.seconds.shape), draw.uniform(1.0, 4.0, problem.seconds.shape)
    return replace(
        problem,
        batches=(
            BatchSteps(2, problem.seconds * two, problem.overhead_s * two[:, 0]),
            BatchSteps(8, problem.seconds * two * eight, problem.overhead_s * two[:, 0] * eight[:, 0]),
        ),
    )


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("requests", [1, 2, 3, 8])
def test_the_plan_is_the_best_on_random_cases(requests: int, rows: bool) -> None:
    rng = random.Random(requests)
    differs = 0
    for seed in range(120):
        problem = made_problem(seed, rng.randint(1, 4), rng.randint(1, 7), whole_numbers=seed % 2 == 0)
        problem = with_rows(problem, seed) if rows else problem
        least, most = rng.choice([(1, 4), (1, 4), (2, 3)])
        few = replace(problem, streams=requests)
        solution = solve(few, "throughput", least, most)
        within = [placement for placement in every_placement(problem) if least <= len(placement) <= most]
        assert (solution is None) == (not within), f"seed {seed}"
        if solution is None:
            continue
        best = min(by_hand(problem, placement, requests) for placement in within)
        assert solution.pace_s == pytest.approx(by_hand(problem, solution.placement, requests))
        assert solution.pace_s == solution.value == pace_s(few, solution.placement)
        assert solution.value <= best * NEAR, f"seed {seed}"
        fewest = min(len(p) for p in within if by_hand(problem, p, requests) <= best * (1 + TIE))
        assert len(solution.placement) <= fewest, "of plans that are as good the one over the fewest boards"
        for count, value in solution.best_by_stages.items():
            if not least <= count <= most:
                continue
            assert value >= min(by_hand(problem, p, requests) for p in within if len(p) == count) * (1 - TIE)
        plain = solve(problem, "throughput", least, most)
        assert plain is not None
        differs += solution.value < pace_s(few, plain.placement) * (1 - CLOSE)
    assert differs > 5, "the cases should contain such where the slowest part alone chooses badly"


def test_what_is_known_is_never_made_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filled, "FEWEST_SEARCHES", 0)
    monkeypatch.setattr(filled, "MOST_SEARCHES", 0)
    helped = 0
    for seed in range(40):
        problem = replace(made_problem(seed, 4, 6), streams=4)
        every = list(every_placement(problem))
        blind = solve(problem, "throughput")
        assert (blind is None) == (not every)
        if blind is None:
            continue
        best = min(every, key=lambda placement: pace_s(problem, placement))
        told = solve(problem, "throughput", known=best)
        assert told is not None and told.value <= pace_s(problem, best) * NEAR
        helped += told.value < blind.value * (1 - CLOSE)
    assert helped > 0, "without a search there should be cases in which the slowest part alone chooses badly"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_one_request_alone_is_as_fast_as_a_stream(seed: int) -> None:
    problem = replace(made_problem(seed, 4, 6), streams=1)
    alone, stream = solve(problem, "throughput"), solve(problem, "latency")
    assert (alone is None) == (stream is None)
    if alone is not None and stream is not None:
        assert alone.value == pytest.approx(stream.latency_s, rel=2 * CLOSE)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), requests=st.integers(1, 16), rows=st.booleans())
def test_more_requests_never_make_a_token_later_and_no_bound_is_undercut(seed: int, requests: int, rows: bool) -> None:
    problem = made_problem(seed, 4, 6)
    problem = with_rows(problem, seed) if rows else problem
    few = solve(replace(problem, streams=requests), "throughput")
    many, full = solve(replace(problem, streams=4 * requests), "throughput"), solve(problem, "throughput")
    assert (few is None) == (many is None) == (full is None)
    if few is None or many is None or full is None:
        return
    assert many.value <= few.value * NEAR
    if not rows:  # "as many as it takes" are one in each group
        assert full.value / NEAR <= many.value
    assert lower_bound(replace(problem, streams=requests), "throughput") <= few.value * (1 + 1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), requests=st.integers(1, 16), load=st.floats(0.2, 0.99))
def test_a_load_is_carried_by_full_steps_where_any_plan_carries_it(seed: int, requests: int, load: float) -> None:
    problem = replace(with_rows(made_problem(seed, 4, 6), seed), streams=requests)
    placements = list(every_placement(problem))
    if not placements:
        return
    paces = {placement: by_hand(problem, placement, requests) for placement in placements}
    limit = min(paces.values()) / load
    found = carrying(problem, limit, 1, None)
    assert found is not None and found.pace_s <= limit
    assert found.latency_s >= min(latency_s(problem, p) for p, pace in paces.items() if pace <= limit) * (1 - TIE)


def test_many_devices_are_planned_with_a_stated_gap() -> None:
    problem = replace(chain_of_equal_blocks(20, 40), streams=8)
    solution = solve_any(problem, "throughput")
    assert solution is not None and "above a bound" in solution.because
    assert solution.value >= lower_bound(problem, "throughput")
    few = solve(problem.only(list(range(8))), "throughput")
    assert few is not None and solution.value <= few.value * NEAR


def test_80_blocks_over_8_devices_are_planned_within_seconds() -> None:
    problem = replace(chain_of_equal_blocks(8, 80), streams=8)
    started_s = time.process_time()
    solution = solve_any(problem, "throughput")
    assert solution is not None and solution.because == ""
    assert time.process_time() - started_s < 20.0  # 1 s on a laptop; generous for slow machines


def test_a_cut_that_closes_no_ring_in_time_is_left_to_others() -> None:
    """No device may hold all, and the only way back is slow: still a plan."""
    problem = replace(made_problem(462, 4, 6), streams=3)
    slow = replace(problem, hop_s=np.where(problem.hop_s > 0, problem.hop_s + 50.0, 0.0))
    solution = solve(slow, "throughput")
    assert solution is not None and np.isfinite(solution.value)


def shelf(delay_s: float, **changes: Any) -> list[Any]:
    """Four unequal boards on links of one delay."""
    return [
        board(name, slower, link_to_broker=link(delay_s, 25e6), **changes)
        for name, slower in (("nuc", 1.0), ("pi5", 1.4), ("pi4", 2.5), ("old", 3.0))
    ]


def plan(delay_s: float, **changes: Any) -> Plan:
    return make_plan(graph(), shelf(delay_s), request(objective="throughput", **changes), address)


def test_a_plan_promises_what_its_requests_can_fill() -> None:
    for slots in (1, 4, 8):
        made = plan(4e-3, slots=slots)
        stages_s = sum(stage.compute_s for stage in made.stages)
        hops_s = made.predicted_token_s - stages_s
        groups = min(slots, len(made.stages))
        assert aims.figure(made) == aims.pace_s(made)
        assert aims.pace_s(made) == pytest.approx(max(made.predicted_slowest_s, stages_s / groups + hops_s / slots))
    paces = [aims.pace_s(plan(4e-3, slots=slots)) for slots in (1, 2, 4, 8, 64)]
    assert paces == sorted(paces, reverse=True)


@pytest.mark.parametrize("slots", [1, 4, 8])
def test_a_plan_says_of_itself_what_the_search_said_of_it(slots: int) -> None:
    """From its own figures: for screens, for moves, and for whoever reads it."""
    asked = request(objective="throughput", slots=slots, boards_at_least=2)
    made = make_plan(graph(), shelf(4e-3, row_share=0.3), asked, address)
    plain = make_plan(graph(), shelf(4e-3), asked, address)
    solution = partition_solution(asked)
    assert aims.pace_s(made) == pytest.approx(solution.pace_s)
    assert made.predicted_slowest_s == pytest.approx(solution.slowest_s)
    assert made.predicted_token_s == pytest.approx(solution.latency_s)
    if slots == 8:
        assert aims.pace_s(made) < 0.8 * aims.pace_s(plain)


def partition_solution(asked: PlanRequest) -> Solution:
    found = solving.solve(price(graph(), shelf(4e-3, row_share=0.3), asked))
    assert found is not None
    return found


def test_slow_links_are_worth_fewer_boards_where_few_requests_share_them() -> None:
    assert len(plan(20e-3, slots=2).stages) < len(plan(20e-3, slots=16).stages)


def test_unequal_shares_leave_less_to_wait_for() -> None:
    """Equal steps are not the best where the ring binds: the fast board takes more than its step would say."""
    made = plan(1e-3, slots=4)
    assert aims.pace_s(made) < 0.99 * aims.pace_s(plan_of_equal_steps())


def plan_of_equal_steps() -> Plan:
    """The plan for so many requests that the slowest part alone counts, with four."""
    many = plan(1e-3, slots=64)
    pins = {}
    for stage in many.stages:
        if stage.embedding:
            pins["embedding"] = stage.device
        pins |= {f"block.{number}": stage.device for number in range(stage.first_block, stage.end_block)}
        if stage.head:
            pins["head"] = stage.device
    return plan(1e-3, slots=4, pins=pins)


def test_a_load_counts_the_ring_too() -> None:
    most = aims.BUSY_SHARE / aims.pace_s(plan(4e-3, slots=4))
    carried = plan(4e-3, slots=4, tokens_per_s=0.98 * most)
    assert aims.pace_s(carried) <= aims.BUSY_SHARE / (0.98 * most)
    with pytest.raises(Infeasible, match="more than these boards carry") as refused:
        plan(4e-3, slots=4, tokens_per_s=1.1 * most)
    assert "at most" in str(refused.value)
