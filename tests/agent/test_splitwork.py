"""Workers with the ends of a model, and the one with its trunk: what they say to each other, and when it is lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from agent.workers.roundwork import device_seed  # noqa: E402
from agent.workers.splitwork import EndsWork, SplitWork, TrunkWork  # noqa: E402
from agent.workers.stretch import Stretch  # noqa: E402
from models.formats.bert import read_bert_config  # noqa: E402
from models.lora.adapter import AdapterSpec, flat, initial, shapes  # noqa: E402
from models.training.samples import Split  # noqa: E402
from tests.models.tiny_bert import write_bert  # noqa: E402
from tests.training.split_models import Halves, InOnePlace, bert, rows_of, task_of  # noqa: E402
from wire.frames import Kind, Parcel, Tensor  # noqa: E402
from wire.messages import (  # noqa: E402
    InboxAddress,
    Peer,
    RoundMeta,
    SplitRound,
    StageError,
    StageOrder,
    UpdateMeta,
)
from wire.transport import NotConnected  # noqa: E402

pytestmark = pytest.mark.torch

SITE = "lab"
ENDS = ("a", "b")
PARTS = ("a", "b", "c")
STEPS = 3
SPEC = AdapterSpec(rank=2, alpha=4.0, matrices=("q", "v"), seed=4, labels=3)


def inbox(device: str) -> str:
    return f"edgelam/v1/{SITE}/act/tune-n/{'trunkab'.index(device[0])}/in"


REPLY = f"edgelam/v1/{SITE}/act/requester-1/0/in"


class Delivery:
    def __init__(self, parcel: Parcel) -> None:
        self.parcel = parcel


class Sender:
    next_backlog_bytes = 0
    next_bytes = 0

    def __init__(self, sent: deque[tuple[str, Parcel]]) -> None:
        self.sent = sent
        self.down = False
        self.dropped: list[str] = []

    def pace(self, _topic: str, _bytes_per_s: float | None) -> None:
        return

    def waits(self, _topic: str) -> bool:
        return False

    def drop(self, topic: str) -> None:
        self.dropped.append(topic)

    def to_next(self, parcel: Parcel) -> None:
        raise AssertionError("there is no next stage")

    def to_requester(self, topic: str, parcel: Parcel) -> None:
        if self.down:
            raise NotConnected("down")
        self.sent.append((topic, parcel))


class Part:
    def __init__(self, stage: Any, shaped: Any, rows: Split) -> None:
        self.stage, self.shaped, self.rows, self.bad_rows = stage, shaped, rows, 1


class Bench:
    """A trunk and two ends, and what is on its way between them."""

    def __init__(self, folder: Path, held_out: int = 2) -> None:
        write_bert(folder)
        config = read_bert_config(folder)
        self.halves: Halves = bert(folder, SPEC, ENDS, initial(config, SPEC))
        self.shaped = shapes(config, SPEC)
        self.start = flat(initial(config, SPEC), self.shaped)
        rng = np.random.default_rng(3)
        self.rows = {
            device: Split(rows_of(rng, 4 + place, 16, 3), rows_of(rng, held_out, 16, 3) if held_out else ())
            for place, device in enumerate(ENDS)
        }
        self.task = task_of(SPEC, STEPS, batch_rows=2, labels=("x", "y", "z"), row_tokens=16)
        self.sent: deque[tuple[str, Parcel]] = deque()
        self.senders: dict[str, Sender] = {}
        self.works: dict[str, SplitWork] = {}
        self.told: list[Parcel] = []
        self.returned = 0
        order = StageOrder(
            deployment="tune-n", epoch=7, stage=0, stages=256, model="m", engine="torch", graph=self.task.tokenizer,
            weights=(), embedding=True, head=True, first_block=0, end_block=0, hidden=config.hidden, vocabulary=16,
            wire_dtype="f32", context_tokens=16, slots=1, prefill_chunk_tokens=2,
            inbox=InboxAddress(topic=REPLY), next=InboxAddress(topic=REPLY), runs="rounds", training=self.task,
        )  # fmt: skip
        for device in ("t", *ENDS):
            sender = self.senders[device] = Sender(self.sent)
            stage = self.halves.trunk if device == "t" else self.halves.ends[device]
            part = Part(stage, self.shaped, self.rows.get(device, Split((), ())))
            kind = TrunkWork if device == "t" else EndsWork
            self.works[device] = kind(order, part, sender, self._done, Stretch(1.0, 1), SITE, device)  # type: ignore[arg-type]

    def _done(self, _delivery: Any) -> None:
        self.returned += 1

    def ask(self, device: str, session: int = 5, request: int | None = None, train: bool = True) -> None:
        names = ENDS if device == "t" else ("t",)
        peers = tuple(Peer(device=name, inbox=InboxAddress(topic=inbox(name))) for name in names)
        meta = RoundMeta(
            reply=InboxAddress(topic=REPLY), round=2, parts=PARTS, train=train,
            split=SplitRound(session=session, peers=peers, patience_s=30.0),
        )  # fmt: skip
        request = request or session * 10 + ("t", *ENDS).index(device)
        tensor = Tensor.of(self.start) if device == "t" else None
        self.give(device, Parcel(Kind.ROUND, 7, request, 0, 0, tensor, msgspec.json.encode(meta)))

    def give(self, device: str, parcel: Parcel) -> None:
        self.works[device].accept(Delivery(parcel), 0.0)  # type: ignore[arg-type]

    def turn(self) -> bool:
        """Let all work and hear what was sent; False if nothing happened."""
        moved = False
        for work in self.works.values():
            while work.runnable:
                moved = work.work(0.0) or moved
        while self.sent:
            topic, parcel = self.sent.popleft()
            moved = True
            to = next((name for name in self.works if inbox(name) == topic), "")
            if to:
                self.give(to, parcel)
            else:
                assert topic == REPLY
                self.told.append(parcel)
        return moved

    def through(self) -> None:
        while self.turn():
            pass

    def updates(self) -> dict[str, tuple[UpdateMeta, Any]]:
        found = {}
        for parcel in self.told:
            assert parcel.kind is Kind.UPDATE, parcel.meta
            meta = msgspec.json.decode(parcel.meta, type=UpdateMeta)
            found[meta.device] = meta, None if parcel.tensor is None else parcel.tensor.array()
        return found

    def errors(self) -> list[StageError]:
        found = [msgspec.json.decode(one.meta, type=StageError) for one in self.told if one.kind is Kind.ERROR]
        self.told.clear()
        return found


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    yield Bench(tmp_path)


def expected(bench: Bench) -> Any:
    seeds = {device: device_seed(bench.task.seed, device) for device in ENDS}
    one = InOnePlace(bench.halves, bench.rows, bench.task, bench.start, PARTS, seeds)
    for _ in range(STEPS):
        one.step()
    return one.vector()


@pytest.mark.parametrize("order", [("t", "a", "b"), ("a", "b", "t"), ("b", "t", "a")])
def test_a_round_comes_to_what_one_place_comes_to(order: tuple[str, ...], bench: Bench) -> None:
    for device in order:
        bench.ask(device)
        bench.through()
    updates = bench.updates()
    assert set(updates) == {"t", *ENDS}
    np.testing.assert_allclose(updates["t"][1], expected(bench), atol=1e-5)
    assert updates["t"][0].samples == 4 + 5 and updates["t"][0].loss is None
    sent = sum(updates[device][0].peer_sent_bytes for device in ENDS)
    assert sent == updates["t"][0].peer_got_bytes > 0
    assert updates["t"][0].peer_sent_bytes == sum(updates[device][0].peer_got_bytes for device in ENDS)
    for place, device in enumerate(ENDS):
        meta, vector = updates[device]
        assert vector is None and meta.samples == 4 + place and meta.held_out_count == 2 and meta.loss is not None
    assert all(not work.live and not work.runnable for work in bench.works.values())
    assert bench.returned > 10, "credit is returned for all that came"
