"""Costs come from what was measured, and say what was not."""

from __future__ import annotations

import msgspec
import pytest

from coordinator.planning.cost import (
    DeviceCost,
    LinkCost,
    Workload,
    central_s,
    device_cost,
    interpolated,
    memory_limit_bytes,
    stage_memory,
)
from coordinator.planning.plan import LeftOut
from coordinator.planning.problem import _links, hop_bytes, make_problem
from coordinator.planning.room import run_needs
from hwprofiles.profile import Profile
from hwprofiles.reading import Absent, Failed
from models.graph import Edge
from tests.planning.boards import HIDDEN, MB, PROBE_BYTES, WORKER_BYTES, graph, link, profile
from wire.errors import Refused

WORKLOAD = Workload(context_tokens=512, slots=1, prefill_chunk_tokens=64, expected_tokens=128)


def priced(made: Profile, workload: Workload = WORKLOAD, usable_bytes: int = 4_096 * MB) -> DeviceCost:
    cost = device_cost(graph(), "pi5", made, usable_bytes, workload)
    assert isinstance(cost, DeviceCost), cost
    return cost


def test_blocks_and_steps_are_told_apart() -> None:
    cost = priced(profile("pi5", block_s=1e-3, overhead_s=2e-4))
    assert cost.overhead_s == pytest.approx(2e-4)
    assert cost.decode_s["tiny/block"] == pytest.approx(1e-3)


def test_a_stage_pays_one_overhead_even_with_embedding_and_head() -> None:
    cost = priced(profile("pi5", block_s=1e-3, overhead_s=2e-4, embedding_s=3e-4, head_s=4e-3))
    model = graph()
    assert cost.stage_s(model.modules) == pytest.approx(2e-4 + 1e-4 + 30 * 1e-3 + (4e-3 - 2e-4))
    assert cost.stage_s(model.modules[:1]) == pytest.approx(3e-4), "alone, the embedding takes what was measured"


def test_decode_is_priced_at_the_expected_context() -> None:
    made = profile("pi5", block_s=1e-3, per_context_s=1e-6)
    for expected_tokens in (16, 100, 256):
        workload = msgspec.structs.replace(WORKLOAD, expected_tokens=expected_tokens)
        assert priced(made, workload).decode_s["tiny/block"] == pytest.approx(1e-3 + expected_tokens * 1e-6)


@pytest.mark.parametrize("context", [16, 128, 256, 1_000])
def test_steps_of_several_rows_are_priced_as_measured(context: int) -> None:
    """Where it was measured a further row is a share of the first; a longer context is longer for each row alike."""
    workload = msgspec.structs.replace(WORKLOAD, expected_tokens=context)
    cost = priced(profile("pi5", block_s=1e-3, overhead_s=2e-4, per_context_s=1e-6, row_share=0.3), workload)
    assert [batch.rows for batch in cost.batches] == [2, 8]
    for batch in cost.batches:
        times = 1 + 0.3 * (batch.rows - 1)
        longer_s = batch.rows * (context - 16) * 1e-6
        assert batch.decode_s["tiny/block"] == pytest.approx(times * (1e-3 + 16e-6) + longer_s)
        assert batch.overhead_s == pytest.approx(times * 2e-4)
        assert batch.decode_s["tiny/head"] == pytest.approx(times * (4e-3 - 2e-4)), "a step's own cost is counted once"
        assert batch.decode_s["tiny/embedding"] == batch.rows * cost.decode_s["tiny/embedding"], "nobody measured that"


def test_where_steps_of_several_rows_were_not_measured_each_row_takes_what_one_alone_does() -> None:
    for made in (profile("pi5", per_context_s=1e-6), profile("pi5", row_share=1.5)):
        cost = priced(made)
        for batch in cost.batches:
            assert batch.overhead_s == pytest.approx(batch.rows * cost.overhead_s), "rows could be run one by one"
            for key in ("tiny/block", "tiny/head"):
                assert batch.decode_s[key] == pytest.approx(batch.rows * cost.decode_s[key])


def test_no_step_of_more_rows_takes_less() -> None:
    cost = priced(profile("pi5", row_share=-0.1))
    for batch in cost.batches:
        assert batch.overhead_s == cost.overhead_s
        assert all(batch.decode_s[key] == cost.decode_s[key] for key in ("tiny/block", "tiny/head"))


def test_steps_of_several_rows_say_nothing_of_one() -> None:
    made = profile("pi5", row_share=0.3)
    modules = tuple(
        msgspec.structs.replace(
            module, timings=tuple(t for t in module.timings if (t.phase, t.tokens) != ("decode", 1))
        )
        for module in made.modules
    )
    left = device_cost(graph(), "pi5", msgspec.structs.replace(made, modules=modules), 4_096 * MB, WORKLOAD)
    assert isinstance(left, LeftOut) and "decode: not measured" in left.because


def test_a_context_beyond_the_measured_ones_is_extrapolated_and_said() -> None:
    workload = msgspec.structs.replace(WORKLOAD, expected_tokens=1_000)
    cost = priced(profile("pi5", block_s=1e-3, per_context_s=1e-6), workload)
    assert cost.decode_s["tiny/block"] == pytest.approx(2e-3)
    assert any("context 1000 extrapolated from 256" in note for note in cost.notes)
    assert not any("extrapolated" in note for note in priced(profile("pi5")).notes)


def test_interpolation_never_falls_beyond_the_last_point() -> None:
    assert interpolated({16: 2.0, 256: 1.0}, 1_000) == 1.0
    assert interpolated({16: 1.0, 256: 2.0}, 0) == 1.0
    assert interpolated({16: 1.0, 32: 2.0, 64: 6.0}, 48) == 4.0
    assert interpolated({16: 1.0}, 500) == 1.0


def test_prefill_is_priced_per_chunk() -> None:
    cost = priced(profile("pi5", block_s=1e-3, overhead_s=2e-4, head_s=4e-3))
    blocks = [module for module in graph().modules if module.kind == "block"][:3]
    assert cost.stage_prefill_s(blocks) == pytest.approx(2e-4 + 3 * 64 * 1e-3)


def test_missing_prefill_is_none_and_not_zero() -> None:
    made = profile("pi5")
    modules = tuple(
        msgspec.structs.replace(module, timings=tuple(t for t in module.timings if t.phase == "decode"))
        for module in made.modules
    )
    cost = priced(msgspec.structs.replace(made, modules=modules))
    assert cost.stage_prefill_s(graph().modules) is None
    assert any("prefill: not measured" in note for note in cost.notes)


def test_a_device_without_a_needed_measurement_is_left_out_with_the_reason() -> None:
    made = profile("pi5")
    without_head = msgspec.structs.replace(made, modules=made.modules[:2])
    left = device_cost(graph(), "pi5", without_head, 4_096 * MB, WORKLOAD)
    assert isinstance(left, LeftOut)
    assert "has not measured head of tiny-chat" in left.because
    failed = msgspec.structs.replace(without_head, failed={made.modules[2].key: "no memory"})
    left = device_cost(graph(), "pi5", failed, 4_096 * MB, WORKLOAD)
    assert isinstance(left, LeftOut) and left.because == "could not measure head of tiny-chat: no memory"


def test_measurements_of_another_engine_do_not_count() -> None:
    workload = msgspec.structs.replace(WORKLOAD, engine="torch")
    left = device_cost(graph(), "pi5", profile("pi5"), 4_096 * MB, workload)
    assert isinstance(left, LeftOut)
    assert "on torch" in left.because


def test_invalid_timings_leave_a_device_out_unless_they_are_accepted() -> None:
    made = profile("pi5", valid=False)
    left = device_cost(graph(), "pi5", made, 4_096 * MB, WORKLOAD)
    assert isinstance(left, LeftOut)
    assert "drift" in left.because
    cost = priced(made, msgspec.structs.replace(WORKLOAD, accept_unsteady=True))
    assert any("not to be trusted" in note for note in cost.notes)


@pytest.mark.parametrize("missing", [Absent("no broker"), Failed("no answer within 10 s")])
def test_an_unmeasured_link_is_missing_with_the_reason(missing: Absent | Failed) -> None:
    cost = priced(profile("pi5", link_to_broker=missing))
    assert cost.link is None
    assert missing.because in cost.link_because


def test_a_hop_is_half_of_both_round_trips_and_the_rest_at_each_rate() -> None:
    fast = device_cost(graph(), "a", profile("a", link_to_broker=link(1e-3, 12.5e6)), 4_096 * MB, WORKLOAD)
    slow = device_cost(graph(), "b", profile("b", link_to_broker=link(5e-3, 2.5e6)), 4_096 * MB, WORKLOAD)
    assert isinstance(fast, DeviceCost) and isinstance(slow, DeviceCost)
    problem = make_problem(graph(), WORKLOAD, [fast, slow], {})
    small = hop_bytes(graph())[1]
    assert small == 2 * HIDDEN + 64
    crossing = 1e-3 + PROBE_BYTES / 12.5e6 + 5e-3 + PROBE_BYTES / 2.5e6
    beyond = (small - PROBE_BYTES) / 12.5e6 + (small - PROBE_BYTES) / 2.5e6
    assert problem.hop_s[0, 1, 1] == pytest.approx(crossing + beyond, rel=1e-6)
    assert problem.hop_s[0, 1, 1] == problem.hop_s[1, 0, 1]
    assert problem.hop_s[0, 1, -1] == pytest.approx(crossing), "a token id is smaller than the probe"
    assert problem.transfer_s[0, 1, 1] == pytest.approx(small / 2.5e6, rel=1e-6)
    assert problem.hop_s[0, 0, 1] == 0.0


def test_chunks_of_a_long_message_cross_both_links_at_once() -> None:
    fast, slow = (
        LinkCost(one_way_s=way, probe_bytes=1000, bytes_per_s=rate) for way, rate in ((1e-3, 12.5e6), (5e-3, 2.5e6))
    )
    chunk = 65_536
    for sender, receiver in ((fast, slow), (slow, fast)):
        # Chunk by chunk: when each has left the sender's link, and then the receiver's.
        sent = arrived = 0.0
        for _ in range(5):
            sent += chunk / sender.bytes_per_s
            arrived = max(arrived, sent) + chunk / receiver.bytes_per_s
        free = fast.one_way_s + slow.one_way_s - 1000 / fast.bytes_per_s - 1000 / slow.bytes_per_s
        assert central_s(sender, receiver, 5 * chunk) == pytest.approx(free + arrived)
        # The planner's tables are the same figures for all pairs at once.
        costs = [
            msgspec.structs.replace(priced(profile(name)), link=link_of)
            for name, link_of in (("a", sender), ("b", receiver))
        ]
        table, _ = _links(costs, [5000, 5 * chunk])
        assert list(table[0, 1]) == pytest.approx([central_s(sender, receiver, size) for size in (5000, 5 * chunk)])
    short = fast.crossing_s(5000) + slow.crossing_s(5000)
    assert central_s(fast, slow, 5000) == pytest.approx(short)


def test_the_token_on_the_way_back_is_four_bytes_and_a_header() -> None:
    assert hop_bytes(graph())[-1] == 4 + 64


def test_a_graph_in_no_topological_order_is_refused() -> None:
    model = graph(3)
    skip = Edge(source="head", target="block.1", elements_per_token=HIDDEN, bytes_per_token=2 * HIDDEN)
    with pytest.raises(Refused, match="no edge from a module to a later one"):
        hop_bytes(msgspec.structs.replace(model, edges=(*model.edges, skip)))


def test_a_file_shared_by_embedding_and_head_is_counted_once() -> None:
    cost = priced(profile("pi5"))
    tied, untied = graph(tied=True), graph(tied=False)
    held_tied, _ = stage_memory(tied, WORKLOAD, cost, tied.modules)
    held_untied, _ = stage_memory(untied, WORKLOAD, cost, untied.modules)
    assert held_untied - held_tied == 28 * MB
    apart = (
        stage_memory(tied, WORKLOAD, cost, tied.modules[:1])[0]
        + stage_memory(tied, WORKLOAD, cost, tied.modules[1:])[0]
    )
    assert apart - held_tied >= 28 * MB, "on two boards the file is held twice"


def test_memory_counts_worker_weights_cache_and_scratch() -> None:
    cost = priced(profile("pi5"))
    model = graph()
    held, memory = stage_memory(model, WORKLOAD, cost, model.modules[1:11])
    weights, cache, scratch = 10 * 2 * MB, 10 * 768 * 512, 64 * HIDDEN * 4 * 16
    assert held == weights + cache
    assert memory == held + scratch + WORKER_BYTES + 2 * MB
    twice = msgspec.structs.replace(WORKLOAD, slots=2)
    assert stage_memory(model, twice, cost, model.modules[1:11])[0] == held + cache


def test_an_engine_that_holds_more_than_the_weights_is_charged_what_it_holds() -> None:
    model = graph()
    plain = stage_memory(model, WORKLOAD, priced(profile("pi5")), model.modules[1:11])[0]
    packed = stage_memory(model, WORKLOAD, priced(profile("pi5", held=1.5)), model.modules[1:11])[0]
    assert packed - plain == 10 * MB


def test_a_reserve_is_kept() -> None:
    assert memory_limit_bytes(1_000 * MB) == 900 * MB
    assert memory_limit_bytes(100 * MB) == 68 * MB
    assert memory_limit_bytes(10 * MB) == 0


def test_what_a_stage_takes_once_is_told_from_what_each_block_holds() -> None:
    """One block makes the process grow by 7 MB, six by 22: 3 for each, and 4 once."""
    made = profile("pi5")
    modules = tuple(
        msgspec.structs.replace(module, resident_bytes=22 * MB, shallow_bytes=7 * MB)
        if module.kind == "block"
        else module
        for module in made.modules
    )
    model, cost = graph(), priced(msgspec.structs.replace(made, modules=modules))
    one, ten = (stage_memory(model, WORKLOAD, cost, model.modules[1 : 1 + count]) for count in (1, 10))
    cache = 768 * WORKLOAD.context_tokens * WORKLOAD.slots
    assert one[0] == 3 * MB + cache and ten[0] == 10 * one[0]
    assert one[1] - one[0] == ten[1] - ten[0] == stage_memory(model, WORKLOAD, cost, [])[1] + 4 * MB
    assert run_needs(model, WORKLOAD, cost)[1, 11] == ten[1]
