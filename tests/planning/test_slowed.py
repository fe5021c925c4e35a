"""A board that is slower than it measured is reckoned with as it runs now, and the plan says so."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning.cost import DeviceCost, device_cost
from coordinator.planning.explain import explain
from coordinator.planning.planner import make_plan, repriced, worth_moving
from coordinator.planning.request import price, workload_of
from coordinator.planning.slowed import Slowed, slowed
from tests.planning import boards

GRAPH = boards.graph(12)
HALF = Slowed(times=2.0, because="runs at 0.50 of its profile since 12:03")


def cost(name: str = "a") -> DeviceCost:
    found = device_cost(GRAPH, name, boards.profile(name), 4 << 30, workload_of(boards.request()))
    assert isinstance(found, DeviceCost)
    return found


@given(st.floats(1.01, 20.0))
def test_all_steps_take_so_many_times_as_long_and_memory_and_link_are_what_they_were(times: float) -> None:
    before, by = cost(), Slowed(times=times, because="hot")
    after = slowed(before, by)
    assert after.stage_s(GRAPH.modules) == pytest.approx(times * before.stage_s(GRAPH.modules))
    chunk_s = before.stage_prefill_s(GRAPH.modules)
    assert chunk_s is not None and after.stage_prefill_s(GRAPH.modules) == pytest.approx(times * chunk_s)
    assert (after.link, after.memory_limit_bytes, after.held_ratio) == (
        before.link,
        before.memory_limit_bytes,
        before.held_ratio,
    )
    assert slowed(before, None) is before


@settings(max_examples=30, deadline=None)
@given(st.floats(1.1, 15.0))
def test_a_slowed_board_is_planned_with_like_a_board_that_measured_so(times: float) -> None:
    by = Slowed(times=times, because="hot")
    hot = [msgspec.structs.replace(boards.board("a"), slowed=by), boards.board("b"), boards.board("c", slower=2.0)]
    slow = [boards.board("a", slower=times), *hot[1:]]
    request = boards.request(boards_at_least=2, objective="throughput")
    one, other = (make_plan(GRAPH, candidates, request, boards.address) for candidates in (hot, slow))
    assert [(s.device, s.first_block, s.end_block) for s in one.stages] == [
        (s.device, s.first_block, s.end_block) for s in other.stages
    ]
    assert one.predicted_token_s == pytest.approx(other.predicted_token_s)


def test_the_plan_says_that_a_board_is_slowed_where_it_has_a_share_and_where_it_has_none() -> None:
    candidates = [boards.board("a"), msgspec.structs.replace(boards.board("b"), slowed=HALF)]
    both = make_plan(GRAPH, candidates, boards.request(boards_at_least=2), boards.address)
    [reason] = [stage.because for stage in both.stages if stage.device == "b"]
    assert "2.0 times slower per block than a, runs at 0.50 of its profile since 12:03;" in reason
    alone = make_plan(GRAPH, candidates, boards.request(), boards.address)
    [left] = alone.left_out
    assert left.device == "b" and left.because.endswith("it runs at 0.50 of its profile since 12:03")
    assert any("runs at 0.50" in line for line in explain(both, GRAPH, candidates))
    assert "runs at" not in "".join(stage.because for stage in both.stages if stage.device == "a")


def test_what_runs_is_repriced_with_the_slowed_board_and_moving_pays() -> None:
    candidates = [boards.board("a"), boards.board("b"), boards.board("c")]
    request = boards.request(boards_at_least=2, boards_at_most=2, objective="throughput")
    running = make_plan(GRAPH, candidates, request, boards.address)
    device = running.stages[0].device
    hot = [msgspec.structs.replace(c, slowed=HALF) if c.device == device else c for c in candidates]
    today = repriced(running, GRAPH, hot)
    assert today.predicted_slowest_s > 1.5 * running.predicted_slowest_s
    assert worth_moving(today, make_plan(GRAPH, hot, request, boards.address))


def test_boards_that_are_slowed_alike_are_not_worth_moving_between() -> None:
    candidates = [msgspec.structs.replace(boards.board(name), slowed=HALF) for name in "abc"]
    request = boards.request(boards_at_least=2, objective="throughput")
    running = make_plan(GRAPH, [boards.board(name) for name in "abc"], request, boards.address)
    better = make_plan(GRAPH, candidates, request, boards.address)
    assert not worth_moving(repriced(running, GRAPH, candidates), better)
    assert {c.slowed_because for c in price(GRAPH, candidates, request).costs} == {HALF.because}
