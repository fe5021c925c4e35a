"""Any bytes on any topic: counted, told, dropped; the next real message still works."""

from __future__ import annotations

import random
import resource
import time
from pathlib import Path

import msgspec
import numpy as np

from agent.config import HostPort, Via
from agent.lifecycle import State
from agent.workers.inference import Worker
from agent.workers.pipe import Assignment, BrokerLogin, Status
from models.engine.choice import Chosen
from tests.agent.fakes import DEVICE, SITE, FakeEngine, FakeLauncher, Lab, desired_of, order_of
from tests.agent.test_ring import REPLY, inquiry, prompt
from wire import topics
from wire.channel import Inbox, Outbox
from wire.flow import Credit, encode_credit
from wire.frames import Kind, Parcel, Tensor, encode
from wire.memory import MemoryBroker, MemoryTransport
from wire.messages import (
    Applied,
    ArtifactRef,
    Command,
    DeviceInfo,
    DeviceState,
    Kit,
    KitModule,
    Telemetry,
)
from wire.rows import RowOf, rows_meta

MESSAGES = 10_000
MAX_GROWTH_BYTES = 64 << 20


def mutated(data: bytes, chance: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    work = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(work) + 1)
        kind = chance.randrange(4)
        if kind == 0 and at < len(work):
            work[at] = chance.randrange(256)
        elif kind == 1:
            del work[at : at + chance.randint(1, 40)]
        elif kind == 2:
            work[at:at] = work[max(0, at - 30) : at]
        else:
            work[at:at] = chance.randbytes(chance.randint(1, 20))
    return bytes(work)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_supervisor_survives_ten_thousand_messages_of_garbage(tmp_path: Path) -> None:
    lab, launcher, chance = Lab(tmp_path), FakeLauncher(), random.Random(1)
    # Whatever host a mangled order names, nothing but this machine is dialled.
    service = lab.agent(launcher, via=Via(http=HostPort("127.0.0.1", 1)))
    lab.turn(lambda: service.state is State.SERVING)
    kit = Kit(
        artifacts_url="http://127.0.0.1:1",
        modules=(
            KitModule(
                key="k", kind="block", graphs=((1, ArtifactRef(digest="sha256:" + "0" * 64, size_bytes=5)),),
                hidden=8, vocabulary=32, wire_dtype="f32",
            ),
        ),
    )  # fmt: skip
    reply = topics.REPLY.on(SITE, "coordinator", "measure")
    state = DeviceState(state="online", boot="abc", since_unix=9e9)
    telemetry = Telemetry(seq=1, boot="def", mono_s=1.0, cpu_fraction=0.0, memory_used_bytes=1, memory_bytes=1)
    templates: list[tuple[str, msgspec.Struct]] = [
        (topics.DESIRED.on(SITE, DEVICE), desired_of(order_of())),
        (topics.KIT.on(SITE), kit),
        (topics.COMMAND.on(SITE, DEVICE, "measure"), Command(id="1", reply_topic=reply)),
        (topics.COMMAND.on(SITE, DEVICE, "\u00fc b"), Command(id="1", reply_topic=reply)),
        (topics.STATE.on(SITE, DEVICE), state),
        (topics.TELEMETRY.on(SITE, DEVICE), telemetry),
        (topics.INFO.on(SITE, DEVICE), service._info),
    ]
    shapes = (
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"v":2}',
        b'{"v":1e999}',
        b'"' + b"x" * 300_000,
    )
    before_bytes = peak_bytes()
    for number in range(MESSAGES):
        topic, message = templates[number % len(templates)]
        data = chance.choice(shapes) if number % 5 == 0 else mutated(msgspec.json.encode(message), chance)
        lab.coordinator.publish(topic, data)
        if number % 50 == 0:
            service.step(0.0)
    service.step(0.0)
    assert service.state in (State.SERVING, State.MEASURING)
    assert service._control.session is not None and service._control.session.refused > MESSAGES // 10
    assert peak_bytes() - before_bytes < MAX_GROWTH_BYTES
    assert isinstance(lab.retained(topics.INFO, DeviceInfo), DeviceInfo)

    epoch = service._records.epoch + 1
    lab.store(service, b"graph", b"weights")
    lab.publish(topics.DESIRED, desired_of(order_of(epoch=epoch), epoch=epoch), DEVICE)

    def ready() -> bool:
        applied = lab.retained(topics.APPLIED, Applied)
        return isinstance(applied, Applied) and [(r.epoch, r.phase) for r in applied.stages] == [(epoch, "ready")]

    lab.turn(ready)
    lab.close()


class Silent:
    """A supervisor that says nothing and keeps what it hears."""

    def __init__(self) -> None:
        self.gone = False
        self.heard: list[Status] = []

    def say(self, message: Status) -> None:
        self.heard.append(message)

    def told(self, kind: type) -> list[object]:
        return []


def test_a_worker_survives_ten_thousand_frames_of_garbage_and_serves_the_next_request() -> None:
    broker, chance, order = MemoryBroker(), random.Random(2), order_of()
    transport, client = MemoryTransport(broker, "worker"), MemoryTransport(broker, "client")
    login = BrokerLogin(url="mqtt://memory:1", client_id="worker")
    assignment = Assignment(
        device=DEVICE, site=SITE, order=order, graph_path="", weight_paths=(), login=login, threads=1, speed=1.0
    )
    parent = Silent()
    worker = Worker(assignment, Chosen(FakeEngine(order), "onnxruntime", ""), transport, parent)  # type: ignore[arg-type]
    client.start()
    client.poll(0)
    inbox, outbox = Inbox(client, REPLY.topic), Outbox(client, order.inbox.topic)
    hidden = Parcel(Kind.HIDDEN, 1, 7, 3, 1, Tensor.of(np.ones((3, 8), np.float32)))
    owners = rows_meta([RowOf(7, 3), RowOf(8, 3)])
    rows = Parcel(Kind.ROWS, 1, 0, 0, 0, Tensor.of(np.array([1, 2], np.int32)), owners)
    frames = [
        b"".join(bytes(part) for part in frame)
        for parcel in (prompt([1, 2, 3]), hidden, rows, inquiry(), Parcel(Kind.CLOSE, 1, 7), Parcel(Kind.PROBE, 1, 7))
        for frame in encode(parcel, 77, 0, 0)
    ]
    targets = (order.inbox.topic, topics.credit_of(order.inbox.topic), topics.credit_of(REPLY.topic))
    before_bytes = peak_bytes()

    def feed() -> None:
        for number in range(MESSAGES):
            kind = number % 4
            data = chance.randbytes(chance.randint(0, 300)) if kind == 0 else mutated(chance.choice(frames), chance)
            if kind == 3:
                data = mutated(encode_credit(Credit(chance.getrandbits(63), chance.getrandbits(40))), chance)
            client.publish(chance.choice(targets), data, retain=kind == 2)
            if number % 100 == 99:
                yield

    steps = feed()
    tokens: list[int] = []
    asked = False

    def poll(timeout_s: float) -> int:
        """The worker's own loop runs; between its polls the client acts."""
        nonlocal asked
        if next(steps, "end") == "end" and not asked:
            outbox.send(prompt([1, 2, 3], request=99))
            asked = True
        handled = MemoryTransport.poll(transport, 0.0)
        client.poll(0)
        while (delivery := inbox.take()) is not None:
            if delivery.parcel.request == 99 and delivery.parcel.tensor is not None:
                tokens.append(int(delivery.parcel.tensor.array()[0]))
            inbox.done(delivery)
        parent.gone = len(tokens) == 5 or time.monotonic() > deadline_s
        return handled

    deadline_s = time.monotonic() + 20
    transport.poll = poll  # type: ignore[method-assign]
    worker.run()
    assert tokens == [4, 5, 6, 7, 8]
    assert worker._inboxes.refused > MESSAGES // 10
    assert peak_bytes() - before_bytes < MAX_GROWTH_BYTES
    assert all(isinstance(status, Status) for status in parent.heard) and parent.heard
