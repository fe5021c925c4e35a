"""Second copies of stages: never beside the first, within memory, as cheap as can be, and a ring that closes again."""

from __future__ import annotations

from itertools import product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning.best import best_plan
from coordinator.planning.copied import best_with_copies, planned_with_copies
from coordinator.planning.cost import stage_memory, stage_modules
from coordinator.planning.explain import explain
from coordinator.planning.partition import Infeasible
from coordinator.planning.plan import Plan
from coordinator.planning.planner import Candidate, request_of
from coordinator.planning.replicas import (
    boards_of,
    covered,
    held_on,
    taken_over,
    with_standbys,
)
from coordinator.planning.request import workload_of
from hwprofiles.reading import Absent
from models.graph import Graph
from tests.planning.boards import MB, address, board, graph, request
from wire.errors import UsageError

GRAPH = graph(6)


def plan(candidates: list[Candidate], boards: int = 1, model: Graph = GRAPH, **changes: object) -> Plan:
    wanted = request(boards_at_least=boards, boards_at_most=boards, **changes)
    make = best_plan if wanted.replicas == 1 else best_with_copies
    return make(model, candidates, wanted, address)


def central(_sender: str, _receiver: str, central_s: float) -> tuple[str, float]:
    return "", central_s


def places(made: Plan) -> dict[int, set[str]]:
    """Stage -> all devices that have it loaded."""
    found = {stage.stage: {stage.device} for stage in made.stages}
    for standby in made.standbys:
        found[standby.stage].add(standby.device)
    return found


BOARDS = st.lists(st.tuples(st.sampled_from([1.0, 1.5, 4.0]), st.integers(110, 420)), min_size=2, max_size=4).map(
    lambda found: [board(f"b{n}", slower, size * MB) for n, (slower, size) in enumerate(found)]
)


@settings(max_examples=80, deadline=None)
@given(BOARDS, st.integers(1, 3), st.integers(2, 3), st.sampled_from(["latency", "throughput"]))
def test_copies_are_elsewhere_and_fit_and_cover_or_are_refused_rightly(
    candidates: list[Candidate], boards: int, replicas: int, objective: str
) -> None:
    """Against brute force: copies are refused only where no way to place them exists, and none is cheaper."""
    try:
        bare = plan(candidates, boards, objective=objective)
    except Infeasible:
        return
    ways = brute_force(bare, candidates, replicas)
    try:
        made = with_standbys(bare, GRAPH, candidates, replicas)
    except Infeasible as error:
        assert ways == [], error.message
        assert error.try_ and "copies of each stage" in error.message
        partly = with_standbys(bare, GRAPH, candidates, replicas, partly=True)
        assert partly.replicas_because and len(partly.standbys) < (replicas - 1) * len(bare.stages)
        check_memory(partly, candidates)
        return
    assert all(len(found) == replicas for found in places(made).values())
    assert covered(made) and made.replicas_because == ""
    check_memory(made, candidates)
    assert value(made) == pytest.approx(min(ways))
    for lost in (candidate.device for candidate in candidates):
        assert all(found - {lost} for found in places(made).values()), f"without {lost} a stage is nowhere"


def check_memory(made: Plan, candidates: list[Candidate]) -> None:
    for name, cost in boards_of(made, GRAPH, candidates).items():
        assert held_on(made, name) <= cost.memory_limit_bytes
    for standby in made.standbys:
        stage = made.stages[standby.stage]
        cost = boards_of(made, GRAPH, candidates)[standby.device]
        needed = stage_memory(GRAPH, workload_of(request_of(made)), cost, stage_modules(GRAPH, stage))
        assert (standby.held_bytes, standby.memory_bytes) == needed


def value(made: Plan) -> float:
    """What the choice is to keep small: the time of each copy's stage there, with its hops; and, where many answers in
    little time are wanted, what the board has to do besides."""
    total = 0.0
    for standby in made.standbys:
        total += standby.compute_s + standby.hop_in_s + standby.hop_s
        if made.objective == "throughput":
            total += sum(stage.compute_s for stage in made.stages if stage.device == standby.device)
    return total


def brute_force(bare: Plan, candidates: list[Candidate], replicas: int) -> list[float]:
    """The values of all ways to place all copies."""
    costs = boards_of(bare, GRAPH, candidates)
    alone = {
        (stage.stage, standby.device): standby
        for stage in bare.stages
        for candidate in candidates
        if candidate.device != stage.device
        for standby in _one(bare, stage.stage, candidate.device, candidates)
    }
    slots = [stage.stage for stage in bare.stages for _ in range(replicas - 1)]
    found = []
    for devices in product(costs, repeat=len(slots)):
        keys = list(zip(slots, devices, strict=True))
        if len(set(keys)) < len(keys) or any(key not in alone for key in keys):
            continue
        made = msgspec.structs.replace(bare, standbys=tuple(alone[key] for key in keys))
        if all(held_on(made, name) <= cost.memory_limit_bytes for name, cost in costs.items()):
            found.append(value(made))
    return found


def _one(bare: Plan, stage: int, device: str, candidates: list[Candidate]) -> list:  # type: ignore[type-arg]
    """The copy of a stage on a device with nothing else to place, if it fits there."""
    barred = [(s.stage, c.device) for s in bare.stages for c in candidates if (s.stage, c.device) != (stage, device)]
    return list(with_standbys(bare, GRAPH, candidates, 2, barred=barred, partly=True).standbys)


def test_without_replicas_a_plan_has_no_copies() -> None:
    made = plan([board("a"), board("b")], 2)
    assert (made.replicas, made.standbys, made.replicas_because) == (1, (), "")


def test_a_spare_board_is_chosen_before_one_that_works_where_throughput_counts() -> None:
    made = plan([board("a"), board("b"), board("spare")], 2, replicas=2, objective="throughput")
    spare = ({"a", "b", "spare"} - {stage.device for stage in made.stages}).pop()
    assert {standby.device for standby in made.standbys} == {spare}


def test_too_few_boards_and_too_little_memory_are_said() -> None:
    with pytest.raises(Infeasible, match=r"2 copies of each stage need 2 boards, and there are 1 \(a\)"):
        plan([board("a")], replicas=2)
    small = [board("a", 1.0, 400 * MB), board("b", 8.0, 150 * MB)]
    with pytest.raises(Infeasible, match=r"stage 0 \(embedding \+ 0-5 \+ head\) needs .* left are b") as caught:
        best_with_copies(GRAPH, small, request(replicas=2, boards_at_most=1), address)
    assert "fewer --replicas" in caught.value.try_


def test_an_error_names_a_few_of_many() -> None:
    crowd = [board(f"b{number}", 1.0, 150 * MB) for number in range(6)]
    with pytest.raises(Infeasible, match=r"; and so on for 3 more") as caught:
        best_with_copies(graph(30), crowd, request(boards_at_least=6, replicas=6, objective="throughput"), address)
    assert len(caught.value.message) < 700


def test_another_number_of_boards_is_taken_when_copies_fit_there_only() -> None:
    """One board alone is fastest, but none of the others can hold all of it besides."""
    model = graph(30, tied=False, block_bytes=8 * MB)
    boards = [board("a", 1.0, 1_000 * MB), board("b", 2.0, 415 * MB), board("c", 2.0, 415 * MB)]
    assert len(best_plan(model, boards, request(), address).stages) == 1
    made = best_with_copies(model, boards, request(replicas=2), address)
    assert len(made.stages) > 1 and covered(made) and "no room for all copies" in made.because
    assert (made.limits.boards_at_least, made.limits.boards_at_most) == (1, None)


def test_fewer_requests_at_once_where_their_memory_leaves_no_room_for_copies() -> None:
    boards = [board("a", 1.0, 330 * MB), board("b", 1.0, 330 * MB)]
    alone = planned_with_copies(graph(30), boards, request(context_tokens=2_048), None, address)
    both = planned_with_copies(graph(30), boards, request(context_tokens=2_048, replicas=2), None, address)
    assert both.slots < alone.slots and covered(both)


def test_in_haste_an_answer_goes_on_with_the_copies_that_there_can_be() -> None:
    made = planned_with_copies(GRAPH, [board("a")], request(replicas=2), 1, address, in_haste=True)
    assert len(made.stages) == 1 and made.standbys == () and "there are 1 (a)" in made.replicas_because


def test_boards_left_out_or_without_a_link_hold_no_copies() -> None:
    boards = [board("a"), board("b"), board("c")]
    made = plan(boards, 2, replicas=2, excluded=("c",))
    assert "c" not in {standby.device for standby in made.standbys} and covered(made)
    unlinked = [*boards[:2], board("c", link_to_broker=Absent("no broker"))]
    assert "c" not in {standby.device for standby in plan(unlinked, 2, replicas=2).standbys}
    alone = plan([board("a"), board("c", link_to_broker=Absent("no broker"))], 1, replicas=2)
    assert [standby.device for standby in alone.standbys] == ["c"], "a whole model needs no link"


@pytest.mark.parametrize("replicas", [0, 9, -1])
def test_impossible_numbers_are_refused(replicas: int) -> None:
    with pytest.raises(UsageError, match="copies of each stage"):
        plan([board("a"), board("b")], replicas=replicas)


def test_a_pin_and_copies_contradict() -> None:
    with pytest.raises(UsageError, match="a pin"):
        plan([board("a"), board("b")], replicas=2, pins={"head": "a"})


# Taking over.


def ready(made: Plan) -> set[tuple[int, str]]:
    return {(standby.stage, standby.device) for standby in made.standbys}


@settings(max_examples=60, deadline=None)
@given(BOARDS, st.integers(1, 3), st.data())
def test_after_the_loss_of_any_board_the_same_cut_goes_on(
    candidates: list[Candidate], boards: int, data: st.DataObject
) -> None:
    try:
        made = plan(candidates, boards, replicas=2)
    except Infeasible:
        return
    gone = data.draw(st.sampled_from([candidate.device for candidate in candidates]))
    lost = {stage.stage for stage in made.stages if stage.device == gone}
    taken = taken_over(made, lost, ready(made), {gone}, central)
    if not lost:
        assert taken is None, "nothing of the ring is lost"
        return
    assert taken is not None
    assert gone not in {stage.device for stage in taken.stages} | {standby.device for standby in taken.standbys}
    for before, after in zip(made.stages, taken.stages, strict=True):
        same = ("stage", "embedding", "head", "first_block", "end_block", "hop_bytes")
        assert all(getattr(before, field) == getattr(after, field) for field in same)
        assert before == after or before.stage in lost or gone in (_neighbours(made, before.stage))
        assert after.hop_s == pytest.approx(before.hop_s), "all links are alike here"
        assert after.transfer_s == pytest.approx(before.transfer_s)
    assert all(len(found) == len({*found}) for found in places(taken).values())
    assert not any(s.device == taken.stages[s.stage].device for s in taken.standbys), "no copy beside its stage"
    sums = sum(stage.compute_s + stage.hop_s for stage in taken.stages)
    assert taken.predicted_token_s == pytest.approx(sums)
    check_memory(taken, [candidate for candidate in candidates if candidate.device != gone])
    assert taken.replicas_because, "a copy is missing now"
    again = with_standbys(taken, GRAPH, [c for c in candidates if c.device != gone], 2, partly=True)
    assert set(ready(taken)) <= set(ready(again)), "copies that are there stay"


def _neighbours(made: Plan, stage: int) -> set[str]:
    count = len(made.stages)
    return {made.stages[stage - 1].device, made.stages[(stage + 1) % count].device}


def test_what_is_not_loaded_yet_or_gone_too_does_not_take_over() -> None:
    made = plan([board("a"), board("b"), board("c")], 2, replicas=2)
    assert taken_over(made, {0}, set(), set(), central) is None
    [heir] = [standby.device for standby in made.standbys if standby.stage == 0]
    assert taken_over(made, {0}, ready(made), {heir}, central) is None
    assert taken_over(made, {0, 1}, {(0, heir)}, set(), central) is None, "one of two"
    assert taken_over(made, set(), ready(made), set(), central) is None


def test_hops_round_the_copy_take_the_way_that_is_given_and_the_others_stay() -> None:
    made = plan([board("a"), board("b"), board("c"), board("d")], 3, replicas=2)
    asked = []

    def way(sender: str, receiver: str, central_s: float) -> tuple[str, float]:
        asked.append((sender, receiver))
        return f"mqtt://{receiver}", central_s / 2

    taken = taken_over(made, {1}, ready(made), {made.stages[1].device}, way)
    assert taken is not None and taken.topology == "direct"
    devices = [stage.device for stage in taken.stages]
    assert asked == [(devices[0], devices[1]), (devices[1], devices[2])]
    assert [stage.inbox.broker for stage in taken.stages] == ["", f"mqtt://{devices[1]}", f"mqtt://{devices[2]}"]
    assert taken.stages[2].hop_s == made.stages[2].hop_s


def test_a_second_loss_says_what_happened_last_and_not_all_that_ever_did() -> None:
    made = plan([board("a"), board("b"), board("c")], 2, replicas=3)
    once = taken_over(made, {0}, ready(made), {made.stages[0].device}, central)
    assert once is not None
    twice = taken_over(once, {0}, ready(once), {once.stages[0].device}, central)
    assert twice is not None and twice.because.count("After a loss") == 1
    assert twice.stages[0].device in twice.because


def test_the_explanation_shows_the_copies() -> None:
    boards = [board("a"), board("b"), board("c")]
    made = plan(boards, 2, replicas=2)
    lines = explain(made, GRAPH, boards)
    assert "copies that wait" in lines
    for standby in made.standbys:
        assert any(line.startswith(f"  stage {standby.stage} on {standby.device}: ") for line in lines)
    assert any("after the loss of any one board" in line for line in lines)
    bare = plan(boards, 2)
    assert "copies that wait" not in explain(bare, GRAPH, boards)
