"""What a request wants kept is kept by every plan, or refused by its name; E8 and pins against brute force."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning.aims import pace_s
from coordinator.planning.cost import RESERVE_MIN_BYTES
from coordinator.planning.filled import CLOSE
from coordinator.planning.partition import Infeasible
from coordinator.planning.planner import make_plan, placement_of
from coordinator.planning.request import Candidate, price
from coordinator.planning.solving import value_of
from tests.planning.boards import MB, address, board, graph, request
from tests.planning.test_partition import every_placement
from wire.errors import UsageError

NAMES = ("a", "b", "c", "d")
BLOCKS = 6
MODULES = [module.name for module in graph(BLOCKS).modules]
ROOMS = st.sampled_from([60, 131, 134, 150, 400])
"""MB that a board offers: for nothing, for some blocks, for a part, for everything."""


def shelf(rooms: list[int]) -> list[Candidate]:
    return [board(name, 1 + 0.7 * n, room * MB) for n, (name, room) in enumerate(zip(NAMES, rooms, strict=False))]


@settings(max_examples=150, deadline=None)
@given(
    rooms=st.lists(ROOMS, min_size=1, max_size=4),
    pins=st.dictionaries(st.sampled_from(MODULES), st.sampled_from(NAMES), max_size=3),
    objective=st.sampled_from(["latency", "throughput", "memory", "ttft"]),
    most=st.sampled_from([None, 1, 2, 3]),
    excluded=st.sets(st.sampled_from(NAMES), max_size=1),
)
def test_every_plan_keeps_pins_memory_and_number_of_boards_and_is_best_or_says_what_is_missing(
    rooms: list[int],
    pins: dict[str, str],
    objective: Literal["latency", "throughput", "memory", "ttft"],
    most: int | None,
    excluded: set[str],
) -> None:
    candidates = shelf(rooms)
    asked = request(objective=objective, pins=pins, boards_at_most=most, excluded=tuple(sorted(excluded)))
    model = graph(BLOCKS)
    if excluded & set(pins.values()):
        with pytest.raises(UsageError, match="the same request excludes"):
            make_plan(model, candidates, asked, address)
        return
    priced = price(model, candidates, asked)
    possible = [p for p in every_placement(priced.problem) if most is None or len(p) <= most]
    possible = [p for p in possible if len(p) == 1 or all(priced.costs[run.device].link for run in p)]
    try:
        made = make_plan(model, candidates, asked, address)
    except Infeasible as refused:
        assert not possible
        assert refused.message and (refused.try_ or "boards can't share it" in refused.message)
        if pins and len(refused.message.split("pin")) > 1:
            assert any(module in refused.message for module in pins)
        return
    where = placement_of(made)
    assert all(where[module] == device for module, device in pins.items())
    assert not excluded & set(where.values())
    assert most is None or len(made.stages) <= most
    assert all(stage.memory_bytes <= stage.memory_limit_bytes for stage in made.stages)
    best = min(value_of(priced, placement, objective) for placement in possible)
    figures = {"latency": made.predicted_token_s, "throughput": pace_s(made),
               "memory": made.predicted_memory_share, "ttft": made.predicted_first_token_s}  # fmt: skip
    assert figures[objective] == pytest.approx(best, rel=2 * CLOSE)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pins_that_contradict_are_named(data: st.DataObject) -> None:
    places = sorted(data.draw(st.lists(st.integers(0, len(MODULES) - 1), min_size=3, max_size=3, unique=True)))
    one, other = data.draw(st.permutations(NAMES[:3]))[:2]
    first, between, last = (MODULES[place] for place in places)
    with pytest.raises(Infeasible) as refused:
        make_plan(graph(BLOCKS), shelf([400] * 3), request(pins={first: one, between: other, last: one}), address)
    assert "pins contradict" in refused.value.message
    assert all(word in refused.value.message for word in (last, between, one, other))


@pytest.mark.parametrize("percent", [0.0, 10.0, 35.0, 80.0])
def test_a_reserve_stays_free_on_every_board(percent: float) -> None:
    candidates = shelf([1000] * 4)
    made = make_plan(graph(), candidates, request(reserve_percent=percent, boards_at_least=4), address)
    for stage in made.stages:
        kept = max(RESERVE_MIN_BYTES, int(1000 * MB * percent / 100))
        assert stage.memory_limit_bytes == 1000 * MB - kept
        assert stage.memory_bytes <= stage.memory_limit_bytes
    assert made.limits.reserve_percent == percent


def test_a_larger_reserve_spreads_the_model_or_says_that_it_does_not_fit() -> None:
    candidates = shelf([250, 250])
    assert len(make_plan(graph(), candidates, request(reserve_percent=10.0), address).stages) == 1
    assert len(make_plan(graph(), candidates, request(reserve_percent=35.0), address).stages) == 2
    with pytest.raises(Infeasible, match=r"of tiny-chat fits on no board: it needs .* short"):
        make_plan(graph(), candidates, request(reserve_percent=80.0), address)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reserve_percent": 91.0}, "91 % of each board's memory can't stay free"),
        ({"reserve_percent": -1.0}, "can't stay free"),
        ({"reserve_percent": float("nan")}, "can't stay free"),
        ({"engine": "abacus"}, "engine 'abacus' is unknown"),
    ],
)
def test_what_no_plan_can_keep_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        make_plan(graph(), shelf([400]), request(**fields), address)
    assert refused.value.try_


def test_an_engine_that_no_board_has_measured_is_named() -> None:
    with pytest.raises(Infeasible, match="has not measured block, embedding, head of tiny-chat on torch"):
        make_plan(graph(), shelf([400]), request(engine="torch"), address)
