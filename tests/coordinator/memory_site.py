"""A coordinator on a broker in memory, and boards that say what a test wants them to say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from coordinator.hub import Hub
from coordinator.service import Coordinator
from wire import topics
from wire.memory import MemoryBroker, MemoryTransport
from wire.messages import Applied, Desired, DeviceInfo, DeviceState, StageReport, Telemetry, encode
from wire.transport import Inbound

SITE = "lab"
BOOT = "c0ffee"
PATIENCE_S = 10.0


async def until(condition: Callable[[], bool], what: str = "") -> None:
    """Wait for a condition while the loop runs; fail after PATIENCE_S."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"never came true: {what or condition}"
        await asyncio.sleep(0.005)


class Client:
    """A client of the broker that is polled by hand; `got` holds what came."""

    def __init__(self, broker: MemoryBroker, name: str) -> None:
        self.transport = MemoryTransport(broker, name)
        self.got: list[Inbound] = []
        self.transport.start()
        self.transport.poll(0)

    def listen(self, *filters: str) -> None:
        for topic_filter in filters:
            self.transport.subscribe(topic_filter, self.got.append)

    def poll(self) -> list[Inbound]:
        self.transport.poll(0)
        return self.got

    def say(self, topic: topics.Topic, payload: Struct | bytes, *fields: str) -> None:
        data = payload if isinstance(payload, bytes) else encode(payload)
        self.transport.publish(topic.on(SITE, *fields), data, qos=topic.qos, retain=topic.retained)


class Board(Client):
    """A board as the coordinator sees it."""

    def __init__(self, broker: MemoryBroker, name: str, boot: str = "b00700") -> None:
        super().__init__(broker, f"board-{name}")
        self.name = name
        self.boot = boot
        self.seq = 0
        self.listen(topics.DESIRED.on(SITE, name))

    def join(self) -> None:
        """Everything that makes it online."""
        self.say(topics.STATE, DeviceState(state="online", boot=self.boot, since_unix=0.0), self.name)
        info = DeviceInfo(
            device=self.name, boot=self.boot, software="0.1.0", board="made up", arch="x86_64", os="Linux",
            python="3.11", cores=4.0, cores_because="no limit", memory_bytes=2**32, memory_because="total",
            engines=(),
        )  # fmt: skip
        self.say(topics.INFO, info, self.name)
        self.beat()

    def beat(self) -> None:
        self.seq += 1
        told = Telemetry(
            seq=self.seq, boot=self.boot, mono_s=self.seq, cpu_fraction=0.1, memory_used_bytes=1, memory_bytes=2
        )
        self.say(topics.TELEMETRY, told, self.name)

    def apply(self, epoch: int, *reports: StageReport) -> None:
        self.say(topics.APPLIED, Applied(device=self.name, boot=self.boot, epoch=epoch, stages=reports), self.name)

    def refuse(self, epoch: int, because: str) -> None:
        """Say that an order was not taken, and that nothing runs."""
        told = Applied(device=self.name, boot=self.boot, epoch=0, refused_epoch=epoch, refused_because=because)
        self.say(topics.APPLIED, told, self.name)

    def leave(self) -> None:
        self.say(topics.STATE, DeviceState(state="offline", boot=self.boot, since_unix=0.0, reason="bye"), self.name)

    @property
    def orders(self) -> list[Desired]:
        """What it was told to run, the latest last."""
        return [msgspec.json.decode(message.payload, type=Desired) for message in self.poll()]


class Lab:
    """The broker and a coordinator on it."""

    def __init__(self, broker: MemoryBroker, coordinator: Coordinator) -> None:
        self.broker = broker
        self.coordinator = coordinator
        self.boards: dict[str, Board] = {}

    async def with_boards(self, *names: str) -> None:
        """Boards that are online."""
        for name in names:
            self.boards[name] = Board(self.broker, name)
            self.boards[name].join()
        await until(lambda: set(names) <= set(self.coordinator.online()), "boards online")

    def notices(self, code: str) -> list[str]:
        return [event.text for event in self.coordinator.notices if event.code == code]


def make_coordinator(hub: Hub, state: Path) -> Coordinator:
    return Coordinator(
        site=SITE,
        boot=hub.reply_inbox.topic.split("requester-")[1].split("/")[0],
        state=state,
        artifacts_url="http://127.0.0.1:1",
        mqtt_url="mqtt://memory:1",
        broker_text="memory",
        hub=hub,
    )


@asynccontextmanager
async def running(state: Path, broker: MemoryBroker | None = None, boot: str = BOOT) -> AsyncIterator[Lab]:
    """A coordinator that has connected."""
    broker = broker or MemoryBroker()
    hub = Hub(MemoryTransport(broker, f"coordinator-{boot}"), SITE, boot, asyncio.get_running_loop())
    coordinator = make_coordinator(hub, state)
    coordinator.open()
    try:
        await until(lambda: coordinator.broker_up, "broker up")
        yield Lab(broker, coordinator)
    finally:
        await asyncio.to_thread(hub.stop)
        coordinator.close()
