"""What the benchmark of the planner makes of boards, cuts and answers, on figures that are made up."""

from __future__ import annotations

import random

import pytest
from msgspec import to_builtins
from msgspec.structs import replace

from benchmarks.parts import changed, chosen, load, predicted, random_shelves
from coordinator.planning.plan import Objective
from coordinator.planning.planner import placement_of
from tests.planning.boards import board
from tests.planning.test_planner import ETHERNET, plan


def test_random_boards_and_links_keep_their_bounds_and_their_seed() -> None:
    for seed in range(50):
        boards = random_shelves.random_boards(random.Random(seed), 5)
        assert boards == random_shelves.random_boards(random.Random(seed), 5)
        assert all(0.15 <= one.speed <= 0.6 for one in boards) and sum(one.speed for one in boards) <= 1.4
        link = random_shelves.random_link(random.Random(seed))
        assert link.rate_bytes_per_s is not None
        assert 5e6 / 8 <= link.rate_bytes_per_s <= 200e6 / 8 and 0 <= link.delay_s <= 0.010


def case(objective: Objective, streams: int, token_s: float) -> predicted.Case:
    """Two stages of 10 ms, hops of 5 ms: 30 ms per token of one stream, 15 of two."""
    candidates = [board(name, 1.0, link_to_broker=ETHERNET) for name in ("b0", "b1")]
    base = plan(candidates, boards_at_least=2, objective=objective, slots=streams)
    stages = tuple(
        replace(stage, compute_s=0.010, batches_s=(), memory_bytes=110_000_000, device=f"b{stage.stage}")
        for stage in base.stages
    )
    made = to_builtins(
        replace(
            base,
            model="m",
            stages=stages,
            predicted_token_s=0.030,
            predicted_slowest_s=0.010,
            predicted_first_token_s=0.5,
        )
    )
    gap_s = token_s * streams
    found = [
        load.Stream(asked_s=0.0, tokens_s=[1.0 + gap_s * n for n in range(21)], end={"token_s": gap_s})
        for _ in range(streams)
    ]
    nothing = {"decode_rows": 0, "decode_busy_s": 0.0}
    after = {"decode_rows": 100, "decode_busy_s": 0.8}
    held = {0: 100e6, 1: 100e6}
    return predicted.case_of(made, found, {0: nothing, 1: nothing}, {0: after, 1: after}, held, "links")


def test_one_stream_is_held_against_the_time_of_a_token() -> None:
    found = case("latency", 1, 0.025)
    assert (found.predicted_s, found.measured_s) == (0.030, pytest.approx(0.025))
    assert found.error == pytest.approx(0.2)
    assert found.compute_s == (pytest.approx(0.020), pytest.approx(0.016))
    assert found.memory_ratios == (pytest.approx(1.1), pytest.approx(1.1))
    assert predicted.line(found) and predicted.heading()


def test_several_streams_are_held_against_the_ring_or_its_slowest_part() -> None:
    assert case("throughput", 2, 0.015).predicted_s == pytest.approx(0.015), "two streams do not fill this ring"
    assert case("throughput", 2, 0.015).error == pytest.approx(0.0)
    assert case("throughput", 8, 0.010).predicted_s == pytest.approx(0.01125), "two groups share two hops among eight"


def test_errors_are_told_by_model_and_objective() -> None:
    cases = [case("latency", 1, 0.030 * (1 + number / 100)) for number in range(10)]
    rows = {row.name: row for row in predicted.figures([*cases, case("throughput", 2, 0.030)])}
    assert rows["m, latency: error, median"].holds and rows["m, latency: error, 9 of 10"].holds
    assert not rows["m, throughput: error, median"].holds and rows["m, throughput: deployments"].value == 1
    assert rows["m: error of memory, 9 of 10"].value == pytest.approx(0.1)
    assert predicted.at_share([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 0.9) == 9.0


def test_cuts_hold_those_of_the_chosen_plan_and_make_28_plans() -> None:
    cuts = chosen.cuts_around([7, 19], 30)
    assert len(cuts) == chosen.CUTS and {7, 19} <= set(cuts) and all(0 < cut < 30 for cut in cuts)
    shares = chosen.all_shares(("a", "b", "c"), cuts, 30)
    assert len(set(shares)) == 28 and (("a", 7), ("b", 12), ("c", 11)) in shares
    assert all(sum(blocks for _, blocks in one) == 30 for one in shares)
    assert chosen.cuts_around([1, 29], 30)[0] == 1 and chosen.cuts_around([1, 29], 30)[-1] == 29


def test_pins_give_the_very_plan_that_is_meant() -> None:
    shares = (("b", 3), ("a", 1), ("c", 26))
    candidates = [board(name, 1.0, link_to_broker=ETHERNET) for name in "abc"]
    made = plan(candidates, pins=dict(chosen.pins_of(shares)), boards_at_least=3, objective="throughput")
    placed = placement_of(made)
    assert [placed[f"block.{number}"] for number in range(30)] == ["b"] * 3 + ["a"] + ["c"] * 26
    assert (placed["embedding"], placed["head"]) == ("b", "c")


def test_splits_without_a_planner() -> None:
    order = ("a", "b", "c")
    assert chosen.by_parts(order, dict.fromkeys(order, 1.0), 30) == (("a", 10), ("b", 10), ("c", 10))
    assert chosen.by_parts(order, {"a": 1.0, "b": 2.0, "c": 4.0}, 30) == (("a", 4), ("b", 9), ("c", 17))
    assert all(blocks > 0 for _, blocks in chosen.by_parts(order, {"a": 1e-9, "b": 1.0, "c": 1e-9}, 30))


def test_the_choice_is_held_against_the_best_and_the_simple_ones() -> None:
    best, equal, memory = ((("a", 5),), (("a", 10),), (("a", 4),))
    rows = {row.name: row for row in chosen.figures(equal, equal, memory, {best: 0.9, equal: 1.0, memory: 1.4})}
    assert not rows["chosen / best"].holds
    assert not rows["equal split (a:10) / chosen"].holds and rows["by free memory (a:4) / chosen"].holds


def test_a_change_may_move_once_and_has_to_help() -> None:
    good = changed.Trial(what="board", before=30, slowed=12, after=20, noticed_s=7, moved_s=8, moves=1)
    assert all(row.holds is not False for row in changed.figures([good]))
    for worse in (good._replace(moves=2), good._replace(after=12.5), good._replace(moved_s=31)):
        assert any(row.holds is False for row in changed.figures([good, worse]))
        others = changed.figures([good, worse._replace(what="link")])
        assert all(row.name.startswith("link") for row in others if row.holds is False), "each kind by itself"


def test_a_stage_may_have_the_embedding_alone() -> None:
    pins = chosen.pins_of((("a", 0), ("b", 11), ("c", 19)))
    assert pins == (
        ("embedding", "a"), ("block.0", "b"), ("block.10", "b"), ("block.11", "c"), ("block.29", "c"), ("head", "c"),
    )  # fmt: skip
