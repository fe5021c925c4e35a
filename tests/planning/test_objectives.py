"""Each objective's plan is the best there is by its own measure: against brute force, and against all other plans."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning import aims
from coordinator.planning.cost import DeviceCost, LinkCost, Power
from coordinator.planning.explain import explain
from coordinator.planning.mixed import TOLERANCE, Idle, Mix, Worst, solve_mixed
from coordinator.planning.partition import Infeasible, Placement, latency_s, slowest_s
from coordinator.planning.plan import Objective, Plan
from coordinator.planning.planner import Candidate, make_plan, repriced, same_placement
from coordinator.planning.request import Priced, price
from coordinator.planning.solving import solve, token_j, value_of
from tests.planning.boards import MB, address, board, graph, link, request
from tests.planning.test_partition import every_placement, made_problem, worked_example
from wire.errors import Refused, UsageError

SINGLE: tuple[Objective, ...] = ("latency", "ttft", "throughput", "energy", "memory")
POWERS = (Power(active_w=12.0, idle_w=4.0), Power(active_w=5.0, idle_w=1.5), Power(active_w=7.5, idle_w=2.0))


def made_mix(seed: int, devices: int, modules: int, parts: int, idle: bool) -> Mix:
    draw = np.random.default_rng(seed)
    problem, other = made_problem(seed, devices, modules), made_problem(seed + 1, devices, modules)
    other = replace(other, fits=problem.fits)
    worst = [
        Worst(draw.uniform(0.1, 5), other.stage_s(), other.transfer_s),
        Worst(0.7, problem.stage_s(), problem.hop_s),
    ]
    watts = draw.integers(1, 4, devices).astype(np.float64)
    return Mix(
        stage=problem.stage_s(),
        hop=problem.hop_s,
        worst=tuple(worst[:parts]),
        idle=Idle(watts, other.stage_s(), other.hop_s) if idle else None,
    )


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    devices=st.integers(1, 4),
    parts=st.integers(0, 2),
    idle=st.booleans(),
    limits=st.sampled_from([(1, None), (2, 3), (1, 2), (3, None)]),
)
def test_a_sum_of_unlike_parts_is_as_small_as_brute_force_finds_it(
    seed: int, devices: int, parts: int, idle: bool, limits: tuple[int, int | None]
) -> None:
    mix, (least, most) = made_mix(seed, devices, 6, parts, idle), limits
    everything = every_placement(made_problem(seed, devices, 6))
    everything = [placement for placement in everything if least <= len(placement) <= (most or devices)]
    found = solve_mixed(mix, least, most)
    assert (found is None) == (not everything)
    if found is not None:
        best = min(mix.cost(placement) for placement in everything)
        assert found.cost == pytest.approx(mix.cost(found.placement))
        assert best * (1 - 1e-9) <= found.cost <= best * (1 + 2 * TOLERANCE)
        assert found.bound <= best * (1 + 1e-9)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), parts=st.integers(0, 2), idle=st.booleans())
def test_over_many_devices_the_cost_is_between_the_bound_and_what_eight_of_them_give(
    seed: int, parts: int, idle: bool
) -> None:
    mix = made_mix(seed, 10, 8, parts, idle)
    found = solve_mixed(mix)
    if found is not None:
        assert found.bound <= found.cost == pytest.approx(mix.cost(found.placement))
        assert np.isfinite(found.cost)


def test_a_search_that_may_not_look_everywhere_says_how_far_it_can_be_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.planning.mixed.FEWEST_SEARCHES", 1)
    monkeypatch.setattr("coordinator.planning.mixed.MOST_SEARCHES", 1)
    looked_once = [solve_mixed(made_mix(seed, 4, 6, 2, True)) for seed in range(20)]
    assert any(found.bound < found.cost * (1 - 1e-3) for found in looked_once if found is not None)


# The worked example as boards that were measured so.


def example(limits: tuple[int, int, int], **changes: Any) -> Priced:
    """Its seconds, sizes and links, each as the profile of a board would give them."""
    problem = worked_example(limits)
    model = graph(2, tied=False)
    keys = [f"key/{place}" for place in range(4)]
    modules = tuple(
        msgspec.structs.replace(module, profile_key=key) for module, key in zip(model.modules, keys, strict=True)
    )
    costs = []
    for d in range(3):
        seconds = {key: float(problem.seconds[d, place]) for place, key in enumerate(keys)}
        costs.append(
            DeviceCost(
                device=problem.devices[d], usable_bytes=0, memory_limit_bytes=limits[d], worker_base_bytes=0,
                overhead_s=0.0, decode_s=seconds, batches=(), prefill_overhead_s=0.0,
                prefill_s={key: 10 * value for key, value in seconds.items()}, held_ratio={},
                link=LinkCost(one_way_s=0.0, probe_bytes=0, bytes_per_s=1.0), link_because="", power=POWERS[d],
            )
        )  # fmt: skip
    sizes = np.array([1, 2, 2, 1])
    sums = np.concatenate([[0], np.cumsum(sizes)])
    share = (sums[None, :] - sums[:, None])[None] / np.array(limits, dtype=np.float64)[:, None, None]
    priced = Priced(
        graph=msgspec.structs.replace(model, modules=modules), request=request(**changes), workload=None,  # type: ignore[arg-type]
        costs=tuple(costs), left_out=(), hop_bytes=(0, 4, 2, 2, 0), direct={},
    )  # fmt: skip
    vars(priced)["problem"] = replace(problem, share=share)
    vars(priced)["prefill_problem"] = replace(
        problem, seconds=10 * problem.seconds, hop_s=10 * problem.hop_s, transfer_s=10 * problem.transfer_s, share=share
    )
    return priced


WEIGHTS = {"latency": 1.0, "energy": 0.5, "memory": 2.0}


@pytest.mark.parametrize("limits", [(6, 6, 6), (6, 3, 3), (2, 3, 3), (1, 3, 2)])
def test_each_objective_is_best_by_its_own_measure_on_the_worked_example(limits: tuple[int, int, int]) -> None:
    placements: dict[str, Placement] = {}
    for objective in SINGLE:
        found = solve(example(limits, objective=objective))
        assert found is not None
        assert found.value == pytest.approx(value_of(example(limits), found.placement, objective))
        placements[objective] = found.placement
    weighted = solve(example(limits, objective="weighted", weights=WEIGHTS))
    assert weighted is not None
    placements["weighted"] = weighted.placement
    priced = example(limits)
    everything = every_placement(priced.problem)
    for objective in SINGLE:
        own = value_of(priced, placements[objective], objective)
        for other in placements:
            assert own <= value_of(priced, placements[other], objective) * (1 + 2 * TOLERANCE), (objective, other)
        assert own == pytest.approx(min(value_of(priced, one, objective) for one in everything), rel=2 * TOLERANCE)

    def cost(placement: Placement) -> float:
        parts = {name: value_of(priced, placement, name) for name in ("latency", "energy", "memory")}
        best = {name: value_of(priced, placements[name], name) for name in ("latency", "energy")}
        return parts["latency"] / best["latency"] + 0.5 * parts["energy"] / best["energy"] + 2 * parts["memory"]

    assert weighted.value == pytest.approx(cost(weighted.placement))
    assert weighted.value == pytest.approx(min(cost(placement) for placement in everything), rel=2 * TOLERANCE)


def test_energy_is_power_while_busy_and_idle_power_for_the_rest_of_the_round() -> None:
    priced = example((6, 3, 3))
    placement = next(p for p in every_placement(priced.problem) if [r.device for r in p] == [0, 1] and p[0].end == 2)
    # Device 0 computes 5 s, device 1 two seconds, half a second is on the way: a round of 7.5 s.
    assert latency_s(priced.problem, placement) == 7.5
    assert token_j(priced, placement) == pytest.approx(12 * 5 + 4 * 2.5 + 5 * 2 + 1.5 * 5.5)
    assert value_of(priced, placement, "energy") == pytest.approx(token_j(priced, placement))


# Plans for boards.


def shelf() -> list[Candidate]:
    far = link(5e-3, 20e6 / 8)
    boards = [board("orin", 1.0), board("nuc", 1.25), board("pi5", 2.0), board("pi4", 4.0, link_to_broker=far)]
    watts = [(25.0, 8.0), (30.0, 10.0), (9.0, 3.0), (6.0, 2.5)]
    return [
        msgspec.structs.replace(one, power=Power(active_w=active, idle_w=idle))
        for one, (active, idle) in zip(boards, watts, strict=True)
    ]


def plan(objective: Objective, **changes: Any) -> Plan:
    return make_plan(
        graph(), shelf(), request(objective=objective, **{"slots": 8, "context_tokens": 512, **changes}), address
    )


def test_plans_for_each_objective_beat_the_others_by_their_own_figure() -> None:
    plans = {objective: plan(objective) for objective in SINGLE}
    figures = {
        "latency": lambda made: made.predicted_token_s,
        "ttft": lambda made: made.predicted_first_token_s,
        "throughput": aims.pace_s,
        "energy": lambda made: made.predicted_token_j,
        "memory": lambda made: made.predicted_memory_share,
    }
    for objective, figure in figures.items():
        assert aims.figure(plans[objective]) == pytest.approx(figure(plans[objective]))
        for other in plans.values():
            assert figure(plans[objective]) <= figure(other) * (1 + 2 * TOLERANCE), (objective, other.objective)
    assert [stage.device for stage in plans["energy"].stages] == ["pi5"], "of all, it takes least for a token"
    assert len(plans["memory"].stages) == 4 and len(plans["ttft"].stages) > 1


@pytest.mark.parametrize("objective", SINGLE)
def test_a_plan_of_each_objective_can_be_explained_and_made_again(objective: Objective) -> None:
    made, powers = plan(objective), {one.device: one.power for one in shelf() if one.power}
    lines = "\n".join(explain(made, graph(), shelf()))
    assert aims.AIMS[objective].words in lines
    assert "what would change the answer" in lines and " J per token" in lines
    for stage in made.stages:
        assert stage.compute_j == pytest.approx(stage.compute_s * powers[stage.device].active_w)
    again = repriced(made, graph(), shelf())
    assert aims.figure(again) == pytest.approx(aims.figure(made))
    assert again.objective == made.objective and same_placement(again, made)


def test_a_weighted_plan_says_what_its_parts_come_to() -> None:
    made = plan("weighted", weights={"latency": 1.0, "memory": 5.0})
    assert "1 x latency" in made.because and "5 x memory" in made.because
    slower = made.predicted_token_s / plan("latency").predicted_token_s
    assert made.predicted_cost == pytest.approx(slower + 5 * (made.predicted_memory_share or math.nan), rel=1e-3)
    lines = "\n".join(explain(made, graph(), shelf()))
    assert "least weighted cost" in lines


def test_a_single_board_that_is_not_the_fastest_is_not_called_the_fastest() -> None:
    made = plan("energy")
    assert [stage.device for stage in made.stages] == ["pi5"]
    assert made.alone.startswith("orin alone: 34.1 ms per token; this plan") and "don't split" not in made.alone


def test_the_cost_of_a_weighted_placement_is_the_same_whoever_asks() -> None:
    weights = {"latency": 1.0, "memory": 5.0, "energy": 0.5}
    made = plan("weighted", weights=weights, excluded=("nuc",))
    worse = plan("weighted", weights=weights, excluded=("nuc",), pins={"head": "pi4"})
    assert (made.predicted_cost or 0) < (worse.predicted_cost or 0)
    assert repriced(made, graph(), shelf()).predicted_cost == pytest.approx(made.predicted_cost)
    assert repriced(worse, graph(), shelf()).predicted_cost == pytest.approx(worse.predicted_cost)
    assert aims.figure(worse) == worse.predicted_cost


def test_energy_is_refused_where_a_board_has_not_measured_its_power() -> None:
    unknown = [*shelf(), board("new", 1.0), board("older", 3.0)]
    with pytest.raises(Refused, match="the power of new, older was not measured") as refused:
        make_plan(graph(), unknown, request(objective="energy"), address)
    assert refused.value.try_.endswith("--exclude new --exclude older")
    with pytest.raises(Refused, match="was not measured"):
        make_plan(graph(), unknown, request(objective="weighted", weights={"latency": 1.0, "energy": 0.1}), address)
    with pytest.raises(Refused) as refused:
        make_plan(graph(), unknown[-2:], request(objective="energy"), address)
    assert refused.value.try_ == "another objective", "to leave out all boards would help nobody"
    left_out = make_plan(graph(), unknown, request(objective="energy", excluded=("new", "older")), address)
    assert left_out.predicted_token_j is not None
    assert make_plan(graph(), [board("new")], request(), address).predicted_token_j is None, "never guessed"


def test_a_load_is_carried_by_the_plan_that_is_soonest() -> None:
    fastest = 1 / aims.pace_s(plan("throughput"))
    some = plan("throughput", tokens_per_s=0.5 * fastest)
    assert aims.pace_s(some) <= aims.BUSY_SHARE / (0.5 * fastest)
    assert plan("latency").predicted_token_s <= some.predicted_token_s < plan("throughput").predicted_token_s
    assert len(some.stages) < len(plan("throughput").stages), "boards that the load does not need are left out"
    assert f"carries {0.5 * fastest:g} tokens/s" in some.because
    little = plan("throughput", tokens_per_s=1.0)
    assert [stage.device for stage in little.stages] == ["orin"]


def test_a_load_beyond_all_boards_is_refused_with_what_binds() -> None:
    with pytest.raises(Infeasible, match=r"10000 tokens/s are more than these boards carry: at most .* binds\)"):
        plan("throughput", tokens_per_s=10_000.0)
    slow = [board(name, link_to_broker=link(1e-3, 2_000.0)) for name in ("a", "b")]
    small = [Candidate(device=b.device, profile=b.profile, usable_memory_bytes=190 * MB) for b in slow]
    with pytest.raises(Infeasible, match="a link binds"):
        make_plan(graph(), small, request(objective="throughput", tokens_per_s=50.0), address)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"objective": "fast"}, "objective 'fast' is unknown"),
        ({"objective": "weighted"}, "nothing is weighed"),
        ({"objective": "latency", "weights": {"latency": 1.0}}, "weights, and objective latency"),
        ({"objective": "weighted", "weights": {"weighted": 1.0}}, "'weighted' can't be weighed"),
        ({"objective": "weighted", "weights": {"latency": 0.0}}, "a weight of 0 for latency"),
        ({"objective": "weighted", "weights": {"latency": math.nan}}, "a weight of nan for latency"),
        ({"objective": "latency", "tokens_per_s": 5.0}, "a load of 5 tokens/s, and objective latency"),
        ({"objective": "throughput", "tokens_per_s": 0.0}, "a load of 0 tokens/s is not possible"),
        ({"objective": "throughput", "tokens_per_s": math.nan}, "a load of nan tokens/s is not possible"),
    ],
)
def test_what_contradicts_itself_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_plan(graph(), shelf(), request(**fields), address)


def test_more_than_eight_boards_are_planned_for_every_objective_with_a_stated_gap() -> None:
    power = Power(active_w=10.0, idle_w=3.0)
    many = [msgspec.structs.replace(board(f"b{n:02}", 1 + n % 4, 200 * MB), power=power) for n in range(12)]
    priced = {one: price(graph(), many, request(objective=one)) for one in SINGLE}
    found = {one: solve(asked) for one, asked in priced.items()}
    for objective, solution in found.items():
        assert solution is not None
        assert all(priced[objective].problem.fits[run] for run in solution.placement)
        assert "above a bound" in solution.because or objective in ("ttft", "energy")
        for other in ("latency", "throughput", "memory"):
            rival = found[other]
            assert rival is not None
            own = value_of(priced[objective], solution.placement, objective)
            assert own <= value_of(priced[objective], rival.placement, objective) * (1 + 1e-9)
    assert slowest_s(priced["throughput"].problem, found["throughput"].placement) > 0  # type: ignore[union-attr]
