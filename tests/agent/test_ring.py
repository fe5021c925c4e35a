"""Stages in a ring, with engines that add numbers, joined in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.workers.requests import Made, chunks_of
from agent.workers.ring import StageWork
from agent.workers.stretch import Stretch
from models.sampling import draw
from tests.agent.fakes import DEVICE, SITE, FakeEngine, inbox, order_of
from wire import topics
from wire.channel import Backlogged
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.messages import InboxAddress, Inquiry, RequestMeta, Sampling, StageError, StageOrder, Standing
from wire.rows import RowOf, rows_meta

REPLY = InboxAddress(topic=topics.INBOX.on(SITE, "requester-1", "0"))


@dataclass
class Given:
    """Stands for wire.channel.Delivery."""

    parcel: Parcel


class EverySecond(Stretch):
    """Each step takes one second."""

    def __init__(self) -> None:
        super().__init__(1.0, 1)

    def end(self, kind: str = "", rows: int = 0, context: int = 0) -> float:
        return 1.0


@dataclass
class Ring:
    """All stages of a deployment in one process; parcels cross in order, one at a time."""

    stages: int = 3
    fail_at: dict[int, int] = field(default_factory=dict)
    changes: dict[str, object] = field(default_factory=dict)
    stretch: Stretch = field(default_factory=EverySecond)
    """Whose turn it is depends on how long steps take: not on this machine, here."""
    make: Callable[[StageOrder], Any] | None = None
    """Gives an engine; None: one that adds numbers."""

    def __post_init__(self) -> None:
        self.orders = [order_of(n, self.stages, **self.changes) for n in range(self.stages)]
        make = self.make or (lambda order: FakeEngine(order, fail_at=self.fail_at.get(order.stage, -1)))
        self.engines: list[Any] = [make(order) for order in self.orders]
        self.queues: list[deque[Parcel]] = [deque() for _ in self.orders]
        self.answers: list[Parcel] = []
        self.returned = 0
        self.passed = 0
        self.blocked: set[int] = set()
        self.works = [self._work(n) for n in range(self.stages)]

    def _work(self, number: int) -> StageWork:
        ring = self

        class Sender:
            next_backlog_bytes = 0
            next_bytes = 0

            def to_next(self, parcel: Parcel) -> None:
                if number in ring.blocked:
                    raise Backlogged("the next stage takes nothing")
                self.next_bytes += 100
                ring.queues[(number + 1) % ring.stages].append(copied(parcel))

            def to_requester(self, topic: str, parcel: Parcel) -> None:
                assert topic == REPLY.topic
                ring.answers.append(copied(parcel))

        def done(delivery: Given) -> None:
            ring.returned += 1

        return StageWork(self.orders[number], self.engines[number], Sender(), done, draw, self.stretch, SITE, DEVICE)

    def ask(self, ids: list[int], request: int = 7, **changes: object) -> None:
        self.queues[0].append(prompt(ids, request, **changes))

    def run(self, steps: int = 2000) -> None:
        """Until nothing moves."""
        for _ in range(steps):
            moved = False
            for number, work in enumerate(self.works):
                if self.queues[number]:
                    self.passed += 1
                    work.accept(Given(self.queues[number].popleft()), 0.0)  # type: ignore[arg-type]
                    moved = True
                moved = work.work(0.0) or moved
            if not moved:
                return
        raise AssertionError("the ring does not come to rest")

    def tokens(self, request: int = 7) -> list[int]:
        found = [p for p in self.answers if p.request == request and p.kind is Kind.TOKENS]
        assert [p.position for p in found] == list(range(found[0].position, found[0].position + len(found)))
        return [int(p.tensor.array()[0]) for p in found]  # type: ignore[union-attr]

    def errors(self) -> list[StageError]:
        return [msgspec.json.decode(p.meta, type=StageError) for p in self.answers if p.kind is Kind.ERROR]

    @property
    def idle(self) -> bool:
        return all(work.live == 0 and not engine.rows for work, engine in zip(self.works, self.engines, strict=True))


def copied(parcel: Parcel) -> Parcel:
    """As the wire does: an engine's buffer is overwritten by its next step."""
    if parcel.tensor is None:
        return parcel
    given = parcel.tensor
    tensor = Tensor(given.dtype, given.shape, given.group, tuple(memoryview(bytes(b)) for b in given.buffers))
    return Parcel(parcel.kind, parcel.epoch, parcel.request, parcel.position, parcel.flags, tensor, parcel.meta)


def meta_of(prompt_tokens: int, **changes: object) -> bytes:
    fields: dict[str, object] = {
        "reply": REPLY, "sampling": Sampling(), "prompt_tokens": prompt_tokens, "max_new_tokens": 5,
    }  # fmt: skip
    return msgspec.json.encode(RequestMeta(**{**fields, **changes}))  # type: ignore[arg-type]


def prompt(ids: list[int], request: int = 7, epoch: int = 1, **changes: object) -> Parcel:
    tensor = Tensor.of(np.array(ids, dtype=np.int32))
    return Parcel(Kind.TOKENS, epoch, request, 0, 0, tensor, meta_of(len(ids), **changes))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_prompt_gives_its_tokens_and_leaves_nothing_behind(stages: int) -> None:
    ring = Ring(stages)
    ring.ask([3, 1, 4, 1, 5, 9, 2, 6, 5])
    ring.run()
    first = (5 + stages) % 32
    assert ring.tokens() == [(first + n * stages) % 32 for n in range(5)]
    assert ring.answers[-1].final and not any(p.final for p in ring.answers[:-1])
    assert ring.idle


def test_a_step_that_was_made_ahead_is_not_sent_again_when_a_prompt_comes_before_its_rows_are_due() -> None:
    ring, alone = Ring(2), Ring(2)
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    for one in (ring, alone):
        one.ask(ids, max_new_tokens=8)
    alone.run()
    first, behind = ring.works
    while (live := first.foreseen()) is None or not ring.queues[0]:
        for number, work in enumerate(ring.works):
            if ring.queues[number] and not (number == 0 and first.foreseen() is not None):
                work.accept(Given(ring.queues[number].popleft()), 0.0)  # type: ignore[arg-type]
            work.work(0.0)
    token = ring.queues[0].popleft()
    assert token.tensor is not None and token.position == live.run
    # As agent.workers.ahead does it: the step is made, its result is sent, and then the message is read.
    result = ring.engines[0].step(live.slot, token.tensor.array(), live.run)
    ring.queues[1].append(copied(first.parcel_of_row(live, first.tensor(result))))
    first.made_ahead(Made(live=live, position=live.run, busy_s=1.0, result=result, sent_bytes=100))
    first.accept(Given(prompt(ids, 8, max_new_tokens=8)), 0.0)  # type: ignore[arg-type]
    first.accept(Given(token), 0.0)  # type: ignore[arg-type]
    ring.run()
    assert ring.errors() == [] and behind.tally.refused == 0
    assert ring.tokens(7) == ring.tokens(8) == alone.tokens()


def test_all_stages_see_the_same_chunks_and_none_has_one_row() -> None:
    ring = Ring(3)
    ring.ask(list(range(9)))
    ring.run()
    for engine in ring.engines:
        assert [rows for _, _, rows in engine.steps] == [4, 3, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("given", range(1, 8))
def test_an_answer_that_is_replayed_goes_on_in_the_very_steps_that_it_would_have_taken(stages: int, given: int) -> None:
    whole, again = Ring(stages), Ring(stages)
    ids = list(range(9))
    whole.ask(ids, max_new_tokens=12)
    whole.run()
    tokens = whole.tokens()
    again.ask(ids + tokens[:given], max_new_tokens=12 - given, replay_tokens=given)
    again.run()
    assert again.tokens() == tokens[given:] and again.idle
    for before, after in zip(whole.engines, again.engines, strict=True):
        assert [step[1:] for step in after.steps] == [step[1:] for step in before.steps]


def test_rows_that_are_replayed_leave_room_for_the_answers_of_others() -> None:
    ring = Ring(1, changes={"context_tokens": 4096, "prefill_chunk_tokens": 8})
    ring.ask([1, 2], request=1, max_new_tokens=30)
    ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    for _ in range(5):
        ring.works[0].work(0.0)
    ring.ask([3] * 34, request=2, replay_tokens=30)
    ring.run()
    owners = [slot for slot, _, _ in ring.engines[0].steps[5:25]]
    assert owners == [1, 0] * 10, "each row is followed by a step of the other answer"


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_request_that_runs_alone_shares_no_step_and_holds_up_nobody(stages: int) -> None:
    ring = Ring(stages, changes={"slots": 4})
    alone = Ring(stages)
    for request in (1, 2, 3, 4):
        ring.ask([3, 1, 4, 1, 5, request], request=request, max_new_tokens=12, alone=request == 1)
    ring.run()
    alone.ask([3, 1, 4, 1, 5, 1], request=1, max_new_tokens=12)
    alone.run()
    assert ring.tokens(1) == alone.tokens(1) and ring.idle
    assert all(len(ring.tokens(request)) == 12 for request in (2, 3, 4))
    for engine in ring.engines:
        assert engine.batches or stages > 2, "the others do share steps"
        assert not any(0 in batch for batch in engine.batches), "who came first has the first slot"


@pytest.mark.parametrize("replay", [3, 4, 100])
def test_a_prompt_that_is_nothing_but_replay_is_refused(replay: int) -> None:
    ring = Ring(2)
    ring.ask([1, 2, 3], replay_tokens=replay)
    ring.run()
    assert [error.code for error in ring.errors()] == ["protocol"] and ring.idle


def inquiry(request: int = 7, epoch: int = 1, reply: InboxAddress = REPLY) -> Parcel:
    return Parcel(Kind.INQUIRY, epoch, request, meta=msgspec.json.encode(Inquiry(reply=reply, number=5)))


def standings(ring: Ring) -> list[Standing]:
    return [msgspec.json.decode(p.meta, type=Standing) for p in ring.answers if p.kind is Kind.STANDING]


def test_a_stage_says_how_a_request_stands_without_a_step_and_whatever_its_epoch() -> None:
    ring = Ring(1)
    ring.ask(list(range(9)))
    ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    ring.works[0].work(0.0)
    for asked in (inquiry(), inquiry(request=8), inquiry(epoch=2)):
        ring.works[0].accept(Given(asked), 0.0)  # type: ignore[arg-type]
    assert len(ring.engines[0].steps) == 1
    known, *unknown = standings(ring)
    assert known == Standing(stage=0, number=5, known=True, filed=9, run=4, waiting=True)
    assert unknown == [Standing(stage=0, number=5, known=False)] * 2
    assert [p.epoch for p in ring.answers if p.kind is Kind.STANDING] == [1, 1, 2]
    ring.run()
    assert len(ring.tokens()) == 5 and ring.idle and ring.returned == 4


@pytest.mark.parametrize(
    "meta",
    [b"", b"{}", b"\xff", msgspec.json.encode(Inquiry(reply=InboxAddress(topic="edgelam/v1/x/dev/a/state"), number=1)),
     msgspec.json.encode(Inquiry(reply=InboxAddress(topic=REPLY.topic, broker="mqtt://elsewhere:1"), number=1))],
)  # fmt: skip
def test_an_inquiry_that_makes_no_sense_or_leads_elsewhere_is_refused(meta: bytes) -> None:
    ring = Ring(1)
    ring.works[0].accept(Given(Parcel(Kind.INQUIRY, 1, 7, meta=meta)), 0.0)  # type: ignore[arg-type]
    assert not ring.answers and ring.works[0].tally.refused == 1 and ring.returned == 1


def test_a_prompt_of_one_token_is_one_step() -> None:
    ring = Ring(2)
    ring.ask([8])
    ring.run()
    assert ring.tokens()[0] == 10
    assert [rows for _, _, rows in ring.engines[1].steps] == [1, 1, 1, 1, 1]


def test_a_stop_token_is_given_and_is_the_last() -> None:
    ring = Ring(1)
    ring.ask([5, 6], stop_ids=(9,))
    ring.run()
    assert ring.tokens() == [7, 8, 9] and ring.answers[-1].final and ring.idle


def test_an_answer_ends_where_the_context_is_full() -> None:
    ring = Ring(2, changes={"context_tokens": 8})
    ring.ask([1, 2, 3, 4, 5], max_new_tokens=100)
    ring.run()
    assert len(ring.tokens()) == 4 and ring.answers[-1].final and ring.idle


def test_answers_under_way_go_on_while_a_long_prompt_enters() -> None:
    ring = Ring(1, changes={"context_tokens": 4096, "prefill_chunk_tokens": 4})
    ring.ask([1, 2], request=1, max_new_tokens=30)
    ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    for _ in range(5):
        ring.works[0].work(0.0)
    ring.ask([3] * 32, request=2)
    ring.run()
    steps = ring.engines[0].steps[5:]
    assert [rows for _, _, rows in steps[:16]] == [4, 1] * 8
    assert len(ring.tokens(1)) == 30 and len(ring.tokens(2)) == 5


def test_a_third_request_is_told_that_the_stage_is_busy() -> None:
    ring = Ring(3)
    for request in (1, 2, 3):
        ring.ask([1, 2, 3], request=request)
    ring.run()
    assert [error.code for error in ring.errors()] == ["busy"]
    assert len(ring.tokens(1)) == len(ring.tokens(2)) == 5 and ring.idle


def test_a_busy_stage_in_the_middle_frees_the_stages_before_it() -> None:
    ring = Ring(3)
    ring.engines[1].rows = {0: 0, 1: 0}
    ring.ask([1, 2, 3, 4, 5, 6, 7])
    ring.run()
    assert [(error.code, error.stage) for error in ring.errors()] == [("busy", 1)]
    assert ring.works[0].live == 0 and not ring.engines[0].rows and not ring.engines[2].rows


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_engine_that_fails_ends_its_request_everywhere(stage: int, at: int) -> None:
    ring = Ring(3, fail_at={stage: at})
    ring.ask([1, 2, 3, 4, 5, 6])
    ring.run()
    assert [(error.code, error.stage) for error in ring.errors()] == [("engine", stage)]
    assert ring.idle
    ring.ask([9, 9], request=8)
    ring.run()
    assert len(ring.tokens(8)) == 5


def test_a_cancel_frees_every_stage() -> None:
    ring = Ring(3)
    ring.ask([1, 2, 3], max_new_tokens=60)
    for _ in range(4):
        for number, work in enumerate(ring.works):
            if ring.queues[number]:
                work.accept(Given(ring.queues[number].popleft()), 0.0)  # type: ignore[arg-type]
            work.work(0.0)
    assert not ring.idle
    ring.queues[0].append(Parcel(Kind.CLOSE, 1, 7))
    ring.run()
    assert ring.idle and not ring.errors()


def test_a_finished_request_costs_one_close_per_other_stage() -> None:
    ring = Ring(4)
    ring.ask([1, 2], max_new_tokens=1)
    ring.run()
    assert ring.passed == 1 + 3 + 3  # the prompt, its hidden states, and the closes: not one more


def test_a_close_for_an_unknown_request_does_not_circle() -> None:
    ring = Ring(3)
    ring.queues[0].append(Parcel(Kind.CLOSE, 1, 99))
    ring.queues[1].append(Parcel(Kind.CLOSE, 1, 99, 2**32 - 1))
    ring.run()
    assert ring.passed <= 5


def test_too_long_a_prompt_is_refused_by_name() -> None:
    ring = Ring(2)
    ring.ask([1] * 65)
    ring.run()
    assert [error.code for error in ring.errors()] == ["too-long"] and "64" in ring.errors()[0].text


@pytest.mark.parametrize("ids", [[1, 32], [-1, 1], [2**30]])
def test_tokens_beyond_the_vocabulary_never_reach_the_engine(ids: list[int]) -> None:
    ring = Ring(1)
    ring.ask(ids)
    ring.run()
    assert [error.code for error in ring.errors()] == ["protocol"]
    assert ring.engines[0].steps == [] and ring.idle


def test_rows_that_leave_a_gap_end_the_request() -> None:
    ring = Ring(2)
    ring.ask([1, 2, 3], max_new_tokens=60)
    ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    ring.works[0].work(0.0)
    ring.works[1].accept(Given(ring.queues[1].popleft()), 0.0)  # type: ignore[arg-type]
    hidden = Tensor.of(np.zeros((1, 8), np.float32))
    ring.queues[1].append(Parcel(Kind.HIDDEN, 1, 7, 5, 0, hidden))
    ring.run()
    assert [error.code for error in ring.errors()] == ["protocol"] and ring.idle


def test_parcels_of_another_epoch_are_dropped_and_counted() -> None:
    ring = Ring(1)
    ring.queues[0].append(prompt([1, 2], epoch=0))
    ring.queues[0].append(prompt([1, 2], epoch=2))
    ring.run()
    assert ring.works[0].tally.stale == 2 and not ring.answers and ring.returned == 2


def test_a_new_epoch_drops_what_ran_and_serves_what_comes() -> None:
    ring = Ring(1)
    ring.ask([1, 2], max_new_tokens=50)
    ring.run(steps=3000)
    ring.ask([1, 2], request=8, max_new_tokens=50)
    ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    ring.works[0].adopt(msgspec.structs.replace(ring.orders[0], epoch=2))
    assert ring.works[0].live == 0 and not ring.works[0].runnable
    ring.queues[0].append(prompt([1, 2], request=9, epoch=2))
    ring.run()
    assert len(ring.tokens(9)) == 5


def test_the_same_request_again_begins_anew() -> None:
    ring = Ring(2)
    ring.ask([1, 2, 3], max_new_tokens=60)
    ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    ring.ask([1, 2, 3])
    ring.run()
    assert ring.tokens() == [(3 + 2 + 2 * n) % 32 for n in range(5)] and ring.idle


def test_an_idle_request_gives_its_slot_back() -> None:
    ring = Ring(2)
    ring.works[1].accept(hidden_with_meta(idle_timeout_s=10.0), 100.0)
    ring.works[1].work(100.0)
    ring.works[1].tick(109.0)
    assert ring.works[1].live == 1
    ring.works[1].tick(112.0)
    assert ring.works[1].live == 0 and ring.works[1].tally.idle == 1


def hidden_with_meta(**changes: object) -> Given:
    tensor = Tensor.of(np.zeros((2, 8), np.float32))
    return Given(Parcel(Kind.HIDDEN, 1, 7, 0, 0, tensor, meta_of(9, **changes)))


def test_no_request_makes_a_stage_publish_outside_the_inboxes_of_its_site() -> None:
    for topic in (
        "edgelam/v1/lab/dev/pi5/desired",
        "edgelam/v1/other/act/chat/0/in",
        "edgelam/v1/lab/act/+/0/in",
        "edgelam/v1/lab/act/chat/#/in",
        "edgelam/v1/lab/act//0/in",
    ):
        ring = Ring(1)
        ring.ask([1, 2], reply=InboxAddress(topic=topic))
        ring.run()
        assert ring.answers == [] and ring.idle and ring.works[0].tally.refused == 1


def test_a_next_stage_that_takes_nothing_is_said_to_the_requester() -> None:
    ring = Ring(2)
    ring.blocked.add(0)
    ring.ask([1, 2])
    ring.run()
    assert [error.code for error in ring.errors()] == ["deadline"] and ring.idle


def test_every_parcel_gives_its_credit_back_once() -> None:
    ring = Ring(3)
    for request in range(4):
        ring.ask([1, 2, 3, 4, 5], request=request)
        ring.run()
    assert ring.returned == ring.passed


@given(st.integers(1, 300), st.integers(2, 40))
def test_chunks_cover_a_prompt_in_order_without_a_lonely_row(count: int, chunk: int) -> None:
    pieces = chunks_of(count, chunk)
    assert [row for start, end in pieces for row in range(start, end)] == list(range(count))
    sizes = [end - start for start, end in pieces]
    assert max(sizes) <= max(chunk, 3) and (count == 1 or min(sizes) >= 2)


KINDS = st.sampled_from(list(Kind))
TENSORS = st.sampled_from([
    None,
    Tensor.of(np.zeros((2, 8), np.float32)),
    Tensor.of(np.zeros((1, 8), np.float16)),
    Tensor.of(np.zeros((1, 7), np.float32)),
    Tensor.of(np.array([1, 2], np.int32)),
    Tensor.of(np.array([40], np.int32)),
    Tensor.of(np.zeros((1, 2, 2), np.int32)),
])  # fmt: skip
ROW_METAS = [rows_meta([RowOf(n, 1 + n) for n in range(count)]) for count in (1, 2)]
METAS = st.sampled_from([b"", b"{}", b"\xff", meta_of(2), meta_of(9), meta_of(131072), b"[" * 500, *ROW_METAS])


@settings(max_examples=150, deadline=None)
@given(st.lists(
    st.tuples(st.integers(0, 2), KINDS, st.integers(0, 2), st.integers(0, 3), st.integers(0, 70), TENSORS, METAS),
    max_size=40,
))  # fmt: skip
def test_no_parcel_breaks_a_ring_or_leaks_a_slot(parcels: list[tuple]) -> None:  # type: ignore[type-arg]
    ring = Ring(3)
    for stage, kind, epoch, request, position, tensor, meta in parcels:
        ring.queues[stage].append(Parcel(kind, epoch, request, position, FLAG_FINAL, tensor, meta))
    ring.run()
    assert ring.returned == ring.passed
    for work in ring.works:
        work.tick(1e6)
        work.drop_all()
    assert ring.idle
    ring.ask([1, 2, 3], request=50)
    ring.run()
    assert len(ring.tokens(50)) == 5
    assert inbox(0).topic == ring.orders[0].inbox.topic


class BusyRows(Stretch):
    """Says how long each step took: `row_s` a row of a chunk, `step_s` a step of one row."""

    def __init__(self, ring: list[Ring], row_s: float, step_s: float) -> None:
        super().__init__(1.0, 1)
        self._ring, self._row_s, self._step_s = ring, row_s, step_s

    def end(self, kind: str = "", rows: int = 0, context: int = 0) -> float:
        _, _, rows = self._ring[0].engines[0].steps[-1]
        return self._step_s if rows == 1 else rows * self._row_s


def entering(row_s: float, step_s: float, prompt: int, chunk: int = 64) -> list[int]:
    """Rows of the steps of a prompt that enters while another answer is under way."""
    holder: list[Ring] = []
    changes = {"context_tokens": 4096, "prefill_chunk_tokens": chunk}
    ring = Ring(1, changes=changes, stretch=BusyRows(holder, row_s, step_s))
    holder.append(ring)
    ring.ask([1, 2, 3, 4], request=1, max_new_tokens=400)
    ring.works[0].accept(Given(ring.queues[0].popleft()), 0.0)  # type: ignore[arg-type]
    for _ in range(5):
        ring.works[0].work(0.0)
    ring.ask(list(range(1, 9)) * (prompt // 8), request=2, max_new_tokens=3)
    ring.run()
    assert len(ring.tokens(1)) == 400 and len(ring.tokens(2)) == 3
    alone = Ring(1, changes=changes)
    alone.ask(list(range(1, 9)) * (prompt // 8), request=2, max_new_tokens=3)
    alone.run()
    assert ring.tokens(2) == alone.tokens(2)
    return [rows for slot, _, rows in ring.engines[0].steps if slot == 1 and rows > 1]


def test_a_prompt_that_enters_beside_an_answer_comes_in_pieces_that_take_about_as_long_as_its_steps() -> None:
    assert entering(row_s=0.001, step_s=0.0104, prompt=128) == [15, 15, 15, 15, 4, 15, 15, 15, 15, 4]
    costly = entering(row_s=0.010, step_s=0.001, prompt=64)
    assert costly[:3] == [4, 4, 4], "never less than 4 rows, but the last"
    assert entering(row_s=0.0001, step_s=0.1, prompt=128) == [64, 64], "cheap rows need no cutting"


@given(st.floats(1e-4, 0.1), st.floats(1e-4, 0.1), st.integers(1, 24), st.integers(2, 64))
@settings(max_examples=30, deadline=None)
def test_no_piece_of_a_prompt_has_one_row_and_none_is_lost(
    row_s: float, step_s: float, eights: int, chunk: int
) -> None:
    pieces = entering(row_s, step_s, eights * 8, chunk)
    assert sum(pieces) == eights * 8 and min(pieces) >= 2


def test_a_prompt_alone_keeps_its_chunks() -> None:
    ring = Ring(2, changes={"context_tokens": 4096, "prefill_chunk_tokens": 64})
    ring.ask([7] * 128, max_new_tokens=2)
    ring.run()
    assert [rows for _, _, rows in ring.engines[0].steps if rows > 1] == [64, 64]


def test_a_copy_that_waits_takes_nothing_and_gives_credit_back() -> None:
    ring = Ring(1, changes={"standby": True})
    ring.ask([1, 2, 3])
    ring.queues[0].append(Parcel(Kind.CLOSE, 1, 7, 0, 0))
    ring.run()
    [engine] = ring.engines
    assert engine.steps == [] and ring.answers == [] and ring.idle
    assert (ring.works[0].tally.refused, ring.returned) == (2, 2)
    assert "standby" in ring.works[0].last_refusal
