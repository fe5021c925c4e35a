"""Which broker each stage is reached through, by what was measured."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planning.plan import Plan
from coordinator.planning.topology import (
    Way,
    direct_hop_s,
    hops_of,
    ways_of,
    why_central,
    with_slow_links,
    with_topology,
)
from tests.coordinator.plans import plan_of

URLS = {name: f"mqtt://10.0.0.{number}:1884" for number, name in enumerate(("a", "b", "c"), 1)}


def plan(hop_s: float = 0.010, devices: tuple[str, ...] = ("a", "b", "c")) -> Plan:
    made = plan_of(*devices)
    stages = tuple(msgspec.structs.replace(stage, hop_s=hop_s) for stage in made.stages)
    compute_s = sum(stage.compute_s for stage in stages)
    hops_s = hop_s * len(stages) if len(stages) > 1 else 0.0
    return msgspec.structs.replace(made, stages=stages, predicted_token_s=compute_s + hops_s)


def measured(there_s: float = 0.008, own_s: float = 0.002) -> dict[Way, float | str]:
    """Every board to every broker."""
    return {Way(device, URLS[other]): own_s if device == other else there_s for device in URLS for other in URLS}


def test_each_way_of_the_ring_is_asked_for_once() -> None:
    assert hops_of(plan()) == [("a", "b"), ("b", "c"), ("c", "a")]
    assert set(ways_of(plan(), URLS)) == {
        Way("a", URLS["b"]), Way("b", URLS["b"]), Way("b", URLS["c"]), Way("c", URLS["c"]), Way("c", URLS["a"]),
        Way("a", URLS["a"]),
    }  # fmt: skip
    assert ways_of(plan(devices=("a",)), URLS) == []


def test_faster_ways_are_taken_and_the_prediction_follows() -> None:
    got = with_topology(plan(), "auto", URLS, measured())
    assert got.topology == "direct"
    assert [stage.inbox.broker for stage in got.stages] == [URLS["a"], URLS["b"], URLS["c"]]
    assert [stage.hop_s for stage in got.stages] == pytest.approx([0.005] * 3)
    assert got.predicted_token_s == pytest.approx(plan().predicted_token_s - 3 * 0.005)
    assert "boards' own brokers" in got.because and "15.0 ms instead of 30.0 ms" in got.because
    assert [stage.inbox.topic for stage in got.stages] == [stage.inbox.topic for stage in plan().stages]


def test_ways_that_gain_less_than_a_tenth_are_left_unless_asked_for() -> None:
    close = measured(there_s=0.017, own_s=0.002)
    kept = with_topology(plan(), "auto", URLS, close)
    assert kept.topology == "central" and not any(stage.inbox.broker for stage in kept.stages)
    assert kept.predicted_token_s == plan().predicted_token_s
    assert "a to b takes 9.5 ms instead of 10.0 ms" in kept.because
    assert with_topology(plan(), "direct", URLS, close).topology == "direct"


def test_each_hop_is_decided_by_itself() -> None:
    mixed = {**measured(), Way("a", URLS["b"]): 0.030}
    got = with_topology(plan(), "auto", URLS, mixed)
    assert [stage.inbox.broker for stage in got.stages] == [URLS["a"], "", URLS["c"]]
    assert [stage.hop_s for stage in got.stages] == pytest.approx([0.010, 0.005, 0.005])


def test_a_board_without_a_broker_takes_part_through_the_sites() -> None:
    brokers = {**URLS, "b": ""}
    got = with_topology(plan(), "auto", brokers, measured())
    assert [stage.inbox.broker for stage in got.stages] == [URLS["a"], "", URLS["c"]]
    assert [stage.hop_s for stage in got.stages] == pytest.approx([0.010, 0.005, 0.005])
    assert "b has no broker of its own" in got.because


def test_a_way_that_does_not_exist_is_told_and_not_taken() -> None:
    blocked = {**measured(), Way("a", URLS["b"]): "connection refused"}
    got = with_topology(plan(), "direct", URLS, blocked)
    assert [stage.inbox.broker for stage in got.stages] == [URLS["a"], "", URLS["c"]]
    assert "a does not reach the broker of b: connection refused" in got.because
    assert isinstance(direct_hop_s("a", "b", URLS, {}), str)


@pytest.mark.parametrize(
    ("wanted", "hop_s", "brokers", "words"),
    [
        ("central", 0.010, URLS, "as asked for"),
        ("auto", 0.010, {}, "no board has a broker"),
        ("direct", 0.010, dict.fromkeys(URLS, ""), "no board has a broker"),
        ("auto", 0.0004, URLS, "can save no more"),
    ],
)
def test_nothing_is_measured_where_nothing_can_come_of_it(wanted, hop_s, brokers, words) -> None:
    assert words in why_central(plan(hop_s), wanted, brokers)
    got = with_topology(plan(hop_s), wanted, brokers, {})
    assert got.topology == "central" and words in got.because
    assert why_central(plan(0.0004), "direct", URLS) == ""


def test_one_stage_has_no_hops_and_nothing_is_said_of_them() -> None:
    assert with_topology(plan(devices=("a",)), "direct", URLS, {}) == plan(devices=("a",))


@given(
    st.lists(st.floats(1e-4, 0.1), min_size=9, max_size=9),
    st.floats(1e-4, 0.1),
    st.sampled_from(["auto", "central", "direct"]),
    st.sets(st.sampled_from(sorted(URLS))),
)
def test_a_plan_always_adds_up_and_auto_is_never_slower(times, hop_s, wanted, without) -> None:
    brokers = {name: "" if name in without else url for name, url in URLS.items()}
    trips = dict(zip(measured(), times, strict=True))
    got, before = with_topology(plan(hop_s), wanted, brokers, trips), plan(hop_s)
    total = sum(stage.compute_s + stage.hop_s for stage in got.stages)
    assert got.predicted_token_s == pytest.approx(total)
    assert (got.topology == "direct") == any(stage.inbox.broker for stage in got.stages)
    assert not any(stage.inbox.broker for stage in got.stages if stage.device in without)
    if wanted == "auto":
        assert got.predicted_token_s <= before.predicted_token_s + 1e-12


def test_slow_links_make_ways_longer_but_not_those_to_a_boards_own_broker() -> None:
    trips = {**measured(0.008, 0.002), Way("a", "mqtt://elsewhere:1"): 0.001, Way("b", URLS["c"]): "no answer"}
    slow = with_slow_links(trips, URLS, lambda one, other: 0.010 if "b" in (one, other) else 0.0)
    assert slow[Way("a", URLS["b"])] == slow[Way("b", URLS["a"])] == pytest.approx(0.028)
    assert slow[Way("b", URLS["b"])] == 0.002 and slow[Way("a", URLS["c"])] == 0.008
    assert slow[Way("b", URLS["c"])] == "no answer" and slow[Way("a", "mqtt://elsewhere:1")] == 0.001
