"""A stage of an item model and its parcels, with an engine that adds, joined in memory."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.workers.itemwork import ItemWork
from agent.workers.stretch import Stretch
from models.engine.base import EngineFailed
from tests.agent.fakes import DEVICE, SITE, order_of
from wire import topics
from wire.channel import Backlogged
from wire.frames import FLAG_FINAL, Kind, Parcel, Tensor
from wire.messages import InboxAddress, ItemMeta, StageError

REPLY = InboxAddress(topic=topics.INBOX.on(SITE, "requester-1", "0"))
ROWS = 4


@dataclass
class Given:
    """Stands for wire.channel.Delivery."""

    parcel: Parcel


class Adding:
    """Adds one to each of `rows` bytes."""

    runs = 0
    fails = False

    def problem_with(self, size_bytes: int, rows: int) -> str:
        return "" if size_bytes == rows else f"{size_bytes} bytes came for an item of {rows} rows"

    def run(self, given: Any, rows: int) -> Any:
        self.runs += 1
        if self.fails:
            raise EngineFailed("no luck")
        return given[:rows] + 1


@dataclass
class Stage:
    """One stage; what it says is kept."""

    stage: int = 0
    stages: int = 2
    changes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.next: list[Parcel] = []
        self.told: list[tuple[str, Parcel]] = []
        self.done: list[Parcel] = []
        self.blocked = False
        self.engine = Adding()
        order = order_of(self.stage, self.stages, runs="items", **self.changes)
        self.work = ItemWork(
            order,
            self.engine,  # type: ignore[arg-type]
            self,
            lambda delivery: self.done.append(delivery.parcel),
            Stretch(1.0, 1),
            SITE,
            DEVICE,
        )

    next_backlog_bytes = next_bytes = 0

    def to_next(self, parcel: Parcel) -> None:
        if self.blocked:
            raise Backlogged("no credit")
        self.next.append(parcel)

    def to_requester(self, topic: str, parcel: Parcel) -> None:
        self.told.append((topic, parcel))

    def accept(self, *parcels: Parcel) -> None:
        for parcel in parcels:
            self.work.accept(Given(parcel), 0.0)  # type: ignore[arg-type]

    def run_all(self) -> None:
        while self.work.work(0.0):
            pass


def item(request: int = 7, epoch: int = 1, rows: int = ROWS, reply: InboxAddress = REPLY, size: int = ROWS) -> Parcel:
    meta = msgspec.json.encode(ItemMeta(reply=reply, rows=rows))
    return Parcel(Kind.ITEM, epoch, request, 0, FLAG_FINAL, Tensor.of(np.arange(size, dtype=np.uint8)), meta)


def error_in(stage: Stage) -> StageError:
    [(topic, parcel)] = stage.told
    assert topic == REPLY.topic and parcel.kind is Kind.ERROR and parcel.request == 7
    return msgspec.json.decode(parcel.meta, type=StageError)


def values(parcel: Parcel) -> list[int]:
    assert parcel.tensor is not None
    found: list[int] = parcel.tensor.array().tolist()
    return found


def test_an_item_goes_through_the_stages_and_says_what_it_took() -> None:
    first, last = Stage(0), Stage(1)
    first.accept(item(7), item(8))
    assert first.work.runnable and first.work.live == 2 and not first.done
    first.run_all()
    assert [parcel.request for parcel in first.next] == [7, 8] and not first.told
    last.accept(*first.next)
    last.run_all()
    assert [(topic, values(parcel), parcel.final) for topic, parcel in last.told] == [
        (REPLY.topic, [2, 3, 4, 5], True)
    ] * 2
    meta = msgspec.json.decode(last.told[0][1].meta, type=ItemMeta)
    assert [time.sent_bytes for time in meta.stages] == [4, 4] and all(time.busy_s >= 0 for time in meta.stages)
    assert (first.work.ended, len(first.done)) == (2, 2)
    assert (first.work.tally.prefill_steps, first.work.tally.prefill_tokens) == (2, 8)


def test_an_item_that_comes_twice_is_run_once() -> None:
    stage = Stage()
    stage.accept(item(7), item(7))
    stage.run_all()
    stage.accept(item(7))
    stage.run_all()
    assert stage.engine.runs == len(stage.next) == 1
    assert len(stage.done) == 3, "the credit of all three is given back"


def test_an_item_of_another_epoch_is_dropped_and_a_new_epoch_forgets_all() -> None:
    stage = Stage()
    stage.accept(item(7, epoch=2))
    assert stage.work.tally.stale == 1 and not stage.work.runnable
    stage.accept(item(8))
    stage.work.adopt(msgspec.structs.replace(stage.work.order, epoch=2))
    assert not stage.work.runnable and len(stage.done) == 2
    stage.accept(item(8, epoch=2))
    stage.run_all()
    assert [parcel.epoch for parcel in stage.next] == [2]


@pytest.mark.parametrize("stages", [1, 2])
def test_a_close_drops_what_waits_and_goes_on(stages: int) -> None:
    stage = Stage(0, stages)
    stage.accept(item(7), item(8), Parcel(Kind.CLOSE, 1, 7))
    stage.run_all()
    requests = [parcel.request for parcel in stage.next if parcel.kind is Kind.ITEM]
    closes = [parcel.request for parcel in stage.next if parcel.kind is Kind.CLOSE]
    answered = [parcel.request for _, parcel in stage.told]
    assert (requests, closes, answered) == (([8], [7], []) if stages == 2 else ([], [], [8]))
    assert len(stage.done) == 3


def test_a_step_that_fails_is_told_and_the_next_is_made() -> None:
    stage = Stage()
    stage.engine.fails = True
    stage.accept(item(7))
    stage.run_all()
    assert error_in(stage).code == "engine" and not stage.next
    stage.engine.fails = False
    stage.accept(item(8))
    stage.run_all()
    assert [parcel.request for parcel in stage.next] == [8]


def test_what_can_not_be_passed_on_is_told_to_the_requester_as_a_loss() -> None:
    stage = Stage()
    stage.blocked = True
    stage.accept(item(7))
    stage.run_all()
    assert error_in(stage).code == "stopped" and stage.work.tally.unsent == 1


@pytest.mark.parametrize(
    "parcel",
    [
        item(size=ROWS + 1),
        item(rows=5),
        msgspec.structs.replace(item(), tensor=Tensor.of(np.zeros((2, 2), np.uint8))),
        msgspec.structs.replace(item(), tensor=Tensor.of(np.zeros(4, np.float32))),
    ],
)
def test_what_is_no_item_of_this_stage_is_refused_and_its_requester_knows(parcel: Parcel) -> None:
    stage = Stage()
    stage.accept(parcel)
    assert not stage.work.runnable and error_in(stage).code == "protocol" and len(stage.done) == 1


@pytest.mark.parametrize(
    "parcel",
    [
        msgspec.structs.replace(item(), meta=b"{}"),
        msgspec.structs.replace(item(), meta=b"\xff" * 40),
        item(reply=InboxAddress(topic="edgelam/v1/elsewhere/act/requester-1/0/in")),
        item(reply=InboxAddress(topic=REPLY.topic, broker="mqtt://10.0.0.1:1883")),
        msgspec.structs.replace(item(), tensor=None),
        Parcel(Kind.HIDDEN, 1, 7, 0, 0, Tensor.of(np.zeros(4, np.uint8))),
    ],
)
def test_what_names_no_requester_here_is_refused_without_an_answer(parcel: Parcel) -> None:
    stage = Stage()
    stage.accept(parcel)
    assert not stage.work.runnable and not stage.told and not stage.next
    assert stage.work.tally.refused == 1 and stage.work.last_refusal and len(stage.done) == 1


def test_a_copy_that_waits_makes_no_steps() -> None:
    stage = Stage(changes={"standby": True})
    stage.accept(item())
    assert not stage.work.runnable and "standby" in stage.work.last_refusal


def test_garbage_in_meta_never_raises_and_never_runs() -> None:
    chance, stage = random.Random(1), Stage()
    good = item().meta
    for _ in range(2000):
        broken = bytearray(good)
        broken[chance.randrange(len(broken))] = chance.getrandbits(8)
        stage.accept(msgspec.structs.replace(item(chance.getrandbits(60)), meta=bytes(broken)))
    stage.run_all()
    assert len(stage.done) == 2000
    assert stage.engine.runs == len(stage.next) < 2000
