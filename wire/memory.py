"""The Transport contract inside one process: for tests, simulators and fleets of fake devices.

`MemoryBroker` keeps what an MQTT broker keeps (subscriptions, retained messages, last wills, one connection per client
id) and can fail as one does: stop, cut a client off, lose or double messages. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wire.endpoint import Endpoint, Kept
from wire.errors import Unreachable
from wire.limits import RECONNECT_DELAY_S
from wire.subscriptions import check_message, joined, matches
from wire.transport import MAX_QUEUED_MESSAGES, Buffer, Handler, Inbound, Link, OutboundQueueFull, Will

Copies = Callable[[str, Inbound], int]
"""(client id, message) -> how many copies that client gets: 0 loses it, 2 doubles it."""


class _Retained(NamedTuple):
    payload: bytes
    expires_s: float | None


class MemoryBroker:
    """Routes messages between the MemoryTransports that are attached to it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.copies: Copies | None = None
        """Fault injection for messages on their way to a client; None delivers each once. Retained ones are spared."""
        self._lock = threading.RLock()
        self._running = True
        self._cut: set[str] = set()
        self._clients: dict[str, MemoryTransport] = {}
        self._filters: dict[str, list[str]] = {}
        self._retained: dict[str, _Retained] = {}

    @property
    def retained(self) -> dict[str, bytes]:
        """What a new subscriber to everything would get."""
        with self._lock:
            return {topic: kept.payload for topic, kept in self._retained.items() if not self._expired(kept.expires_s)}

    def stop(self, *, keep_retained: bool = False) -> None:
        """Die like a killed broker: all links go down, no will is published, retained messages are lost."""
        with self._lock:
            self._running = False
            if not keep_retained:
                self._retained.clear()
            for client_id in list(self._clients):
                self._lose(client_id, "the broker stopped", publish_will=False)

    def start(self) -> None:
        with self._lock:
            self._running = True

    def cut(self, client_id: str) -> None:
        """Cut a client off as a pulled cable does; its will is published. It can't reconnect until `mend`."""
        with self._lock:
            self._cut.add(client_id)
            self._lose(client_id, "cut off", publish_will=True)

    def mend(self, client_id: str) -> None:
        with self._lock:
            self._cut.discard(client_id)

    def attach(self, client: MemoryTransport) -> None:
        """Connect; a client of the same id is thrown out, as MQTT wants it. Raises Unreachable."""
        with self._lock:
            if not self._running or client.client_id in self._cut:
                raise Unreachable(
                    "no broker at memory (not running)" if not self._running else "cut off from the broker"
                )
            if self._clients.get(client.client_id) is not client:
                self._lose(client.client_id, "another client took over this client id", publish_will=True)
            self._clients[client.client_id] = client
            self._filters[client.client_id] = []
            client.connected()

    def detach(self, client: MemoryTransport, *, publish_will: bool) -> None:
        with self._lock:
            if self._clients.get(client.client_id) is client:
                self._lose(client.client_id, "", publish_will=publish_will)

    def subscribe(self, client: MemoryTransport, topic_filter: str) -> None:
        """Add a filter and deliver the retained messages that match it."""
        with self._lock:
            if self._clients.get(client.client_id) is not client:
                return
            if topic_filter not in self._filters[client.client_id]:
                self._filters[client.client_id].append(topic_filter)
            for topic, kept in self._retained.items():
                if matches(topic_filter, topic) and not self._expired(kept.expires_s):
                    client.deliver(Inbound(topic, kept.payload, True))

    def unsubscribe(self, client: MemoryTransport, topic_filter: str) -> None:
        with self._lock:
            filters = self._filters.get(client.client_id, [])
            if self._clients.get(client.client_id) is client and topic_filter in filters:
                filters.remove(topic_filter)

    def publish(self, topic: str, payload: bytes, *, retain: bool, expires_s: float | None) -> None:
        """Keep a retained message (an empty one clears the topic) and deliver to each client that matches, once."""
        with self._lock:
            if retain and payload:
                self._retained[topic] = _Retained(payload, expires_s)
            elif retain:
                self._retained.pop(topic, None)
            if self._expired(expires_s):
                return
            message = Inbound(topic, payload, False)
            for client_id, filters in self._filters.items():
                if any(matches(topic_filter, topic) for topic_filter in filters):
                    copies = 1 if self.copies is None else self.copies(client_id, message)
                    for _ in range(copies):
                        self._clients[client_id].deliver(message)

    def _expired(self, expires_s: float | None) -> bool:
        return expires_s is not None and self.clock() >= expires_s

    def _lose(self, client_id: str, reason: str, *, publish_will: bool) -> None:
        client = self._clients.pop(client_id, None)
        self._filters.pop(client_id, None)
        if client is None:
            return
        client.lost(reason)
        if publish_will and client.will is not None:
            self.publish(client.will.topic, client.will.payload, retain=True, expires_s=None)


class MemoryTransport(Endpoint):
    """One client of a MemoryBroker; keeps the contract of wire.transport.Transport."""

    def __init__(self, broker: MemoryBroker, client_id: str, *, will: Will | None = None) -> None:
        super().__init__()
        self.client_id = client_id
        self.will = will
        self._broker = broker
        self._condition = threading.Condition()
        self._started = False
        self._next_attempt_s = 0.0
        self._inbound: deque[Inbound] = deque()
        self._losses: deque[str] = deque()
        self._waiting: deque[Kept] = deque()
        self._woken = False

    @property
    def protocol(self) -> str:
        return "memory"

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 0) -> None:
        if self._subscriptions.add(topic_filter, handler, qos) and self._link is Link.UP:
            self._broker.subscribe(self, topic_filter)

    def unsubscribe(self, topic_filter: str, handler: Handler | None = None) -> None:
        if self._subscriptions.remove(topic_filter, handler) and self._link is Link.UP:
            self._broker.unsubscribe(self, topic_filter)

    @property
    def local_host(self) -> str:
        return "127.0.0.1" if self.link is Link.UP else ""

    def start(self) -> None:
        if not self._started and self._link is not Link.CLOSED:
            self._started = True
            self._link = Link.CONNECTING
            self._next_attempt_s = time.monotonic()

    def publish(
        self, topic: str, payload: Buffer | Sequence[Buffer], *, qos: int = 0, retain: bool = False, expiry_s: int = 0
    ) -> None:
        data = joined(payload)
        check_message(topic, len(data), qos)
        expires_s = self._broker.clock() + expiry_s if expiry_s else None
        with self._condition:
            up = self._link is Link.UP
            if not up and (qos == 0 or self._link is Link.CLOSED):
                raise self._not_connected(topic)
            if not up:
                if len(self._waiting) >= MAX_QUEUED_MESSAGES:
                    raise OutboundQueueFull(f"{topic}: {MAX_QUEUED_MESSAGES} messages wait for a connection already")
                self._waiting.append(Kept(topic, data, retain, expires_s))
                return
            self._bytes_sent += len(data)
        self._broker.publish(topic, data, retain=retain, expires_s=expires_s)

    def poll(self, timeout_s: float) -> int:
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._advance()
            handled = self._dispatch()
            now_s = time.monotonic()
            with self._condition:
                if handled or self._woken or now_s >= deadline_s or self._link is Link.CLOSED:
                    self._woken = False
                    return handled
                if not self._inbound and not self._losses:
                    until_s = deadline_s
                    if self._link is not Link.UP and self._started:
                        until_s = min(until_s, self._next_attempt_s)
                    self._condition.wait(max(0.0, until_s - now_s))

    def wake(self) -> None:
        with self._condition:
            self._woken = True
            self._condition.notify_all()

    def close(self) -> None:
        """Disconnect in order: no will."""
        self._broker.detach(self, publish_will=False)
        self._end()

    def vanish(self) -> None:
        """Die like a killed process: the broker publishes the will. This transport is closed afterwards."""
        self._broker.detach(self, publish_will=True)
        self._end()

    def deliver(self, message: Inbound) -> None:
        """The broker's end of the wire."""
        with self._condition:
            self._inbound.append(message)
            self._condition.notify_all()

    def connected(self) -> None:
        """The broker's end of the wire: it took us."""
        with self._condition:
            self._link = Link.UP
            self._last_error = ""

    def lost(self, reason: str) -> None:
        """The broker's end of the wire: the connection is gone."""
        with self._condition:
            if self._link is Link.UP:
                self._link = Link.DOWN
                self._next_attempt_s = time.monotonic() + RECONNECT_DELAY_S
                self._losses.append(reason)
            self._condition.notify_all()

    def _end(self) -> None:
        with self._condition:
            self._link = Link.CLOSED
            self._inbound.clear()
            self._waiting.clear()
            self._condition.notify_all()

    def _advance(self) -> None:
        """Report losses, then connect if it is time to."""
        while self._losses:
            reason = self._losses.popleft()
            self._last_error = reason
            self._tell_down(reason)
        if not self._started or self._link in (Link.UP, Link.CLOSED) or time.monotonic() < self._next_attempt_s:
            return
        try:
            self._broker.attach(self)
        except Unreachable as error:
            self._last_error = error.message
            self._link = Link.DOWN
            self._next_attempt_s = time.monotonic() + RECONNECT_DELAY_S
            return
        for topic_filter, _ in self._subscriptions:
            self._broker.subscribe(self, topic_filter)
        while self._waiting and self.link is Link.UP:
            message = self._waiting.popleft()
            self._bytes_sent += len(message.payload)
            self._broker.publish(message.topic, message.payload, retain=message.retain, expires_s=message.expires_s)
        self._tell_up()

    def _dispatch(self) -> int:
        """Handle what was there when this began, so that handlers that publish to themselves don't hold the thread."""
        handled = 0
        for _ in range(len(self._inbound)):
            try:
                message = self._inbound.popleft()
            except IndexError:
                break
            handled += 1
            self._handle(message)
        return handled
