"""A worker in a secure job: its update is said to be there, and leaves masked alone; what makes no sense is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("torch")

from agent.workers import roundwork
from agent.workers.securework import SecureWork
from agent.workers.stretch import Stretch
from agent.workers.summed import Sums
from models.secure.session import SEALED_BYTES, Member, Party, Roster
from models.training.samples import Row, Split
from tests.agent.training_fakes import Delivery, Sender
from wire.frames import Kind, Parcel, Tensor
from wire.limits import MAX_SUMMED
from wire.messages import (
    ArtifactRef,
    InboxAddress,
    RoundMeta,
    StageError,
    StageOrder,
    TrainingTask,
    UpdateMeta,
)
from wire.sums import SecureMeta, SummedDevice

pytestmark = pytest.mark.torch

SITE = "lab"
REPLY = "edgelam/v1/lab/act/requester-1/0/in"
TASK = TrainingTask(
    data="d", tokenizer=ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0), rank=1, alpha=1.0, matrices=("q",),
    row_tokens=8, batch_rows=1, steps=1, learning_rate=0.1, most_norm=1.0, held_out=0.0, seed=1, secure=True,
)  # fmt: skip
INBOX = InboxAddress(topic="edgelam/v1/lab/act/tune-n/0/in")
ORDER = StageOrder(
    deployment="tune-n", epoch=7, stage=0, stages=1, model="m", engine="torch", graph=TASK.tokenizer, weights=(),
    embedding=True, head=True, first_block=0, end_block=1, hidden=4, vocabulary=8, wire_dtype="f32", context_tokens=8,
    slots=1, prefill_chunk_tokens=2, inbox=INBOX, next=INBOX, runs="rounds", training=TASK,
)  # fmt: skip
SHAPED = {"block.0.q.a": (1, 4), "block.0.q.b": (4, 1)}
NAMES = ("mine", "other", "third")
SAMPLES = {"mine": 2, "other": 5, "third": 1}


class FakeRound:
    """One step, which moves B by a half."""

    loss, held_out_loss, held_out_count, held_out_right = 1.5, None, 0, None

    def __init__(self, *given: Any) -> None:
        self.start = given[6]

    def step(self) -> bool:
        return False

    def vector(self) -> Any:
        return self.start[4:] + np.float32(0.5)


class Bench:
    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(roundwork, "Round", FakeRound)
        self.sent: list[tuple[str, Parcel]] = []
        self.sender = Sender(self.sent)
        numbers = np.random.default_rng(3)
        self.others = {name: Party(name, numbers.bytes) for name in NAMES[1:]}
        rows = Split(tuple(Row(np.array([1, 2]), 1) for _ in range(SAMPLES["mine"])), ())
        model: Any = SimpleNamespace(
            stage=None, shaped=SHAPED, rows=rows, bad_rows=0, fingerprint="f", ledger=None, own=None
        )
        self.work = SecureWork(
            ORDER, model, self.sender, lambda _: None, Stretch(1.0, 1), SITE, "mine", lambda: None, sums=Sums(folder)
        )  # fmt: skip

    def bring(self, kind: Kind, request: int, meta: Any, tensor: Any = None) -> None:
        data = meta if isinstance(meta, bytes) else msgspec.json.encode(meta)
        parcel = Parcel(kind, 7, request, 0, 0, None if tensor is None else Tensor.of(tensor), data)
        self.work.accept(Delivery(parcel), 0.0)  # type: ignore[arg-type]
        while self.work.work(0.0):
            pass

    def round(self, request: int = 5, number: int = 2) -> None:
        meta = RoundMeta(reply=InboxAddress(topic=REPLY), round=number, parts=("b",))
        self.bring(Kind.ROUND, request, meta, np.arange(8, dtype=np.float32))

    def ask(self, step: Any, tensor: Any = None, request: int = 5, session: int = 9, **fields: Any) -> None:
        self.bring(Kind.SECURE, request, SecureMeta(session=session, step=step, **fields), tensor)

    @property
    def last(self) -> Parcel:
        topic, parcel = self.sent[-1]
        assert topic == REPLY
        return parcel

    def keys_of(self) -> Any:
        """[3, 64] of all, after this worker was asked for its own."""
        self.ask("keys")
        mine = self.last.tensor.array()  # type: ignore[union-attr]
        return np.stack([mine, *(np.frombuffer(one.keys, np.uint8) for one in self.others.values())])

    def told(self, **samples: int) -> tuple[SummedDevice, ...]:
        return tuple(SummedDevice(device=name, samples={**SAMPLES, **samples}[name]) for name in NAMES)

    def dealt(self, keys: Any) -> Any:
        """What the others seal for this worker, once it has dealt, too."""
        members = [Member(name, SAMPLES[name], row.tobytes()) for name, row in zip(NAMES, keys, strict=True)]
        roster = Roster("tune-n/7", 2, 9, 4.0, members)
        rows = np.zeros((3, SEALED_BYTES), np.uint8)
        for place, party in enumerate(self.others.values(), 1):
            rows[place] = party.shares(roster)[0]
        return rows

    def to_masked(self) -> Any:
        self.round()
        keys = self.keys_of()
        self.ask("shares", keys, devices=self.told(), farthest=4.0)
        rows = self.dealt(keys)
        self.ask("masked", rows, among=NAMES)
        return rows

    def refusal(self) -> str:
        assert self.last.kind is Kind.ERROR
        return msgspec.json.decode(self.last.meta, type=StageError).text


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_that_there_is_an_update_is_told_without_it(bench: Bench) -> None:
    bench.round()
    assert bench.last.kind is Kind.UPDATE and bench.last.tensor is None
    meta = msgspec.json.decode(bench.last.meta, type=UpdateMeta)
    assert (meta.device, meta.round, meta.samples, meta.loss) == ("mine", 2, 2, 1.5)


def test_a_session_ends_in_shares_that_are_remembered(bench: Bench, tmp_path: Path) -> None:
    bench.to_masked()
    assert bench.last.kind is Kind.SECURE and bench.last.tensor is not None
    assert bench.last.tensor.array().dtype == np.int32 and bench.last.tensor.shape == (4,)
    assert not (tmp_path / "sums").exists()
    bench.ask("reveal", among=NAMES)
    assert bench.last.kind is Kind.SECURE and bench.last.tensor is not None and bench.last.tensor.shape == (3, 33)
    assert (tmp_path / "sums").is_file()
    bench.ask("reveal", among=NAMES[:2])
    assert "2 members are too few of 3" in bench.refusal()


def test_the_same_question_is_answered_from_memory(bench: Bench) -> None:
    rows = bench.to_masked()
    first = bench.last.tensor.array().tolist()  # type: ignore[union-attr]
    bench.ask("masked", rows, among=NAMES)
    assert bench.last.tensor.array().tolist() == first  # type: ignore[union-attr]


def test_another_session_has_other_keys_and_the_old_one_is_gone(bench: Bench) -> None:
    bench.round()
    first = bench.keys_of()[0]
    bench.ask("keys")
    assert np.array_equal(bench.last.tensor.array(), first)  # type: ignore[union-attr]
    bench.ask("keys", session=10)
    assert not np.array_equal(bench.last.tensor.array(), first)  # type: ignore[union-attr]
    sent = len(bench.sent)
    bench.ask("shares", np.zeros((3, 64), np.uint8), devices=bench.told(), farthest=4.0)
    assert len(bench.sent) == sent and bench.work.tally.stale == 1


def test_a_round_that_is_asked_again_ends_the_session_and_trains_nothing(bench: Bench) -> None:
    bench.to_masked()
    bench.round()
    assert bench.last.kind is Kind.UPDATE and bench.work.tally.requests == 1
    sent = len(bench.sent)
    bench.ask("reveal", among=NAMES)
    assert len(bench.sent) == sent and bench.work.tally.stale == 1


def test_what_was_trained_is_forgotten_with_its_round(bench: Bench) -> None:
    bench.round()
    bench.bring(Kind.CLOSE, 5, b"")
    sent = len(bench.sent)
    bench.ask("keys")
    bench.round(request=6, number=3)
    bench.ask("keys", request=5)
    assert len(bench.sent) == sent + 1 and bench.work.tally.stale == 2
    bench.work.adopt(msgspec.structs.replace(ORDER, epoch=8))
    assert bench.work._trained is None


def test_a_lost_connection_loses_no_answer(bench: Bench) -> None:
    bench.round()
    bench.sender.down = True
    bench.ask("keys")
    bench.work.drop_all()
    bench.sender.down = False
    bench.work.tick(0.0)
    assert bench.last.kind is Kind.SECURE
    bench.work.drop_all()
    bench.work.tick(0.0)
    assert [parcel.kind for _, parcel in bench.sent] == [Kind.UPDATE, Kind.SECURE, Kind.SECURE]


def test_who_is_told_of_other_samples_than_it_has_takes_no_part(bench: Bench) -> None:
    bench.round()
    keys = bench.keys_of()
    bench.ask("shares", keys, devices=bench.told(mine=2000), farthest=4.0)
    assert "has 2 samples" in bench.refusal()


@pytest.mark.parametrize(
    "wrong",
    [
        {"tensor": None},
        {"tensor": np.zeros((2, 64), np.uint8)},
        {"tensor": np.zeros((3, 63), np.uint8)},
        {"tensor": np.zeros(3, np.uint8)},
        {"tensor": np.zeros((3, 64), np.uint8)},
        {"farthest": 0.0},
        {"devices": ()},
        {"devices": tuple(SummedDevice(device=name, samples=2) for name in ("mine", "mine", "other"))},
        {"step": "masked", "among": NAMES},
        {"step": "reveal", "among": NAMES},
    ],
)
def test_what_makes_no_sense_is_refused_and_told(wrong: dict[str, Any], bench: Bench) -> None:
    bench.round()
    fields = {"step": "shares", "tensor": bench.keys_of(), "devices": bench.told(), "farthest": 4.0, **wrong}
    bench.ask(**fields)
    assert bench.refusal() and bench.work.tally.refused == 1
    bench.ask("shares", bench.keys_of(), devices=bench.told(), farthest=4.0)
    assert bench.last.kind is Kind.SECURE, "and what makes sense is taken afterwards"


@pytest.mark.parametrize(
    ("meta", "tensor"),
    [
        (b"{", None),
        (b'{"session": 0, "step": "keys"}', None),
        (b'{"session": 9, "step": "open"}', None),
        (SecureMeta(session=9, step="keys"), np.zeros(3, np.float32)),
        (SecureMeta(session=9, step="keys"), np.zeros(MAX_SUMMED * SEALED_BYTES + 1, np.uint8)),
    ],
)
def test_what_is_no_question_is_counted(meta: Any, tensor: Any, bench: Bench) -> None:
    bench.round()
    bench.bring(Kind.SECURE, 5, meta, tensor)
    assert len(bench.sent) == 1 and bench.work.tally.refused == 1


@pytest.mark.parametrize("place", range(3))
def test_shares_that_were_changed_on_the_way_are_refused(place: int, bench: Bench) -> None:
    bench.round()
    keys = bench.keys_of()
    bench.ask("shares", keys, devices=bench.told(), farthest=4.0)
    rows = bench.dealt(keys)
    rows[place, 7] ^= 1
    bench.ask("masked", rows, among=NAMES)
    assert place == 0 or "not sealed for this session" in bench.refusal()


def test_all_that_is_said_of_a_session_is_one_round_s(bench: Bench) -> None:
    """Questions in all orders: none is answered with a masked update twice."""
    for order in itertools.permutations(("keys", "shares", "masked", "reveal"), 4):
        for step in order:
            bench.ask(step)
    assert bench.sent == [] and bench.work.tally.stale == 96, "nothing was trained yet"
