"""What is loaded stays where that is as good, and moves where it pays."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.planning.cost import DeviceCost, device_cost, stage_modules
from coordinator.planning.moving import TOKENS_AHEAD, held_by, moving_s
from coordinator.planning.partition import Infeasible
from coordinator.planning.plan import Plan
from coordinator.planning.planner import Candidate, make_plan, same_placement
from coordinator.planning.replicas import with_standbys
from coordinator.planning.request import workload_of
from tests.planning.boards import MB, address, board, graph, link, request

RATE = 100e6 / 8
LAN = link(0.5e-3, RATE)


def shelf(**slower: float) -> list[Candidate]:
    speeds = {"a": 1.0, "b": 1.0, "c": 1.0, **slower}
    return [board(name, speed, 200 * MB, link_to_broker=LAN) for name, speed in speeds.items()]


def plan(candidates: list[Candidate], running: Plan | None = None, **changes: object) -> Plan:
    held = held_by(running, graph()) if running else {}
    return make_plan(graph(), candidates, request(held=held, **changes), address)


def moved(before: Plan, after: Plan) -> int:
    """Bytes of weights that boards do not hold yet."""
    held, model = held_by(before, graph()), graph()
    needed = [(stage.device, module) for stage in after.stages for module in stage_modules(model, stage)]
    return sum(module.weight_bytes for device, module in needed if module.name not in held.get(device, ()))


def test_moving_a_module_costs_its_bytes_at_the_links_rate_shared_over_the_tokens_ahead() -> None:
    asked = request()
    cost = device_cost(graph(), "a", shelf()[0].profile, 200 * MB, workload_of(asked))  # type: ignore[arg-type]
    assert isinstance(cost, DeviceCost)
    seconds = moving_s(graph(), [cost], {"a": ("embedding", "block.0")})
    assert seconds[0, :2].tolist() == [0.0, 0.0]
    assert seconds[0, 2] == pytest.approx(2 * MB / RATE / TOKENS_AHEAD, rel=0.05)
    assert seconds[0, 31] == pytest.approx(28 * MB / RATE / TOKENS_AHEAD, rel=0.05)
    unlinked = msgspec.structs.replace(cost, link=None)
    assert not moving_s(graph(), [unlinked], {}).any()


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_boards_that_became_a_little_faster_get_nothing_more(objective: str) -> None:
    running = plan(shelf(), objective=objective, boards_at_least=2, boards_at_most=2)
    names = [stage.device for stage in running.stages]
    other = next(name for name in ("a", "b", "c") if name not in names)
    better = shelf(**{other: 0.997})
    limits = {"objective": objective, "boards_at_least": 2, "boards_at_most": 2}
    fresh, again = plan(better, **limits), plan(better, running, **limits)
    assert moved(running, fresh) > 0, "without what is loaded another board would be taken"
    assert same_placement(running, again) and moved(running, again) == 0
    assert "what is loaded stays: without the time to move it" in again.because
    assert again.predicted_token_s >= fresh.predicted_token_s * 0.999, "the figures are without what moving takes"


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_board_that_became_much_slower_loses_its_share(objective: str) -> None:
    limits = {"objective": objective, "boards_at_least": 2, "boards_at_most": 2}
    running = plan(shelf(), **limits)
    slow = running.stages[0].device
    again = plan(shelf(**{slow: 4.0}), running, **limits)
    assert slow not in [stage.device for stage in again.stages]
    kept = running.stages[1].device
    assert kept in [stage.device for stage in again.stages], "the other one keeps what it can"
    assert moved(running, again) < graph().weight_bytes


def test_copies_that_wait_count_as_loaded() -> None:
    candidates = [board(name, 1.0, 400 * MB, link_to_broker=LAN) for name in ("a", "b", "c")]
    made = with_standbys(plan(candidates, boards_at_least=2), graph(), candidates, 2)
    held = held_by(made, graph())
    for standby in made.standbys:
        names = {module.name for module in stage_modules(graph(), made.stages[standby.stage])}
        assert names <= set(held[standby.device])


def test_what_is_loaded_makes_nothing_possible_that_is_not() -> None:
    running = plan(shelf(), boards_at_least=2)
    with pytest.raises(Infeasible):
        plan([board("a", 1.0, 100 * MB, link_to_broker=LAN)], running)
