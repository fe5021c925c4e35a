"""A worker that trains: one round at a time, the same question twice is one, and a lost connection loses nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from agent.workers import roundwork  # noqa: E402
from agent.workers.ledger import Ledger  # noqa: E402
from agent.workers.roundwork import RoundWork, device_seed  # noqa: E402
from agent.workers.stretch import Stretch  # noqa: E402
from models.training.rounds import Diverged  # noqa: E402
from models.training.samples import Row, Split  # noqa: E402
from tests.agent.training_fakes import Delivery, Sender  # noqa: E402
from wire.frames import Kind, Parcel, Tensor  # noqa: E402
from wire.messages import ArtifactRef, InboxAddress, RoundMeta, StageError, StageOrder, TrainingTask, UpdateMeta  # noqa: E402
from wire.privacy import Privacy  # noqa: E402

pytestmark = pytest.mark.torch

SITE = "lab"
REPLY = "edgelam/v1/lab/act/requester-1/0/in"
TASK = TrainingTask(
    data="d", tokenizer=ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), rank=1, alpha=1.0, matrices=("q",),
    row_tokens=8, batch_rows=1, steps=2, learning_rate=0.1, most_norm=1.0, held_out=0.0, seed=1,
)  # fmt: skip
INBOX = InboxAddress(topic="edgelam/v1/lab/act/tune-n/0/in")
ORDER = StageOrder(
    deployment="tune-n", epoch=7, stage=0, stages=1, model="m", engine="torch", graph=TASK.tokenizer, weights=(),
    embedding=True, head=True, first_block=0, end_block=1, hidden=4, vocabulary=8, wire_dtype="f32", context_tokens=8,
    slots=1, prefill_chunk_tokens=2, inbox=INBOX, next=INBOX, runs="rounds", training=TASK,
)  # fmt: skip
START = np.zeros(4, np.float32)


class FakeRound:
    """Two steps that add 1 each."""

    made: ClassVar[list[FakeRound]] = []

    def __init__(
        self, stage: Any, shaped: Any, rows: Any, task: Any, seed: int, asked: RoundMeta, start: Any, guard: Any = None
    ) -> None:
        if len(start) != 4:
            raise ValueError("the factors have 4")
        self.number, self.start, self.done, self.error = asked.round, start, 0, None
        self.loss, self.held_out_loss, self.held_out_count = 1.5, None, 0
        self.held_out_right = None
        self.guard = guard
        FakeRound.made.append(self)

    def step(self) -> bool:
        if self.error is not None:
            raise self.error
        self.done += 1
        return self.done < 2

    def vector(self) -> Any:
        return self.start + np.float32(self.done)


class Model:
    stage: Any = None
    shaped: Any = None
    rows = Split((Row(np.array([1, 2]), 1),), ())
    bad_rows = 3
    fingerprint = "of these rows"
    ledger: Any = None
    own: Any = None


class Bench:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        FakeRound.made = []
        monkeypatch.setattr(roundwork, "Round", FakeRound)
        self.sent: list[tuple[str, Parcel]] = []
        self.sender = Sender(self.sent)
        self.returned = 0
        self.model = Model()
        self.work = RoundWork(ORDER, self.model, self.sender, self._done, Stretch(1.0, 1), SITE, "pi4")  # type: ignore[arg-type]

    def make_private(self, ledger: Ledger, epsilon: float, rounds: int) -> None:
        self.model.ledger = ledger
        task = msgspec.structs.replace(TASK, rounds=rounds, privacy=Privacy(epsilon=epsilon))
        self.work.adopt(msgspec.structs.replace(ORDER, training=task))

    def _done(self, _delivery: Any) -> None:
        self.returned += 1

    def give(self, kind: Kind = Kind.ROUND, request: int = 5, epoch: int = 7, tensor: Any = START, **meta: Any) -> None:
        fields = {"reply": InboxAddress(topic=REPLY), "round": 2, "parts": ("a", "b"), **meta}
        data = msgspec.json.encode(RoundMeta(**fields))
        parcel = Parcel(kind, epoch, request, 0, 0, None if tensor is None else Tensor.of(tensor), data)
        self.work.accept(Delivery(parcel), 0.0)  # type: ignore[arg-type]

    def go(self) -> None:
        while self.work.work(0.0):
            pass


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(monkeypatch)


def test_a_round_is_trained_and_its_update_sent(bench: Bench) -> None:
    bench.give()
    assert bench.work.runnable and bench.work.live == 1
    bench.go()
    [(topic, parcel)] = bench.sent
    assert topic == REPLY and parcel.kind is Kind.UPDATE and (parcel.epoch, parcel.request) == (7, 5)
    assert parcel.tensor is not None and parcel.tensor.array().tolist() == [2, 2, 2, 2]
    meta = msgspec.json.decode(parcel.meta, type=UpdateMeta)
    assert (meta.round, meta.device, meta.samples, meta.bad_rows, meta.loss) == (2, "pi4", 1, 3, 1.5)
    assert bench.returned == 1 and not bench.work.live


def test_a_private_round_is_paid_for_before_it_begins_and_says_what_it_cost(bench: Bench, tmp_path: Path) -> None:
    bench.make_private(Ledger(tmp_path, "d"), epsilon=4.0, rounds=3)
    bench.give()
    assert (tmp_path / "d.json").is_file(), "before the first step"
    bench.go()
    bench.give()
    [_, (_, again)] = bench.sent
    meta = msgspec.json.decode(again.meta, type=UpdateMeta)
    assert meta.noise is not None and meta.epsilon is not None and 0 < meta.epsilon < 4.0 and meta.compute_s == 0
    book = json.loads((tmp_path / "d.json").read_bytes())
    assert book["jobs"]["tune-n/7"]["releases"] == 2, "the same question is no other release"
    [made] = FakeRound.made
    assert made.guard.measure.noise == meta.noise


def test_a_private_round_beyond_the_budget_is_not_begun(bench: Bench, tmp_path: Path) -> None:
    bench.make_private(Ledger(tmp_path, "d"), epsilon=4.0, rounds=1)
    bench.give()
    bench.go()
    bench.give(request=6, round=3)
    [_, (topic, parcel)] = bench.sent
    assert topic == REPLY and parcel.kind is Kind.ERROR
    assert "the budget of tune-n/7 is spent" in msgspec.json.decode(parcel.meta, type=StageError).text
    assert len(FakeRound.made) == 1


def test_a_damaged_ledger_begins_nothing(bench: Bench, tmp_path: Path) -> None:
    bench.make_private(Ledger(tmp_path, "d"), epsilon=4.0, rounds=1)
    (tmp_path / "d.json").write_bytes(b"{")
    bench.give()
    [(_, parcel)] = bench.sent
    assert parcel.kind is Kind.ERROR and not FakeRound.made
    bench.give(request=6, train=False)
    assert len(FakeRound.made) == 1, "who only judges tells nothing that the ledger is for"


def test_an_update_is_sent_at_the_pace_that_the_round_asks_for(bench: Bench) -> None:
    bench.give(bytes_per_s=5e4)
    bench.go()
    bench.give(request=6, round=3)
    bench.go()
    assert bench.sender.paces == [5e4, None]


def test_what_is_on_its_way_is_not_sent_twice_and_nothing_more_of_it_when_nobody_waits(bench: Bench) -> None:
    bench.give(bytes_per_s=5e4)
    bench.go()
    bench.sender.waiting = True
    bench.give(bytes_per_s=5e4)
    assert len(bench.sent) == 1, "asked again, while it is on its way"
    bench.work.drop_all()
    bench.sender.waiting = False
    bench.work.tick(0.0)
    assert len(bench.sent) == 2 and len(bench.sender.dropped) == 1, "the connection was lost, and with it a part"
    bench.sender.waiting = True
    bench.give(request=6, round=3)
    assert len(bench.sender.dropped) == 2, "another round has begun"
    bench.go()
    assert len(bench.sent) == 3
    bench.give(Kind.CLOSE, request=6)
    assert len(bench.sender.dropped) == 3


def test_what_goes_wrong_in_a_private_round_is_said_on_the_board_alone(bench: Bench, tmp_path: Path) -> None:
    bench.make_private(Ledger(tmp_path, "d"), epsilon=4.0, rounds=1)
    bench.give()
    FakeRound.made[-1].error = RuntimeError("rows of 7, 9 and 11 tokens")
    bench.go()
    [(_, parcel)] = bench.sent
    assert msgspec.json.decode(parcel.meta, type=StageError).text == "it could not train; its own log says why"
    assert bench.work.tally.prefill_steps == 0 and bench.work.tally.prefill_busy_s == 0


def test_another_board_other_weights_and_other_noise_make_another_release(bench: Bench, tmp_path: Path) -> None:
    numbers = []
    for changed in (lambda: None, lambda: None, lambda: setattr(bench.work, "_device", "pi5"),
                    lambda: setattr(bench.model, "fingerprint", "other weights")):  # fmt: skip
        changed()
        bench.make_private(Ledger(tmp_path, "d"), epsilon=40.0, rounds=9)
        bench.work._answer = bench.work._under_way = None
        bench.give()
        numbers.append(FakeRound.made[-1].guard._stream.normal(4).tolist())
    assert numbers[0] == numbers[1] and len({str(one) for one in numbers}) == 3


def test_the_same_question_again_goes_on_and_is_answered_from_memory(bench: Bench) -> None:
    bench.give()
    bench.work.work(0.0)
    other = InboxAddress(topic=REPLY.replace("requester-1", "requester-2"))
    bench.give(reply=other)
    bench.go()
    bench.give()
    assert len(FakeRound.made) == 1
    assert [topic for topic, _ in bench.sent] == [other.topic, REPLY]
    assert bench.sent[0][1] is bench.sent[1][1]


def test_another_round_takes_the_place_of_what_is_under_way(bench: Bench) -> None:
    bench.give()
    bench.work.work(0.0)
    bench.give(request=6, round=3)
    bench.go()
    assert [made.number for made in FakeRound.made] == [2, 3]
    assert [parcel.request for _, parcel in bench.sent] == [6]


def test_a_lost_connection_loses_nothing(bench: Bench) -> None:
    bench.give()
    bench.sender.down = True
    bench.work.drop_all()
    bench.go()
    assert bench.sent == []
    bench.work.tick(0.0)
    bench.sender.down = False
    bench.work.tick(0.0)
    bench.work.tick(0.0)
    assert len(bench.sent) == 1
    bench.work.drop_all()
    bench.work.tick(0.0)
    assert len(bench.sent) == 2, "it may not have come through"


def test_rounds_of_another_epoch_end(bench: Bench) -> None:
    bench.give()
    bench.work.adopt(msgspec.structs.replace(ORDER, stages=2))
    assert bench.work.live == 1, "a board has come; that changes nothing here"
    bench.work.adopt(msgspec.structs.replace(ORDER, epoch=8))
    assert bench.work.live == 0
    bench.give()
    assert bench.work.live == 0 and bench.work.tally.stale == 1


def test_a_close_ends_its_round_alone(bench: Bench) -> None:
    bench.give()
    bench.give(Kind.CLOSE, request=99, tensor=None)
    assert bench.work.live == 1
    bench.give(Kind.CLOSE, tensor=None)
    assert bench.work.live == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": Kind.HIDDEN},
        {"tensor": None},
        {"tensor": START.astype(np.float16)},
        {"tensor": START.reshape(2, 2)},
        {"tensor": START[:2]},
        {"tensor": np.full(4, np.nan, np.float32)},
        {"reply": InboxAddress(topic="edgelam/v1/other/act/requester-1/0/in")},
        {"reply": InboxAddress(topic=REPLY, broker="mqtt://10.0.0.1:1")},
    ],
)
def test_what_makes_no_sense_is_refused_and_counted(changes: dict[str, Any], bench: Bench) -> None:
    bench.give(**changes)
    assert bench.work.live == 0 and bench.work.tally.refused == 1 and bench.work.last_refusal
    assert bench.returned == 1
    bench.give()
    assert bench.work.live == 1


@pytest.mark.parametrize("error", [Diverged("the loss is nan"), RuntimeError("out of memory")])
def test_what_goes_wrong_is_told(error: Exception, bench: Bench) -> None:
    bench.give()
    FakeRound.made[0].error = error  # type: ignore[assignment]
    bench.go()
    [(_, parcel)] = bench.sent
    assert parcel.kind is Kind.ERROR
    assert msgspec.json.decode(parcel.meta, type=StageError).text == str(error)
    assert bench.work.live == 0


def test_devices_draw_differently() -> None:
    names = ["raspberrypi1", "raspberrypi2", "a", "b", ""]
    assert len({device_seed(1, name) for name in names}) == 5
    assert all(0 <= device_seed(2**62, name) < 2**63 for name in names)
