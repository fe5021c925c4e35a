"""Plans by what was measured between boards, where their own links say something else."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.planning.explain import explain
from coordinator.planning.pairs import PairCost, direct_of
from coordinator.planning.plan import Plan
from coordinator.planning.planner import make_plan
from coordinator.planning.problem import hop_bytes
from coordinator.planning.request import Candidate
from coordinator.planning.slowed import Slowed
from coordinator.planning.topology import with_topology
from hwprofiles.profile import Goodput, PairMeasurement, Samples
from tests.planning.boards import MB, address, board, graph, link, request
from wire.units import seconds_text

GRAPH = graph()
NOW = 1e9
URLS = {name: f"mqtt://10.0.0.{number}:1884" for number, name in enumerate(("one", "two", "three"), 1)}


def run(*seconds: float) -> Samples:
    return Samples(samples_s=seconds, warmup=0, stopped_because="enough")


def pair(peer: str, delay_s: float, there: float, back: float, at_unix: float = NOW) -> PairMeasurement:
    """As measured on a way with so much delay and these rates."""
    loads = [Goodput(payload_bytes=80_000, chunk_bytes=10_000, samples=run(70_000 / rate)) for rate in (there, back)]
    return PairMeasurement(
        peer=peer, way="direct", measured_at_unix=at_unix, round_trip_payload_bytes=1200,
        round_trip=run(*[2 * delay_s] * 12), sent=15, lost=0, late=0, there=loads[0], back=loads[1],
    )  # fmt: skip


def shelf(*pairs: tuple[str, PairMeasurement], slow_link: str = "") -> list[Candidate]:
    """Three equal boards, each 6 ms from the site's broker, none of which can hold the model alone."""
    boards = [board(name, memory_bytes=220 * MB, link_to_broker=link(0.006, 2.5e6)) for name in URLS]
    profiles = {b.device: b.profile for b in boards if b.profile is not None}
    for name, found in pairs:
        profiles[name] = msgspec.structs.replace(profiles[name], pairs=(*profiles[name].pairs, found))
    direct = direct_of(profiles, URLS)
    return [
        msgspec.structs.replace(
            b,
            profile=profiles[b.device],
            direct={other: cost for (sender, other), cost in direct.items() if sender == b.device},
            link_slowed=Slowed(times=10, because="takes 10 times as long") if b.device == slow_link else None,
        )
        for b in boards
    ]


def planned(boards: list[Candidate]) -> Plan:
    return make_plan(GRAPH, boards, request(boards_at_least=2), address)


def test_two_boards_on_one_switch_are_chosen_and_the_one_behind_wifi_is_left_out() -> None:
    """All three are equally far from the coordinator; only the pairs tell that two of them are neighbours."""
    near = ("one", pair("three", 0.0005, 1e7, 1e7))
    far = [("one", pair("two", 0.012, 2e6, 2e6)), ("two", pair("three", 0.012, 2e6, 2e6))]
    got = planned(shelf(near, *far))
    assert {stage.device for stage in got.stages} == {"one", "three"}
    assert [stage.hop_s for stage in got.stages] == pytest.approx([0.0005, 0.0005], rel=0.05)
    assert all(stage.central_hop_s > 0.01 for stage in got.stages)
    assert planned(shelf()).predicted_token_s > got.predicted_token_s + 0.02


def test_a_way_that_is_longer_than_through_the_sites_broker_is_not_taken() -> None:
    got = planned(shelf(("one", pair("two", 0.05, 1e6, 1e6)), ("two", pair("three", 0.05, 1e6, 1e6))))
    assert [stage.central_hop_s for stage in got.stages] == [0.0] * len(got.stages)
    assert got == planned(shelf())


def test_each_direction_has_its_own_rate() -> None:
    profiles = {b.device: b.profile for b in shelf(("one", pair("two", 0.001, 1e6, 4e6))) if b.profile is not None}
    direct = direct_of(profiles, URLS)
    assert direct["one", "two"].bytes_per_s == pytest.approx(1e6)
    assert direct["two", "one"].bytes_per_s == pytest.approx(4e6)
    assert direct["one", "two"].hop_s(1200 + 10_000) == pytest.approx(0.001 + 0.01)
    assert direct["one", "two"].transfer_s(10_000) == pytest.approx(0.01)


def test_the_latest_measurement_counts_whoever_made_it_and_boards_without_brokers_have_none() -> None:
    old, new = pair("two", 0.010, 1e6, 1e6, NOW - 100), pair("one", 0.002, 1e6, 1e6, NOW)
    profiles = {b.device: b.profile for b in shelf(("one", old), ("two", new)) if b.profile is not None}
    assert direct_of(profiles, URLS)["one", "two"].one_way_s == 0.002
    assert direct_of(profiles, {**URLS, "two": ""}) == {}


def test_loads_that_came_all_at_once_give_a_finite_rate() -> None:
    instant = msgspec.structs.replace(
        pair("two", 0.001, 1e6, 1e6), there=Goodput(payload_bytes=80_000, chunk_bytes=10_000, samples=run(0.0))
    )
    profiles = {b.device: b.profile for b in shelf(("one", instant)) if b.profile is not None}
    assert 0 < direct_of(profiles, URLS)["one", "two"].hop_s(100_000) < 0.01


def test_stages_that_were_priced_straight_get_the_boards_own_brokers_and_others_the_sites() -> None:
    got = planned(shelf(("one", pair("three", 0.0005, 1e7, 1e7))))
    straight = with_topology(got, "auto", URLS, {})
    assert straight.topology == "direct" and all(stage.inbox.broker for stage in straight.stages)
    assert straight.predicted_token_s == pytest.approx(got.predicted_token_s)
    central = with_topology(got, "central", URLS, {})
    more_s = sum(stage.central_hop_s - stage.hop_s for stage in got.stages)
    assert central.predicted_token_s == pytest.approx(got.predicted_token_s + more_s)
    assert central.topology == "central" and not any(stage.central_hop_s for stage in central.stages)
    gone = with_topology(got, "auto", {**URLS, "one": "", "three": ""}, {})
    assert gone.topology == "central" and gone.predicted_token_s == pytest.approx(central.predicted_token_s)


def test_a_board_with_a_slow_link_is_left_out_where_there_is_another() -> None:
    assert planned(shelf()).stages[0].device == "one"
    got = planned(shelf(slow_link="one"))
    assert "one" not in {stage.device for stage in got.stages}


def test_explain_says_which_figure_each_hop_has_and_how_old_it_is() -> None:
    boards = shelf(("one", pair("three", 0.0005, 1e7, 1e7, NOW - 720)))
    made = planned(boards)
    text = "\n".join(explain(made, GRAPH, boards, NOW))
    assert f"one to three: {seconds_text(made.stages[0].hop_s)}, by the pair, measured 12 min ago" in text
    plain = shelf()
    text = "\n".join(explain(planned(plain), GRAPH, plain, NOW))
    assert "by the boards' own links through the site's broker, one's measured" in text
    assert "which figure" not in "\n".join(explain(planned(plain), GRAPH, plain))


def test_a_slower_pair_is_priced_slower() -> None:
    cost = PairCost(one_way_s=0.001, probe_bytes=1200, bytes_per_s=1e6, measured_at_unix=NOW)
    slow = msgspec.structs.replace(cost, times=10.0, more_s=0.02)
    for size in hop_bytes(GRAPH):
        assert slow.hop_s(size) >= cost.hop_s(size) + 0.02
        assert slow.transfer_s(size) == pytest.approx(10 * cost.transfer_s(size))
