"""The hub carries everything between its thread and the loop's, in order, and loses nothing when it is stopped."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from coordinator import hub as hub_module
from coordinator.hub import Hub
from tests.coordinator.memory_site import BOOT, SITE, Client, until
from wire import frames, topics
from wire.channel import Inbox, Outbox
from wire.ids import new_stream_id
from wire.memory import MemoryBroker, MemoryTransport
from wire.messages import InboxAddress

STAGE = InboxAddress(topic=topics.INBOX.on(SITE, "tiny", "0"))


@asynccontextmanager
async def started(broker: MemoryBroker, wait: bool = True) -> AsyncIterator[Hub]:
    hub = Hub(MemoryTransport(broker, "coordinator"), SITE, BOOT, asyncio.get_running_loop())
    hub.start()
    try:
        if wait:
            await until(lambda: hub.up, "hub up")
        yield hub
    finally:
        await asyncio.to_thread(hub.stop)
        assert not hub.alive


def run(scenario: Callable[[MemoryBroker], object]) -> None:
    asyncio.run(scenario(MemoryBroker()))  # type: ignore[arg-type]


def parcel(number: int, meta: bytes = b"") -> frames.Parcel:
    return frames.Parcel(kind=frames.Kind.CLOSE, epoch=1, request=number, position=0, meta=meta)


def test_control_messages_reach_the_loops_thread_in_order() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        async with started(broker) as hub:
            seen: list[tuple[str, bytes, int]] = []
            hub.on_message = lambda topic, payload: seen.append((topic, payload, threading.get_ident()))
            board = Client(broker, "board")
            for number in range(20):
                board.say(topics.TELEMETRY, b"%d" % number, "pi5")
            for topic in (topics.STATE, topics.INFO, topics.PROFILE, topics.APPLIED, topics.EVENT):
                board.say(topic, b"x", "pi5")
            board.say(topics.REPLY, b"x", "coordinator", "measure")
            await until(lambda: len(seen) == 26, "26 messages")
            assert [payload for _, payload, _ in seen[:20]] == [b"%d" % number for number in range(20)]
            assert {thread for *_, thread in seen} == {threading.get_ident()}

    run(scenario)


def test_parcels_for_the_requester_reach_the_loops_thread() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        async with started(broker) as hub:
            seen: list[tuple[int, int]] = []
            hub.on_parcel = lambda parcel: seen.append((parcel.request, threading.get_ident()))
            stage = Client(broker, "stage")
            outbox = Outbox(stage.transport, hub.reply_inbox.topic, stream=new_stream_id())
            for number in range(5):
                outbox.send(parcel(number))
            await until(lambda: len(seen) == 5, "5 parcels")
            assert seen == [(number, threading.get_ident()) for number in range(5)]

    run(scenario)


def test_a_parcel_arrives_at_the_stage() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        stage = Client(broker, "stage")
        inbox = Inbox(stage.transport, STAGE.topic)
        async with started(broker) as hub:
            hub.send(STAGE, parcel(7), lambda _why: None)
            await until(lambda: bool(stage.poll() or inbox.waiting), "a parcel")
            delivery = inbox.take()
            assert delivery is not None and delivery.parcel.request == 7

    run(scenario)


def test_a_parcel_that_can_not_be_sent_says_so_in_the_loops_thread() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        broker.stop()
        async with started(broker, wait=False) as hub:
            told: list[tuple[str, int]] = []
            hub.send(STAGE, parcel(7), lambda why: told.append((why, threading.get_ident())))
            await until(lambda: bool(told), "a failure")
            assert "nothing was sent" in told[0][0]
            assert told[0][1] == threading.get_ident()

    run(scenario)


def test_the_loop_hears_of_every_loss_and_every_connect() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        async with started(broker) as hub:
            links: list[tuple[bool, str]] = []
            hub.on_link = lambda up, reason: links.append((up, reason))
            broker.stop()
            await until(lambda: (False, "the broker stopped") in links, "down")
            broker.start()
            await until(lambda: links[-1] == (True, ""), "up again")

    run(scenario)


def test_what_was_published_while_the_broker_was_away_is_there_when_it_is_back() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        async with started(broker) as hub:
            broker.stop()
            await until(lambda: not hub.up, "down")
            hub.publish(topics.PLAN, b"old", "tiny")
            hub.publish(topics.PLAN, b"new", "tiny")
            broker.start()
            topic = topics.PLAN.on(SITE, "tiny")
            await until(lambda: broker.retained.get(topic) == b"new", "the newer plan")

    run(scenario)


def test_an_action_that_fails_does_not_end_the_thread() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        async with started(broker) as hub:
            hub.publish(topics.PLAN, bytes(2_000_000), "tiny")  # above MAX_PUBLISH_BYTES
            hub.publish(topics.PLAN, b"fits", "other")
            await until(lambda: topics.PLAN.on(SITE, "other") in broker.retained, "the next message")
            assert hub.alive

    run(scenario)


def test_all_that_was_posted_before_stop_is_sent() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        async with started(broker) as hub:
            for number in range(300):
                hub.publish(topics.PLAN, b"x", f"plan-{number}")
        assert len(broker.retained) == 300

    run(scenario)


def test_stop_is_quick_up_or_down_and_may_be_asked_twice() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        for up in (True, False):
            if not up:
                broker.stop()
            async with started(broker, wait=up) as hub:
                begun_s = time.monotonic()
                await asyncio.to_thread(hub.stop)
                await asyncio.to_thread(hub.stop)
                assert time.monotonic() - begun_s < 2.0

    run(scenario)


def test_a_hub_that_was_never_started_can_be_stopped() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        Hub(MemoryTransport(broker, "coordinator"), SITE, BOOT, asyncio.get_running_loop()).stop()

    run(scenario)


def test_a_flood_waits_outside_while_the_loop_is_busy_and_nothing_of_it_is_lost() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        async with started(broker) as hub:
            seen: list[bytes] = []
            hub.on_message = lambda _topic, payload: seen.append(payload)
            board = Client(broker, "board")
            count = hub_module.MAX_UNREAD * 4
            for number in range(count):
                board.say(topics.TELEMETRY, b"%d" % number, "pi5")
            time.sleep(0.3)  # the loop is busy
            ready = len(asyncio.get_running_loop()._ready)  # type: ignore[attr-defined]
            assert ready <= hub_module.MAX_UNREAD + 10
            await until(lambda: len(seen) == count, "the whole flood")
            assert seen == [b"%d" % number for number in range(count)]

    run(scenario)


def test_a_busy_loop_with_a_flood_does_not_hold_up_stop() -> None:
    async def scenario(broker: MemoryBroker) -> None:
        async with started(broker) as hub:
            board = Client(broker, "board")
            for _ in range(hub_module.MAX_UNREAD * 4):
                board.say(topics.TELEMETRY, b"x", "pi5")
            begun_s = time.monotonic()
            hub.stop()  # in the loop's thread: nothing is read meanwhile
            assert not hub.alive
            assert time.monotonic() - begun_s < 2.0

    run(scenario)


def test_messages_after_the_end_of_the_loop_do_not_raise() -> None:
    broker = MemoryBroker()
    made: list[Hub] = []

    async def scenario() -> None:
        hub = Hub(MemoryTransport(broker, "coordinator"), SITE, BOOT, asyncio.get_running_loop())
        made.append(hub)
        hub.start()
        await until(lambda: hub.up, "hub up")

    asyncio.run(scenario())
    Client(broker, "board").say(topics.TELEMETRY, b"x", "pi5")
    time.sleep(0.1)
    assert made[0].alive
    made[0].stop()
