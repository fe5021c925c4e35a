"""The coordinator's end of the broker: one thread that polls the transport and hands everything to asyncio.

Decisions are made in the event loop's thread only. This thread owns transport, inbox and outboxes; the loop reaches
it through `post` (a queue and a wake-up), and it reaches the loop through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from wire import topics
from wire.channel import Inbox, Outbox
from wire.errors import EdgelamError
from wire.frames import Parcel
from wire.ids import new_stream_id
from wire.limits import CREDIT_WINDOW_BYTES
from wire.messages import InboxAddress
from wire.transport import Inbound, Link, Transport

LOG = logging.getLogger("edgelam.hub")
POLL_S = 0.25
TICK_S = 0.25
MAX_OUTBOXES = 64
MAX_UNREAD = 256
"""Messages that may wait for the event loop: a flood then waits in the socket and at the broker, not in our memory."""


class Hub:
    """`on_message(topic, payload)` gets all control messages of the site, `on_parcel(parcel)` what comes to the
    requester's inbox, `on_link(up, reason)` each change of the connection; all in the event loop's thread."""

    def __init__(
        self,
        transport: Transport,
        site: str,
        boot: str,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.transport = transport
        self.site = site
        self.reply_inbox = InboxAddress(topic=topics.INBOX.on(site, f"requester-{boot}", "0"))
        self.on_message: Callable[[str, bytes], None] = lambda _topic, _payload: None
        self.on_parcel: Callable[[Parcel], None] = lambda _parcel: None
        self.on_link: Callable[[bool, str], None] = lambda _up, _reason: None
        self._loop = loop
        self._actions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outboxes: OrderedDict[str, Outbox] = OrderedDict()
        self._unread = threading.Semaphore(MAX_UNREAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Subscribe to what devices say and start the thread."""
        transport = self.transport
        for topic in (topics.STATE, topics.INFO, topics.PROFILE, topics.TELEMETRY, topics.APPLIED):
            transport.subscribe(topic.on(self.site, "+"), self._forward, qos=topic.qos)
        transport.subscribe(topics.EVENT.on(self.site, "+"), self._forward, qos=0)
        transport.subscribe(topics.REPLY.on(self.site, "coordinator", "+"), self._forward, qos=1)
        transport.on_up(lambda: self._soon(self.on_link, True, ""))
        transport.on_down(lambda reason: self._soon(self.on_link, False, reason))
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send what is queued, disconnect, end the thread; waits at most 3 s."""
        self._stop.set()
        self.transport.wake()
        if self._thread is not None:
            self._thread.join(3.0)

    @property
    def up(self) -> bool:
        return self.transport.link is Link.UP

    @property
    def alive(self) -> bool:
        """Whether the thread runs. One that ended unasked has printed why, and nothing will arrive any more."""
        return self._thread is not None and self._thread.is_alive()

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` in the hub's thread soon. Errors are logged there."""
        self._actions.put(action)
        self.transport.wake()

    def publish(self, topic: topics.Topic, payload: bytes, *fields: str) -> None:
        """Publish a control message of the table, retained if the table says so."""
        self.post(
            lambda: self.transport.publish(topic.on(self.site, *fields), payload, qos=topic.qos, retain=topic.retained)
        )

    def send(self, inbox: InboxAddress, parcel: Parcel, failed: Callable[[str], None]) -> None:
        """Send a parcel to a stage; `failed(reason)` is called in the loop's thread if it could not be sent."""

        def act() -> None:
            try:
                self._outbox(inbox.topic).send(parcel)
            except EdgelamError as error:
                self._soon(failed, error.message)

        self.post(act)

    def _outbox(self, topic: str) -> Outbox:
        box = self._outboxes.get(topic)
        if box is None:
            box = self._outboxes[topic] = Outbox(self.transport, topic, stream=new_stream_id())
            while len(self._outboxes) > MAX_OUTBOXES:
                self._outboxes.popitem(last=False)[1].close()
        self._outboxes.move_to_end(topic)
        return box

    def _forward(self, message: Inbound) -> None:
        """Hand a message to the loop; waits while MAX_UNREAD are there already."""
        while not self._unread.acquire(timeout=0.0 if self._stop.is_set() else POLL_S):
            if self._stop.is_set():
                return
        self._soon(self._read, message)

    def _read(self, message: Inbound) -> None:
        self._unread.release()
        self.on_message(message.topic, bytes(message.payload))

    def _soon(self, handler: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(handler, *arguments)
        except RuntimeError:
            LOG.debug("a message after the event loop's end")

    def _run(self) -> None:
        inbox = Inbox(self.transport, self.reply_inbox.topic, window_bytes=CREDIT_WINDOW_BYTES)
        self.transport.start()
        next_tick_s = 0.0
        while not self._stop.is_set():
            self.transport.poll(POLL_S)
            self._drain_actions()
            while (delivery := inbox.take()) is not None:
                self._soon(self.on_parcel, delivery.parcel)
                inbox.done(delivery)
            now_s = time.monotonic()
            if now_s >= next_tick_s:
                next_tick_s = now_s + TICK_S
                inbox.tick()
                for box in self._outboxes.values():
                    box.tick()
        self._drain_actions()
        self.transport.close()

    def _drain_actions(self) -> None:
        while True:
            try:
                action = self._actions.get_nowait()
            except queue.Empty:
                return
            try:
                action()
            except EdgelamError as error:
                LOG.warning("%s", error.message)
