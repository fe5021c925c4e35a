"""Many boards: planned soon, and the plan says how far from the best it can be."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.parts.scale import Size, figures, fleet, gap_percent, plan_of
from coordinator.planning.bounds import lower_bound
from coordinator.planning.labels import labelled
from coordinator.planning.partition import TIE, solve
from coordinator.planning.plan import Objective
from tests.planning.boards import graph
from tests.planning.test_partition import OBJECTIVES, every_placement, made_problem, rank


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("tight", [False, True])
def test_64_boards_and_80_blocks_are_planned_in_seconds_and_close_to_the_bound(
    objective: Objective, tight: bool
) -> None:
    started_s = time.process_time()
    made = plan_of(graph(80), fleet(Size(64, 80, tight)), objective)
    assert time.process_time() - started_s < 8.0  # 0.7 to 1.3 s on a laptop; the benchmark holds it to 2
    # How many boards few requests can fill is bounded loosely.
    assert "at most" in made.because and gap_percent(made) <= (15 if objective == "latency" else 60)
    assert all(stage.memory_bytes <= stage.memory_limit_bytes for stage in made.stages)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_8_boards_and_32_blocks_are_planned_exactly(objective: Objective) -> None:
    made = plan_of(graph(32), fleet(Size(8, 32, True)), objective)
    assert "above a bound" not in made.because


def test_figures_state_time_memory_and_gap_of_each_size() -> None:
    found = figures((Size(2, 4, True),), repeats=1)
    assert [figure.unit for figure in found] == ["s", "MB", "%"] * 2
    assert all(figure.value > 0 for figure in found if figure.unit != "%")


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    objective=st.sampled_from(OBJECTIVES),
    devices=st.integers(1, 4),
    least=st.integers(1, 3),
)
def test_no_placement_undercuts_the_bound(seed: int, objective: Objective, devices: int, least: int) -> None:
    problem = made_problem(seed, devices, 6, whole_numbers=seed % 2 == 0)
    found = [placement for placement in every_placement(problem) if len(placement) >= least]
    if found:
        best = min(rank(problem, placement, objective)[0] for placement in found)
        assert best >= lower_bound(problem, objective, least) * (1 - TIE) - 1e-9


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), objective=st.sampled_from(OBJECTIVES))
def test_chains_that_remember_their_boards_give_placements_that_fit(seed: int, objective: Objective) -> None:
    problem = made_problem(seed, 4, 6)
    found, best = solve(problem, objective, search=labelled), solve(problem, objective)
    if found is not None:
        assert best is not None
        assert found.placement in every_placement(problem)
        assert rank(problem, best.placement, objective)[0] <= rank(problem, found.placement, objective)[0]
