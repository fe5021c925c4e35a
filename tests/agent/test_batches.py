"""Several requests in one ring: steps together, and nothing that happens to one of them happens to the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.workers.requests import Tally
from models.engine.onnx import OnnxStage
from tests.agent.test_ring import Given, Ring, prompt
from tests.models.stages import load_stage, packed_tiny, spec_of
from wire.frames import Kind, Parcel, Tensor
from wire.messages import StageOrder
from wire.rows import RowOf, rows_meta

EIGHT = {"slots": 8, "context_tokens": 256}


def wanted(last: int, stages: int, count: int) -> list[int]:
    """What a ring of engines that add one answers."""
    return [(last + stages * (1 + number)) % 32 for number in range(count)]


def ask_eight(ring: Ring, tokens: int = 20) -> None:
    for request in range(8):
        ring.ask([1, request], request=request, max_new_tokens=tokens)


def check_others(ring: Ring, gone: set[int], tokens: int = 20) -> None:
    for request in set(range(8)) - gone:
        assert ring.tokens(request) == wanted(request, ring.stages, tokens), request
    assert ring.idle


def turns(ring: Ring, count: int) -> None:
    for _ in range(count):
        for number, work in enumerate(ring.works):
            if ring.queues[number]:
                work.accept(Given(ring.queues[number].popleft()), 0.0)  # type: ignore[arg-type]
            work.work(0.0)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_eight_requests_get_their_answers_in_one_group_per_stage(stages: int) -> None:
    ring = Ring(stages, changes=EIGHT)
    ask_eight(ring, 80)
    ring.run()
    check_others(ring, set(), 80)
    widths = [len(batch) for engine in ring.engines for batch in engine.batches]
    assert max(widths) == 8 // stages
    assert sum(width == 8 // stages for width in widths) > 0.7 * len(widths)
    for work in ring.works:
        assert work.tally.decode_rows == 8 * 79
        assert work.tally.decode_steps < 0.7 * 8 * 79
        assert work.tally.decode_sent_bytes == 0 if stages == 1 else work.tally.decode_sent_bytes > 0
    assert ring.returned >= ring.passed


def test_one_request_alone_makes_steps_of_one_row_and_parcels_of_one_row() -> None:
    ring = Ring(3, changes=EIGHT)
    ring.ask([1, 2], max_new_tokens=20)
    seen: set[Kind] = set()
    for _ in range(100):
        seen.update(parcel.kind for queue in ring.queues for parcel in queue)
        turns(ring, 1)
    assert len(ring.tokens()) == 20 and Kind.ROWS not in seen
    assert not any(engine.batches for engine in ring.engines)


def test_requests_of_different_lengths_end_one_by_one_and_newcomers_take_their_places() -> None:
    ring = Ring(2, changes={"slots": 4, "context_tokens": 256})
    for request in range(4):
        ring.ask([1, request], request=request, max_new_tokens=5 + 7 * request)
    turns(ring, 40)
    ring.ask([1, 9], request=9, max_new_tokens=30, stop_ids=(wanted(9, 2, 12)[-1],))
    ring.run()
    for request in range(4):
        assert ring.tokens(request) == wanted(request, 2, 5 + 7 * request)
    assert ring.tokens(9) == wanted(9, 2, 12)
    assert ring.idle and not ring.errors()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("at", [60, 71, 90])
def test_a_row_that_fails_ends_its_request_and_no_other(stage: int, at: int) -> None:
    ring = Ring(3, changes=EIGHT)
    ask_eight(ring)
    ring.engines[stage].fail_at = at
    ring.run()
    [error] = [parcel for parcel in ring.answers if parcel.kind is Kind.ERROR]
    assert [(told.code, told.stage) for told in ring.errors()] == [("engine", stage)]
    check_others(ring, {error.request})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_that_can_not_be_made_is_made_row_by_row(stage: int) -> None:
    ring = Ring(3, changes=EIGHT)
    ring.engines[stage].fail_batch = True
    ask_eight(ring)
    ring.run()
    check_others(ring, set())
    assert not ring.errors() and ring.engines[stage].batches


def test_a_closed_request_leaves_its_group_where_it_is() -> None:
    ring = Ring(3, changes=EIGHT)
    ask_eight(ring)
    turns(ring, 30)
    ring.queues[0].append(Parcel(Kind.CLOSE, 1, 3))
    ring.queues[1].append(Parcel(Kind.CLOSE, 1, 6))
    ring.run()
    assert not ring.errors() and all(work.tally.refused == 0 for work in ring.works)
    check_others(ring, {3, 6})


def test_a_full_context_ends_one_answer_only() -> None:
    ring = Ring(2, changes={"slots": 4, "context_tokens": 24})
    for request, length in enumerate((2, 16, 5)):
        ring.ask([request] * length, request=request, max_new_tokens=15)
    ring.run()
    assert [len(ring.tokens(request)) for request in range(3)] == [15, 9, 15]
    assert ring.idle and not ring.errors()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_row_that_is_not_due_ends_its_request_and_no_other(stage: int) -> None:
    ring = Ring(3, changes=EIGHT)
    ask_eight(ring)
    turns(ring, 30)
    late = rows_meta([RowOf(5, 200), RowOf(77, 5)])
    ring.queues[stage].appendleft(Parcel(Kind.ROWS, 1, 0, 0, 0, Tensor.of(np.zeros((2, 8), np.float32)), late))
    ring.run()
    assert [(told.code, told.stage) for told in ring.errors()] == [("protocol", stage)]
    assert ring.works[stage].tally.refused == 2  # that, and a request that nobody knows
    check_others(ring, {5})


def test_rows_of_a_prompt_do_not_come_among_rows_of_answers() -> None:
    ring = Ring(2, changes=EIGHT)
    ring.ask([1, 2, 3, 4, 5, 6], request=1)
    ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    ring.works[0].work(0.0)
    ring.works[1].accept(Given(ring.queues[1].popleft()), 0.0)  # type: ignore[arg-type]
    rows = Tensor.of(np.zeros((1, 8), np.float32))
    ring.queues[1].append(Parcel(Kind.ROWS, 1, 0, 0, 0, rows, rows_meta([RowOf(1, 4)])))
    ring.run()
    assert [told.code for told in ring.errors()] == ["protocol"] and "prompt" in ring.errors()[0].text
    assert ring.idle


def test_a_second_token_before_the_first_was_run_ends_the_request() -> None:
    ring = Ring(2, changes=EIGHT)
    ask_eight(ring)
    turns(ring, 40)
    live = ring.works[0]._held.lives[5]
    for position in (live.filed, live.filed + 1):
        token = Tensor.of(np.array([3], np.int32))
        ring.works[0].accept(Given(Parcel(Kind.TOKENS, 1, 5, position, 0, token)), 0.0)  # type: ignore[arg-type]
    ring.run()
    assert [told.code for told in ring.errors()] == ["protocol"]
    check_others(ring, {5})


def test_a_next_stage_that_takes_nothing_is_said_to_all_of_a_group() -> None:
    ring = Ring(2, changes=EIGHT)
    ask_eight(ring, 100)
    turns(ring, 60)
    ring.blocked.add(0)
    ring.run()
    assert sorted({error.code for error in ring.errors()}) == ["deadline"]
    assert len({parcel.request for parcel in ring.answers if parcel.kind is Kind.ERROR}) == 8
    assert ring.works[0].live == 0
    for work in ring.works:
        work.tick(1e6)
    assert ring.idle


def test_a_group_and_a_long_prompt_take_turns() -> None:
    ring = Ring(1, changes={"context_tokens": 4096, "prefill_chunk_tokens": 4, "slots": 4})
    for request in range(3):
        ring.ask([1, 2], request=request, max_new_tokens=30)
    for _ in range(3):
        ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    for _ in range(8):
        ring.works[0].work(0.0)
    before = len(ring.engines[0].steps)
    ring.ask([3] * 32, request=9)
    ring.run()
    steps = [rows for _, _, rows in ring.engines[0].steps[before:]]
    assert steps[:32] == [4, 1, 1, 1] * 8
    assert all(len(ring.tokens(request)) == 30 for request in range(3)) and len(ring.tokens(9)) == 5


def test_a_request_that_is_lost_on_the_way_holds_up_nobody() -> None:
    ring = Ring(2, changes=EIGHT)
    ask_eight(ring, 60)
    turns(ring, 40)
    ring.works[1]._held.free(4)  # and nobody is told
    now_s = 0.0
    for _ in range(600):
        turns(ring, 1)
        now_s += 0.25
        ring.works[0].tick(now_s if now_s < 55 else 0.0)
    for request in set(range(8)) - {4}:
        assert len(ring.tokens(request)) == 60
    assert ring.works[0].live == 1
    ring.works[0].tick(1e6)
    assert ring.idle


def test_a_new_epoch_groups_by_its_own_number_of_stages() -> None:
    ring = Ring(4, changes=EIGHT)
    ask_eight(ring, 60)
    turns(ring, 60)
    assert max(map(len, ring.engines[0].batches)) == 2
    again = Ring(2, changes={**EIGHT, "epoch": 2})
    ring.works[0].adopt(again.orders[0])
    assert ring.works[0].live == 0
    again.works[0] = ring.works[0]
    again.engines[0] = ring.engines[0]
    before = len(ring.engines[0].batches)
    ring.queues, ring.stages = again.queues, 2
    for request in range(8):
        again.queues[0].append(prompt([1, request], request, epoch=2, max_new_tokens=60))
    turns(again, 200)
    assert max(map(len, ring.engines[0].batches[before:])) == 4


def test_what_is_counted_fits_a_ring_of_groups() -> None:
    ring = Ring(2, changes=EIGHT)
    ask_eight(ring)
    ring.run()
    [first, head] = [work.tally for work in ring.works]
    assert isinstance(first, Tally)
    assert first.decode_rows == head.decode_rows == 8 * 19
    assert first.decode_rows_run == first.decode_rows
    # Each of the 19 rows of an answer is run behind its prompt and the rows before it.
    assert first.decode_context_tokens == head.decode_context_tokens == 8 * sum(2 + row for row in range(19))
    assert first.decode_sent_bytes == 100 * first.decode_steps  # the fake sender's frames are 100 bytes each


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_real_stages_answer_many_what_they_answer_one_by_one(stages: int, tmp_path: Path) -> None:
    """In f32, where a row alone and a row in company differ by less than two words do."""
    packed = packed_tiny(tmp_path)

    def loaded(order: StageOrder) -> OnnxStage:
        first, end = (4 * number // stages for number in (order.stage, order.stage + 1))
        return load_stage(packed, tmp_path, spec_of(packed, first, end, slots=8))

    graph = packed.graph
    changes = {"slots": 8, "hidden": graph.hidden, "vocabulary": graph.vocabulary}
    prompts = {request: [7 * request + 1, 3, 90 + request, *range(request)] for request in range(6)}
    alone = Ring(stages, changes=changes, make=loaded)
    together = Ring(stages, changes=changes, make=loaded)
    for request, ids in prompts.items():
        alone.ask(ids, request=request, max_new_tokens=20 + request)
        alone.run()
        together.ask(ids, request=request, max_new_tokens=20 + request)
    together.run()
    for request in prompts:
        assert together.tokens(request) == alone.tokens(request)
        assert len(together.tokens(request)) == 20 + request
    tally = together.works[0].tally
    assert tally.decode_steps < tally.decode_rows, "how many share steps depends on how long prompts take"
    assert not any(work.live for work in together.works)
