"""Stand-ins for what an agent reaches the world by: workers that are told to behave, engines that add numbers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from agent.config import AgentConfig
from agent.launcher import Ended, Line
from agent.notify import Notifier
from agent.outside import Outside
from agent.service import Service
from agent.workers.pipe import Assignment, MeasureTask, Status, Tell
from models.engine.base import ContextFull, EngineFailed, NoSlot
from wire import topics
from wire.errors import Unreachable
from wire.memory import MemoryBroker, MemoryTransport
from wire.messages import ArtifactRef, Desired, InboxAddress, StageOrder, decode, encode
from wire.transport import Link

SITE = "lab"
DEVICE = "pi5"


def digest_of(data: bytes) -> str:
    import hashlib

    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def ref_of(data: bytes, name: str = "") -> ArtifactRef:
    return ArtifactRef(digest=digest_of(data), size_bytes=len(data), name=name)


def inbox(stage: int, deployment: str = "chat", site: str = SITE) -> InboxAddress:
    return InboxAddress(topic=topics.INBOX.on(site, deployment, str(stage)))


def order_of(stage: int = 0, stages: int = 1, epoch: int = 1, **changes: object) -> StageOrder:
    """A stage of a made-up model: hidden 8, vocabulary 32, one block per stage."""
    fields: dict[str, object] = {
        "deployment": "chat",
        "epoch": epoch,
        "stage": stage,
        "stages": stages,
        "model": "made-up",
        "engine": "onnxruntime",
        "graph": ref_of(b"graph"),
        "weights": (ref_of(b"weights"),),
        "embedding": stage == 0,
        "head": stage == stages - 1,
        "first_block": stage,
        "end_block": stage + 1,
        "hidden": 8,
        "vocabulary": 32,
        "wire_dtype": "f32",
        "context_tokens": 64,
        "slots": 2,
        "prefill_chunk_tokens": 4,
        "inbox": inbox(stage),
        "next": inbox((stage + 1) % stages),
    }
    return StageOrder(**{**fields, **changes})  # type: ignore[arg-type]


def desired_of(*orders: StageOrder, epoch: int = 1, device: str = DEVICE, url: str = "http://127.0.0.1:1") -> Desired:
    return Desired(device=device, epoch=epoch, artifacts_url=url, stages=orders)


class FakeEngine:
    """A row begins as its token id, each stage adds one; the head gives the last row's value, modulo the vocabulary.

    Remembers how rows came, so that chunks and rewinds can be checked.
    """

    name = "fake 1.0"
    held_bytes = 1000
    idle_bytes = 0

    def __init__(self, order: StageOrder, *, fail_at: int = -1) -> None:
        self.order = order
        self.rows: dict[int, int] = {}
        self.steps: list[tuple[int, int, int]] = []
        self.fail_at = fail_at
        self.fail_batch = False
        self.adapters: set[str] = set()
        self.opened: list[str] = []
        self.batches: list[tuple[int, ...]] = []
        self.closed = 0

    def open(self, adapter: str = "") -> int:
        if adapter and adapter not in self.adapters:
            raise EngineFailed(f"adapter {adapter} is not in this stage: run again")
        self.opened.append(adapter)
        for slot in range(self.order.slots):
            if slot not in self.rows:
                self.rows[slot] = 0
                return slot
        raise NoSlot("full")

    def close(self, slot: int) -> None:
        del self.rows[slot]
        self.closed += 1

    def row(self, slot: int) -> None:
        return None

    def step_many(
        self, slots: list[int], given: np.ndarray, positions: list[int]
    ) -> tuple[np.ndarray, dict[int, Exception]]:
        """Steps of a row each; one that fails fails alone."""
        self.batches.append(tuple(slots))
        if self.fail_batch:
            raise EngineFailed("the whole step made to fail")
        results: list[np.ndarray | None] = []
        failed: dict[int, Exception] = {}
        for index, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            try:
                results.append(self.step(slot, given[index : index + 1], position).reshape(-1).copy())
            except (ContextFull, EngineFailed) as error:
                failed[index] = error
                results.append(None)
        made = next((result for result in results if result is not None), np.zeros(self.order.hidden, np.float32))
        return np.stack([made if result is None else result for result in results]), failed

    def step(self, slot: int, given: np.ndarray, position: int, logits_rows: int = 1) -> np.ndarray:
        if position > self.rows[slot]:
            raise EngineFailed(f"rows from {position}, {self.rows[slot]} were run")
        if position + len(given) > self.order.context_tokens:
            raise ContextFull("full")
        if len(self.steps) == self.fail_at:
            self.fail_at = -1
            raise EngineFailed("made to fail")
        self.steps.append((slot, position, len(given)))
        self.rows[slot] = position + len(given)
        hidden = given if given.ndim == 2 else np.repeat(given[:, None], self.order.hidden, 1).astype(np.float32)
        hidden = hidden + np.float32(1)
        if not self.order.head:
            return hidden
        if not 1 <= logits_rows <= len(given):
            raise EngineFailed(f"logits of {logits_rows} rows in a step of {len(given)}")
        logits = np.zeros((logits_rows, self.order.vocabulary), np.float32)
        for row, values in zip(logits, hidden[-logits_rows:, 0], strict=True):
            row[int(values) % self.order.vocabulary] = 1
        return logits[0] if logits_rows == 1 else logits


class FakeLauncher:
    """Workers that exist on paper. `script(worker)` may answer at once; tests `say` and `kill` later."""

    def __init__(self, wake: Callable[[], None] = lambda: None, ready: bool = True) -> None:
        self.ready = ready
        self.assignments: dict[int, Assignment | MeasureTask] = {}
        self.told: dict[int, list[Tell]] = {}
        self.alive: set[int] = set()
        self.events: list[Line | Ended] = []
        self.modules: dict[int, str] = {}
        self.processor: dict[int, float] = {}
        """Seconds that each worker has used."""
        self._numbers = itertools.count(1)
        self.on_measure: Callable[[int, MeasureTask], None] = lambda worker, task: None

    def __call__(self, wake: Callable[[], None]) -> FakeLauncher:
        return self

    @property
    def pids(self) -> tuple[int, ...]:
        return ()

    def launch(self, module: str, first: bytes, threads: int) -> int:
        worker = next(self._numbers)
        self.modules[worker] = module
        self.alive.add(worker)
        self.told[worker] = []
        if module.endswith("measuring"):
            task = msgspec.json.decode(first, type=MeasureTask)
            self.assignments[worker] = task
            self.on_measure(worker, task)
        else:
            assignment = msgspec.json.decode(first, type=Assignment)
            self.assignments[worker] = assignment
            if self.ready:
                self.say(worker, Status(phase="ready", epoch=assignment.order.epoch, engine="fake"))
        return worker

    def tell(self, worker: int, line: bytes) -> None:
        told = msgspec.json.decode(line, type=Tell)
        self.told[worker].append(told)
        if told.adopt is not None and self.ready:
            self.say(worker, Status(phase="ready", epoch=told.adopt.epoch, engine="fake"))

    def end(self, worker: int) -> None:
        if worker in self.alive:
            self.alive.discard(worker)
            self.events.append(Ended(worker, True, "ended with exit code 0"))

    def tick(self, now_s: float) -> None:
        pass

    def processor_s(self, worker: int) -> float:
        return self.processor.get(worker, 0.0)

    def drain(self) -> list[Line | Ended]:
        found, self.events = self.events, []
        return found

    def say(self, worker: int, message: msgspec.Struct) -> None:
        self.events.append(Line(worker, msgspec.json.encode(message) + b"\n"))

    def kill(self, worker: int, words: str = "killed by SIGKILL") -> None:
        self.alive.discard(worker)
        self.events.append(Ended(worker, False, words))

    @property
    def stage_workers(self) -> list[int]:
        return sorted(worker for worker in self.alive if self.modules[worker].endswith("inference"))


def nobody(site: str | None, timeout_s: float, interfaces: object) -> object:
    time.sleep(0.05)
    raise Unreachable("no coordinator answered")


class Lab:
    """A site on a MemoryBroker: a coordinator's transport, and agents that are stepped by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.broker = MemoryBroker()
        self.coordinator = MemoryTransport(self.broker, "coordinator")
        self.seen: dict[str, list[bytes]] = {}
        self.coordinator.subscribe(topics.everything(SITE), self._note)
        self.coordinator.start()
        self.coordinator.poll(0)
        self.services: list[Service] = []
        self.transports: list[MemoryTransport] = []
        self.brokers: dict[str, MemoryBroker] = {}
        """Brokers at other addresses than the usual one."""
        self.dialled: list[str] = []

    def _note(self, inbound: object) -> None:
        self.seen.setdefault(inbound.topic, []).append(bytes(inbound.payload))  # type: ignore[attr-defined]

    def agent(
        self,
        launcher: FakeLauncher | None = None,
        *,
        host: str = "a",
        find: Callable[..., object] = nobody,
        data_broker_maker: Callable[..., object] | None = None,
        **changes: object,
    ) -> Service:
        fields: dict[str, object] = {
            "site": SITE,
            "name": DEVICE,
            "broker": "mqtt://memory:1",
            "state_dir": self.folder / host / "state",
            "cache_dir": self.folder / host / "cache",
        }
        config = AgentConfig(**{**fields, **changes})  # type: ignore[arg-type]

        def connect(url: str, client_id: str, will: object) -> MemoryTransport:
            self.dialled.append(url)
            broker = self.brokers.get(url, self.broker)
            transport = MemoryTransport(broker, client_id, will=will)  # type: ignore[arg-type]
            self.transports.append(transport)
            return transport

        outside = Outside(
            connect=connect,
            launcher=launcher or FakeLauncher(),
            find=find,  # type: ignore[arg-type]
            data_broker=data_broker_maker,  # type: ignore[arg-type]
            notifier=Notifier({}),
        )
        service = Service(config, outside)
        service.start()
        self.services.append(service)
        return service

    def publish(self, topic: topics.Topic, message: msgspec.Struct, *fields: str) -> None:
        self.coordinator.publish(topic.on(SITE, *fields), encode(message), qos=topic.qos, retain=topic.retained)

    def store(self, service: Service, *files: bytes) -> None:
        """Put files into an agent's cache, as if fetched in an earlier boot."""
        folder = service.config.cache_dir / "artifacts"
        for data in files:
            path = folder / digest_of(data).removeprefix("sha256:")
            part = path.with_suffix(".stored")
            part.write_bytes(data)
            part.replace(path)  # in one step: the agent may be looking

    def turn(self, until: Callable[[], bool], timeout_s: float = 8.0) -> None:
        """Step everybody until `until`; fail after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < deadline_s, "did not come to pass"
            for service in self.services:
                if service.state.value != "stopped":
                    service.step(0.005)
            self.coordinator.poll(0)

    def retained(self, topic: topics.Topic, kind: type, device: str = DEVICE) -> object | None:
        payload = self.broker.retained.get(topic.on(SITE, device))
        return None if payload is None else decode(payload, kind, "test")

    def up(self) -> bool:
        return self.coordinator.link is Link.UP

    def close(self) -> None:
        for service in self.services:
            service.close()
