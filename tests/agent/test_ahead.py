"""Steps made before their messages are looked at: the same answers, the same bytes, the same accounts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.workers.ahead import StepAhead
from agent.workers.outboxes import Outboxes
from agent.workers.ring import StageWork
from agent.workers.stretch import Stretch
from models.engine.base import EngineFailed
from models.sampling import draw
from tests.agent.fakes import DEVICE, SITE, FakeEngine, order_of
from tests.wire.brokers import make_broker
from wire import topics
from wire.broker import Broker
from wire.channel import Inbox, Outbox
from wire.frames import Kind, Parcel, Tensor
from wire.messages import InboxAddress, RequestMeta, Sampling, StageError, StageOrder
from wire.mqtt import MqttTransport
from wire.transport import Link, Transport

REPLY = InboxAddress(topic=topics.INBOX.on(SITE, "requester-1", "0"))


@pytest.fixture(scope="module", params=["mosquitto", "amqtt"])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    started = make_broker(request.param, tmp_path_factory.mktemp("broker"))
    started.start()
    yield started
    started.stop()


class Row:
    """One row through a FakeEngine."""

    def __init__(self, engine: RowEngine, slot: int) -> None:
        order = engine.order
        self._engine = engine
        self._slot = slot
        self._given = bytearray(4 if order.embedding else order.hidden * 4)
        self.result: Any = np.zeros(order.vocabulary if order.head else (1, order.hidden), np.float32)
        self.output = None if order.head else memoryview(self.result.view(np.uint8).reshape(-1))

    def fill(self, given: memoryview) -> bool:
        self._given[:] = given
        return len(given) == len(self._given) and not (
            self._engine.order.embedding and int.from_bytes(given, "little") >= self._engine.order.vocabulary
        )

    def run(self, position: int) -> None:
        order = self._engine.order
        rows = np.frombuffer(self._given, np.int32 if order.embedding else np.float32)
        rows = rows.astype(np.int64) if order.embedding else rows.reshape(1, order.hidden)
        self.result[...] = self._engine.step(self._slot, rows, position)
        if position == self._engine.large_at:
            self.result[...] = 1e9
        self._engine.rows_ahead += 1

    def settle(self, position: int) -> None:
        if position == self._engine.no_number_at:
            raise EngineFailed("the stage's output left the range of f32")


class RowEngine(FakeEngine):
    rows_ahead = 0
    no_number_at = -1
    large_at = -1

    def row(self, slot: int) -> Row:  # type: ignore[override]
        return Row(self, slot)


class Stage:
    """One stage with a connection of its own, stepped by hand as a worker does."""

    def __init__(self, url: str, order: StageOrder, ahead: bool) -> None:
        self.transport = MqttTransport(url, f"stage-{order.stage}-{ahead}", keepalive_s=30, five=False)
        self.inbox = Inbox(self.transport, order.inbox.topic)
        self.outboxes = Outboxes(self.transport, self.transport, order.next)
        self.engine = RowEngine(order)
        stretch = Stretch(1.0, 1)
        self.work = StageWork(order, self.engine, self.outboxes, self.inbox.done, draw, stretch, SITE, DEVICE)
        self.ahead = StepAhead(self.transport, self.transport, self.outboxes, self.work, self.engine, draw, stretch)
        if ahead:
            self.transport.ahead = self.ahead

    def turn(self) -> None:
        if not self.work.runnable:
            self.ahead.lay_out(self.inbox)
        else:
            self.ahead.forget()
        self.transport.poll(0.002)
        while (delivery := self.inbox.take()) is not None:
            self.work.accept(delivery, 0.0)
        self.work.work(0.0)
        self.inbox.tick()
        self.outboxes.tick()


class Deployment:
    """A ring and a requester on a broker."""

    def __init__(self, url: str, stages: int, ahead: bool, **changes: object) -> None:
        self.stages = [Stage(url, order_of(number, stages, **changes), ahead) for number in range(stages)]
        self.requester = MqttTransport(url, f"requester-{ahead}", keepalive_s=30, five=False)
        self.replies = Inbox(self.requester, REPLY.topic)
        self.outbox = Outbox(self.requester, self.stages[0].inbox.topic)
        self.answers: list[Parcel] = []
        transports: list[Transport] = [self.requester, *(stage.transport for stage in self.stages)]
        for transport in transports:
            transport.start()
        for _ in range(3000):
            for transport in transports:
                transport.poll(0.002)
            if all(transport.link is Link.UP for transport in transports):
                break
        for transport in transports:  # subscriptions come into force
            transport.poll(0.05)

    def ask(self, ids: list[int], request: int, new_tokens: int, stop: int = -1, **changes: Any) -> None:
        sampling = Sampling(**changes)
        meta = RequestMeta(
            reply=REPLY,
            sampling=sampling,
            prompt_tokens=len(ids),
            max_new_tokens=new_tokens,
            stop_ids=(stop,) if stop >= 0 else (),
        )
        tokens = Tensor.of(np.array(ids, np.int32))
        self.outbox.send(Parcel(Kind.TOKENS, 1, request, 0, 0, tokens, msgspec.json.encode(meta)))

    def run(self, finals: int) -> None:
        """Until so many requests have ended."""
        for _ in range(4000):
            for stage in self.stages:
                stage.turn()
            self.requester.poll(0.0)
            while (delivery := self.replies.take()) is not None:
                self.answers.append(delivery.parcel)
                self.replies.done(delivery)
            if sum(parcel.final for parcel in self.answers) >= finals:
                return
        raise AssertionError("it does not end")

    def tokens(self, request: int) -> list[int]:
        found = [p for p in self.answers if p.request == request and p.kind is Kind.TOKENS]
        return [int(parcel.tensor.array()[0]) for parcel in found if parcel.tensor is not None]

    def errors(self) -> list[str]:
        found = [parcel for parcel in self.answers if parcel.kind is Kind.ERROR]
        return [msgspec.json.decode(parcel.meta, type=StageError).text for parcel in found]

    @property
    def steps(self) -> list[int]:
        return [stage.ahead.steps for stage in self.stages]

    def accounts(self) -> list[tuple[object, ...]]:
        """All that is counted, but for times."""
        found = []
        for stage in self.stages:
            tally, counters, box = stage.work.tally, stage.inbox.counters, stage.outboxes._next
            found.append(
                (
                    tally.decode_steps, tally.decode_sent_bytes, tally.refused, tally.requests, counters.parcels,
                    counters.frames, counters.bytes, counters.refused, counters.gaps, stage.inbox.held_bytes,
                    box.parcels, box.frames, box.bytes, stage.transport.bytes_sent, stage.transport.bytes_received,
                    stage.engine.steps, stage.engine.rows,
                )
            )  # fmt: skip
        return found

    def close(self) -> None:
        self.requester.close()
        for stage in self.stages:
            stage.transport.close()


@pytest.mark.parametrize(("stages", "codec"), [(2, "as-is"), (3, "as-is"), (3, "bf16"), (3, "int8-token")])
def test_an_answer_is_the_same_to_the_byte_and_all_but_its_first_steps_are_made_ahead(
    stages: int, codec: str, broker: Broker
) -> None:
    results = []
    for ahead in (False, True):
        deployment = Deployment(broker.url, stages, ahead, row_codec_in=codec, row_codec_out=codec)
        deployment.ask([1, 2, 3, 4, 5], 7, 20)
        deployment.run(1)
        for _ in range(20):
            for stage in deployment.stages:
                stage.turn()
        results.append((deployment.tokens(7), deployment.accounts()))
        if ahead:
            assert all(15 <= steps < 20 for steps in deployment.steps), deployment.steps
            assert [stage.engine.rows_ahead for stage in deployment.stages] == deployment.steps
        else:
            assert set(deployment.steps) == {0}
        deployment.close()
    assert results[0] == results[1]
    assert len(results[0][0]) == 20


def test_a_stop_token_that_comes_ahead_ends_the_answer(broker: Broker) -> None:
    deployment = Deployment(broker.url, 3, True, vocabulary=32)
    deployment.ask([10], 1, 60, stop=31)  # each token is three more than the one before: 13, 16, .. 31
    deployment.run(1)
    assert deployment.tokens(1)[-1] == 31 and deployment.steps[-1] > 3
    for _ in range(20):
        for stage in deployment.stages:
            stage.turn()
    assert all(stage.work.live == 0 and not stage.engine.rows for stage in deployment.stages)
    deployment.close()


def test_requests_side_by_side_take_the_ordinary_way_and_one_that_is_left_the_short_one(broker: Broker) -> None:
    alone = Deployment(broker.url, 2, False)
    alone.ask([1, 2, 3], 1, 12)
    alone.run(1)
    alone.ask([4, 5], 2, 30, temperature=1.0, seed=5)
    alone.run(2)
    alone.close()
    both = Deployment(broker.url, 2, True)
    both.ask([1, 2, 3], 1, 12)
    both.ask([4, 5], 2, 30, temperature=1.0, seed=5)
    both.run(2)
    assert both.tokens(1) == alone.tokens(1) and both.tokens(2) == alone.tokens(2)
    assert min(both.steps) > 0
    both.close()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_an_engine_that_fails_ahead_ends_its_request_with_the_reason_and_the_next_one_works(
    stage: int, broker: Broker
) -> None:
    deployment = Deployment(broker.url, 3, True)
    deployment.stages[stage].engine.fail_at = 9
    deployment.ask([1, 2], 1, 30)
    deployment.run(1)
    assert deployment.errors() == ["made to fail"]
    for _ in range(30):
        for one in deployment.stages:
            one.turn()
    assert all(one.work.live == 0 and not one.engine.rows for one in deployment.stages)
    deployment.ask([1, 2], 2, 8)
    deployment.run(2)
    assert len(deployment.tokens(2)) == 8
    deployment.close()


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_result_that_is_no_number_is_told_before_its_token_comes(stage: int, broker: Broker) -> None:
    deployment = Deployment(broker.url, 3, True)
    deployment.stages[stage].engine.no_number_at = 10
    deployment.ask([1, 2], 1, 30)
    deployment.run(1)
    [error] = [parcel for parcel in deployment.answers if parcel.kind is Kind.ERROR]
    assert "left the range" in deployment.errors()[0]
    before = deployment.answers[: deployment.answers.index(error)]
    assert all(parcel.position <= 10 for parcel in before)
    deployment.close()


def test_what_is_not_as_foreseen_takes_the_ordinary_way(broker: Broker) -> None:
    """Frames of others between those of the answer: refused as ever, and the answer goes on."""
    deployment = Deployment(broker.url, 2, True)
    stranger = Outbox(deployment.requester, deployment.stages[1].inbox.topic)
    deployment.ask([1, 2, 3], 1, 25)
    for turn in range(400):
        if turn % 3 == 0:
            stranger.send(Parcel(Kind.HIDDEN, 1, 99, 4, 0, Tensor.of(np.zeros((1, 8), np.float32))))
        if turn % 5 == 0:
            deployment.requester.publish(deployment.stages[0].inbox.topic, b"elm and then nothing")
        for stage in deployment.stages:
            stage.turn()
        deployment.requester.poll(0.0)
        while (delivery := deployment.replies.take()) is not None:
            deployment.answers.append(delivery.parcel)
            deployment.replies.done(delivery)
        if deployment.tokens(1)[24:]:
            break
    clean = Deployment(broker.url, 2, False)
    clean.ask([1, 2, 3], 1, 25)
    clean.run(1)
    assert deployment.tokens(1) == clean.tokens(1)
    assert deployment.stages[1].work.tally.refused > 0 and deployment.stages[0].inbox.counters.refused > 0
    deployment.close()
    clean.close()


def test_a_lost_connection_forgets_what_was_laid_out(tmp_path: Path) -> None:
    started = make_broker("mosquitto", tmp_path)
    started.start()
    deployment = Deployment(started.url, 2, True)
    deployment.ask([1, 2, 3], 1, 50)
    for _ in range(40):
        for stage in deployment.stages:
            stage.turn()
    assert min(deployment.steps) > 0
    started.stop()
    for _ in range(100):
        for stage in deployment.stages:
            stage.turn()
    assert all(stage.transport.link is not Link.UP for stage in deployment.stages)
    deployment.close()


def test_a_row_that_its_codec_can_not_say_ends_its_request_with_the_reason(broker: Broker) -> None:
    deployment = Deployment(broker.url, 2, True, row_codec_in="f16", row_codec_out="f16")
    deployment.stages[0].engine.large_at = 12
    deployment.ask([1, 2], 1, 30)
    deployment.run(1)
    assert ["range of f16" in text for text in deployment.errors()] == [True]
    assert deployment.stages[0].ahead.steps > 5
    deployment.close()
