"""A round of a secure job in one process: the coordinator, workers, and whatever is lost between them."""

from __future__ import annotations

import itertools
import random
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import numpy as np
import pytest

from agent.workers import roundwork
from agent.workers.ledger import Ledger
from agent.workers.own import OwnFactors
from agent.workers.securework import SecureWork
from agent.workers.stretch import Stretch
from agent.workers.summed import Sums
from coordinator.journal import Journal
from coordinator.rounds.adapters import parts_of, spec_of
from coordinator.rounds.job import Adapter, Job, Rounds
from coordinator.rounds.orders import task_of
from coordinator.rounds.secure import SecureExchange
from coordinator.rounds.store import JobRecord, JobStore
from models.lora.adapter import flat, initial, length_of, named, shapes
from models.training.samples import Row, Split
from tests.agent.training_fakes import Delivery, Sender
from tests.models.tiny import tiny_config
from wire import topics
from wire.frames import Kind, Parcel
from wire.messages import ArtifactRef, InboxAddress, StageOrder

SITE: Final = "lab"
REPLY: Final = InboxAddress(topic="edgelam/v1/lab/act/requester-1/0/in")
NOTHING: Final = ArtifactRef(digest=f"sha256:{0:064x}", size_bytes=0)
CONFIG: Final = tiny_config("llama")
NAMES: Final = ("a", "b", "c", "d")
STEP: Final = 0.01
"""How far an element goes at most; less than coordinator.rounds.updates.farthest_of."""


class FakeRound:
    """One step, which moves each factor by a number that comes from the seed and the round."""

    loss, held_out_loss, held_out_count, held_out_right = 1.5, None, 0, None

    def __init__(
        self, _stage: Any, shaped: Any, _rows: Any, _task: Any, seed: int, asked: Any, start: Any, guard: Any = None
    ) -> None:
        self.factors = {
            **named(start, shaped),
            **{name: np.full(shaped[name], asked.round + 1.0) for name in shaped if name[-1] == "b"},
        }
        self._begins = flat(named(start, shaped), shaped, asked.parts)
        self._drawn = np.random.default_rng([seed, asked.round])
        self._guard, self._shaped, self._parts = guard, shaped, asked.parts

    def step(self) -> bool:
        return False

    def vector(self) -> Any:
        ends = (self._begins + self._drawn.uniform(-STEP, STEP, len(self._begins))).astype(np.float32)
        return ends if self._guard is None else self._guard.changed(self._begins, ends, self._shaped, self._parts)


def job_of(**changes: Any) -> Job:
    rounds = {"count": 4, "steps": 2, "learning_rate": 0.01, "at_least": 3, "timeout_s": 100.0}
    rounds |= changes.pop("rounds", {})
    fields = {"name": "n", "model": "tiny", "data": "d", "adapter": Adapter(rank=1, matrices=("q",)), "secure": True}
    return Job(**{**fields, **changes}, rounds=Rounds(**rounds))


class Table:
    """Around it sit workers by the names of their boards. What is sent lies in `post` until `turn` brings it."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, job: Job | None = None, names: tuple[str, ...] = NAMES
    ) -> None:
        monkeypatch.setattr(roundwork, "Round", FakeRound)
        self.job = job or job_of()
        self.names = names
        self.folder = folder
        self.samples = {name: 3 + 4 * number for number, name in enumerate(names)}
        self.shaped = shapes(CONFIG, spec_of(self.job))
        self.start = flat(initial(CONFIG, spec_of(self.job)), self.shaped)
        journal = Journal(folder / "journal.sqlite")
        journal.open()
        self.store = JobStore(folder / "jobs", journal)
        orders = {name: (self._order(stage),) for stage, name in enumerate(names)}
        self.record = JobRecord(job=self.job, state="running", epoch=7, orders=orders, chosen=names)
        self.starts = dict.fromkeys(names, 0)
        self.post: deque[tuple[str, Parcel]] = deque()
        """To whom; '' is the coordinator."""
        self.said: list[Parcel] = []
        """All that boards sent."""
        self.told: list[dict[str, Any]] = []
        self.workers = {name: self._worker(name) for name in names}
        self.away: set[str] = set()
        self.exchange = self._exchange()
        self.now_s = self.exchange._sum._deadline_s - 100.0
        self.verdict = "waits"

    def _order(self, stage: int) -> StageOrder:
        inbox = InboxAddress(topic=topics.INBOX.on(SITE, "tune-n", str(stage)))
        return StageOrder(
            deployment="tune-n", epoch=7, stage=stage, stages=8, model="m", engine="torch", graph=NOTHING, weights=(),
            embedding=True, head=True, first_block=0, end_block=1, hidden=4, vocabulary=8, wire_dtype="f32",
            context_tokens=8, slots=1, prefill_chunk_tokens=2, inbox=inbox, next=inbox, runs="rounds",
            training=task_of(self.job, NOTHING, None),
        )  # fmt: skip

    def _worker(self, name: str) -> SecureWork:
        rows = Split(tuple(Row(np.array([1, 2]), 1) for _ in range(self.samples[name])), ())
        folder = self.folder / name
        model = SimpleNamespace(
            stage=None,
            shaped=self.shaped,
            rows=rows,
            bad_rows=0,
            fingerprint="f",
            ledger=Ledger(folder, "d"),
            own=OwnFactors(folder, 7, self.shaped, lambda _: {}) if self.job.begins == "own-b" else None,
        )
        sent = _Sent(self)
        [order] = self.record.orders[name]
        return SecureWork(
            order, model, Sender(sent), lambda _: None, Stretch(1.0, 1), SITE, name, lambda: None, sums=Sums(folder)
        )  # fmt: skip

    def _exchange(self) -> SecureExchange:
        def send(inbox: InboxAddress, parcel: Parcel, _failed: Any) -> None:
            name = next(name for name, [order] in self.record.orders.items() if order.inbox == inbox)
            self.post.append((name, parcel))

        hub = SimpleNamespace(reply_inbox=REPLY, send=send)
        coordinator: Any = SimpleNamespace(hub=hub, changes=SimpleNamespace(ring=lambda: None))
        return SecureExchange(
            coordinator, self.store, self.record, CONFIG, self.start, self.told.append, train=True
        )  # fmt: skip

    def restart_worker(self, name: str) -> None:
        """What was on its way to it is lost, and what it had in memory."""
        self.starts[name] += 1
        self.workers[name] = self._worker(name)
        self.post = deque((to, parcel) for to, parcel in self.post if to != name)

    def restart_coordinator(self) -> None:
        """What was on its way to it is lost; the journal is as it was."""
        self.post = deque((to, parcel) for to, parcel in self.post if to)
        self.exchange = self._exchange()
        self.now_s = self.exchange._sum._deadline_s - 100.0

    def turn(self) -> bool:
        """Look, and bring one parcel; False when the round is over or has failed."""
        ready = {name: f"w{self.starts[name]}" for name in self.names if name not in self.away}
        look = self.exchange.state.look(self.now_s, ready)
        self.verdict = look.verdict
        for device in look.ask:
            self.exchange.ask(device)
        if self.verdict == "waits" and self.post:
            self.bring(*self.post.popleft())
        return self.verdict == "waits"

    def bring(self, name: str, parcel: Parcel) -> None:
        if not name:
            assert self.exchange.heard(parcel)
        elif name not in self.away:
            worker = self.workers[name]
            worker.accept(Delivery(parcel), 0.0)  # type: ignore[arg-type]
            while worker.work(0.0):
                pass

    def go(self, most: int = 400) -> Any:
        """To the end; gives the factors."""
        for number in itertools.count():
            assert number < most, (self.exchange._sum.step, self.exchange.state.missing)
            if not self.turn():
                break
        assert self.verdict == "over", self.exchange.state.refused
        return self.exchange.aggregated()

    def plain(self, names: tuple[str, ...]) -> Any:
        """What the mean of the boards' updates comes to, in float64."""
        parts = parts_of(self.job, 0)
        begins = flat(named(self.start, self.shaped), self.shaped, parts)
        changes = []
        for name in names:
            drawn = np.random.default_rng([roundwork.device_seed(self.job.seed, name), 0])
            ends = (begins + drawn.uniform(-STEP, STEP, length_of(self.shaped, parts))).astype(np.float32)
            changes.append(ends - begins)
        mean = np.average(changes, axis=0, weights=[self.samples[name] for name in names])
        after = named((begins + mean).astype(np.float32), self.shaped, parts)
        return flat({**named(self.start, self.shaped), **after}, self.shaped)

    def kinds(self) -> set[tuple[Kind, bool]]:
        """What boards sent, and whether factors were in it."""
        return {(parcel.kind, parcel.tensor is not None) for parcel in self.said}


class _Sent(list[tuple[str, Parcel]]):
    """What a worker sends goes to the coordinator."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self._table = table

    def append(self, one: tuple[str, Parcel]) -> None:
        topic, parcel = one
        assert topic == REPLY.topic
        self._table.said.append(parcel)
        self._table.post.append(("", parcel))


def shuffled(table: Table, seed: int) -> None:
    """What lies in the post comes in another order."""
    waiting = list(table.post)
    random.Random(seed).shuffle(waiting)
    table.post = deque(waiting)


def decoded(parcel: Parcel, kind: Any) -> Any:
    return msgspec.json.decode(parcel.meta, type=kind)
