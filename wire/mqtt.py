"""The Transport contract over MQTT, with paho. Only this file and wire.client import paho.

All paho calls are made under one lock; handlers run outside of it, after the reading, so that a handler's publish goes
out at once instead of being queued inside paho's callback. Each attempt to connect is a new paho client: subscriptions
and QoS 1 messages that were not acknowledged are kept here and given to it again. Only name resolution, TCP connect and
the first bytes happen in a short-lived thread, so `poll` never blocks longer than asked.

MQTT 5 is tried first. A broker that refuses it, or closes the connection before it ever accepted one, is spoken to in
3.1.1 from then on. TCP_NODELAY is set at every connect: Nagle's algorithm costs 44 ms per message and end.

Messages at QoS 0 pass by paho in both directions: see wire.lane.
"""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from paho.mqtt.client import Client as PahoClient
from paho.mqtt.client import DisconnectFlags, MQTTMessage, error_string
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from wire.client import Client, Session, parse_url
from wire.endpoint import Ended, Endpoint, Kept, Redial, Unacknowledged
from wire.lane import Nonsense
from wire.limits import MAX_PUBLISH_BYTES
from wire.subscriptions import check_message, joined
from wire.transport import REFUSED_US, Buffer, Expected, Handler, Inbound, Link, NotConnected, Will

_logger = logging.getLogger("edgelam.wire")

HANDSHAKE_TIMEOUT_S: Final = 5.0
FIRST_HANDSHAKE_TIMEOUT_S: Final = 2.0
"""For a first CONNECT in MQTT 5: some brokers of version 3.1.1 neither refuse it nor close, but wait for more."""

CLOSE_TIMEOUT_S: Final = 2.0

READ_AHEAD_BYTES: Final = 1_048_576
READ_AHEAD_MESSAGES: Final = 64
"""What one `poll` reads before handlers run: bounds memory and lets the worker compute in between."""


class MqttTransport(Endpoint):
    """One connection to one broker; see wire.transport.Transport."""

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        keepalive_s: int,
        will: Will | None = None,
        username: str = "",
        password: str = "",
        five: bool = True,
    ) -> None:
        """Store what is given; raises UsageError if `url` is no address. Nothing is opened before `start`.

        `five` False begins with MQTT 3.1.1: a connection that carries frames uses nothing of MQTT 5, whose properties
        cost paho a seventh of its time per message.
        """
        super().__init__()
        self._address = parse_url(url)
        self._session = Session(client_id, keepalive_s, will, username, password)
        self.refused_messages = 0
        """QoS 1 messages that the broker refused; those that it sent over MAX_PUBLISH_BYTES, or with a broken topic."""
        self._lock = threading.RLock()
        """Guards paho, the link, what is pending and the wake pipe."""
        self._client: Client | None = None
        """The connection, once the TCP part of it stands."""
        self._dialling: tuple[threading.Thread, Client] | None = None
        self._dial_error = ""
        self._accepted = False
        self._redial = Redial(five)
        self._next_attempt_s = math.inf
        self._handshake_until_s = math.inf
        self._next_misc_s = 0.0
        self._ended: deque[Ended] = deque()
        self._arrived: deque[Inbound] = deque()
        self._arrived_bytes = 0
        self._unacknowledged = Unacknowledged()
        self._wake_read, self._wake_write = -1, -1
        self._woken = False
        self._poller = select.poll()
        self._polled: tuple[int, int, int] = (-1, -1, 0)
        """What the poller watches: wake pipe, socket, events of the socket."""
        self.ahead: Callable[[], None] | None = None
        """See wire.transport.ShortWay; so are `peek`, `packet_head` and `put`."""

    @property
    def protocol(self) -> str:
        return "MQTT 5" if self._redial.five else "MQTT 3.1.1"

    @property
    def socket(self) -> socket.socket | None:
        """The socket of the connection, to be looked at; None while there is none."""
        with self._lock:
            lane = None if self._client is None else self._client.lane
            return None if lane is None else lane.connection

    @property
    def local_host(self) -> str:
        connection = self.socket
        try:
            return "" if connection is None else str(connection.getsockname()[0])
        except OSError:
            return ""

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 0) -> None:
        with self._lock:
            news = self._subscriptions.add(topic_filter, handler, qos)
            if news and self._link is Link.UP and self._client is not None:
                self._client.subscribe(topic_filter, qos)

    def unsubscribe(self, topic_filter: str, handler: Handler | None = None) -> None:
        with self._lock:
            gone = self._subscriptions.remove(topic_filter, handler)
            if gone and self._link is Link.UP and self._client is not None:
                self._client.unsubscribe(topic_filter)

    def start(self) -> None:
        with self._lock:
            if self._link is Link.CLOSED or self._wake_read >= 0:
                return
            self._wake_read, self._wake_write = os.pipe()
            os.set_blocking(self._wake_read, False)
            os.set_blocking(self._wake_write, False)
            self._link = Link.CONNECTING
            self._next_attempt_s = time.monotonic()

    def publish(
        self, topic: str, payload: Buffer | Sequence[Buffer], *, qos: int = 0, retain: bool = False, expiry_s: int = 0
    ) -> None:
        parts = (payload,) if isinstance(payload, (bytes, bytearray, memoryview)) else payload
        size = sum(map(len, parts))
        check_message(topic, size, qos)
        with self._lock:
            client = self._client if self._link is Link.UP else None
            if qos == 0 and not expiry_s:
                unsent = self._pass_by(client, topic, parts, size, retain)
            else:
                unsent = self._by_paho(client, Kept(topic, joined(payload), retain, _moment(expiry_s)), qos)
        if unsent:
            self._notify()

    def peek(self, expected: Expected) -> memoryview | None:
        client = self._client
        if client is None or client.lane is None or self._arrived:
            return None
        return client.lane.peek(expected)

    def packet_head(self, topic: str, payload_bytes: int) -> bytes:
        client = self._client if self._link is Link.UP else None
        if client is None or client.lane is None:
            raise self._not_connected(topic)
        return client.lane.packet_head(topic, payload_bytes)

    def put(self, pieces: Sequence[Buffer], packet_bytes: int, payload_bytes: int) -> None:
        client = self._client if self._link is Link.UP else None
        if client is None or client.lane is None:
            raise self._not_connected("a packet")
        try:
            client.lane.put(pieces, packet_bytes)
        except OSError as error:
            self._lost(client, error)
            raise self._not_connected("a packet") from error
        self._bytes_sent += payload_bytes
        if client.lane.unsent:
            self._notify()

    def poll(self, timeout_s: float) -> int:
        deadline_s = time.monotonic() + timeout_s
        while True:
            now_s = time.monotonic()
            timer_s = self._advance(now_s)
            self._wait_and_read(min(deadline_s, timer_s) - now_s)
            handled = self._dispatch()
            if handled or self._woken or self._link is Link.CLOSED or time.monotonic() >= deadline_s:
                self._woken = False
                return handled

    def watched(self) -> tuple[float, tuple[tuple[int, int], ...]]:
        """For who waits for several connections at once (wire.several): do what is due, and give when something will be
        due next (monotonic) and what to wait for until then: descriptors with their events."""
        due_s = self._advance(time.monotonic())
        with self._lock:
            if self._wake_read < 0:
                return math.inf, ()
            lane = None if self._client is None else self._client.lane
            if self._client is None or lane is None:
                return due_s, ((self._wake_read, select.POLLIN),)
            events = select.POLLIN | (select.POLLOUT if self._client.unsent else 0)
            return due_s, ((self._wake_read, select.POLLIN), (lane.fileno(), events))

    def serve(self, ready: Sequence[tuple[int, int]]) -> int:
        """Go on after such a wait, with the descriptors that are ready and their events; handlers run. Gives the number
        of messages that were handled."""
        self._serve(self._client, ready)
        return self._dispatch()

    def wake(self) -> None:
        self._woken = True
        self._notify()

    def close(self) -> None:
        until_s = time.monotonic() + CLOSE_TIMEOUT_S
        while self._link is Link.UP and time.monotonic() < until_s:
            with self._lock:
                if not self._unacknowledged and not (self._client and self._client.unsent):
                    break
            self._wait_and_read(until_s - time.monotonic())
            self._drop_arrived()
        with self._lock:
            self._link = Link.CLOSED
            client, self._client = self._client, None
            if client is not None:
                client.disconnect()
                self._send_rest(client, until_s)
                client.hang_up()
            for end in (self._wake_read, self._wake_write):
                if end >= 0:
                    os.close(end)
            self._wake_read = self._wake_write = -1
        self._drop_arrived()

    @staticmethod
    def _send_rest(client: Client, until_s: float) -> None:
        """Send what is unsent before a connection ends, as far as the broker takes it."""
        try:
            while (lane := client.lane) is not None and client.unsent and time.monotonic() < until_s:
                select.select([], [lane], [], max(0.0, until_s - time.monotonic()))
                lane.flush()
                client.loop_write()
        except OSError as error:
            _logger.debug("the end of a connection: %s", error)

    # --- connecting ---

    def _advance(self, now_s: float) -> float:
        """Do what is due without waiting; give when something will be due next (monotonic)."""
        while self._ended:
            self._after(self._ended.popleft(), now_s)
        if self._link is Link.UP:
            if now_s >= self._next_misc_s:
                self._next_misc_s = now_s + min(1.0, self._session.keepalive_s / 4)
                with self._lock:
                    if self._client is not None:
                        self._client.loop_misc()
            return self._next_misc_s
        if self._link is Link.CLOSED:
            return math.inf
        if self._dialling is not None:
            thread, client = self._dialling
            if thread.is_alive():
                return math.inf
            self._dialling = None
            self._adopt(client, now_s)
        if self._accepted:
            self._accepted = False
            self._up(now_s)
            return self._next_misc_s
        if self._client is not None:
            if now_s >= self._handshake_until_s:
                self._end(self._client, Ended(f"no answer within {self._handshake_timeout_s():.0f} s", early=True))
            return min(self._handshake_until_s, now_s if self._ended else math.inf)
        if now_s >= self._next_attempt_s:
            self._dial()
            return math.inf
        return self._next_attempt_s

    def _dial(self) -> None:
        """Begin an attempt in a thread of its own: name resolution and TCP connect may block for seconds."""
        self._link = Link.CONNECTING
        self._next_attempt_s = math.inf
        self._dial_error = ""
        client = Client(self._session, self._redial.five)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe

        def run() -> None:
            try:
                client.dial(self._address)
            except (OSError, ValueError) as error:
                self._dial_error = _words(error)
            self._notify()

        thread = threading.Thread(target=run, name=f"dial {self._address.host}", daemon=True)
        self._dialling = (thread, client)
        thread.start()

    def _adopt(self, client: Client, now_s: float) -> None:
        """The dialling thread is done: go on with its connection, or try again later."""
        with self._lock:
            if client.lane is None:
                self._ended.append(Ended(self._dial_error or "connection lost"))
                self._after(self._ended.pop(), now_s)
                return
            self._client = client
            self._handshake_until_s = now_s + self._handshake_timeout_s()

    def _handshake_timeout_s(self) -> float:
        return FIRST_HANDSHAKE_TIMEOUT_S if self._redial.untried_five else HANDSHAKE_TIMEOUT_S

    def _up(self, now_s: float) -> None:
        """The broker accepted us: renew subscriptions, send what waits, tell."""
        with self._lock:
            client = self._client
            if client is None:
                return
            self._link = Link.UP
            self._last_error = ""
            self._redial.accepted()
            self._next_misc_s = now_s
            for topic_filter, qos in self._subscriptions:
                client.subscribe(topic_filter, qos)
            for number, message in self._unacknowledged.for_new_connection(now_s):
                self._send_kept(client, number, message)
        self._tell_up()

    def _end(self, client: PahoClient, ended: Ended) -> None:
        """Let go of a connection; what follows from it happens in the next `_advance`."""
        with self._lock:
            ours = self._client
            if ours is None or client is not ours or self._link is Link.CLOSED:
                return
            self._client = None
            self._accepted = False
            self._link = Link.DOWN
            self._ended.append(ended)
            ours.hang_up()

    def _after(self, ended: Ended, now_s: float) -> None:
        """Decide version and time of the next attempt after `ended`, and tell who wants to know."""
        self._link = Link.DOWN
        self._next_attempt_s = self._redial.ended(ended, now_s)
        host, port = self._address
        self._last_error = f"no broker at {host}:{port} ({ended.reason})"
        if ended.was_up:
            self._tell_down(ended.reason)

    # --- paho's callbacks: inside a paho call, under the lock; they only note what happened ---

    def _on_connect(self, client: PahoClient, _data: object, _flags: object, reason: ReasonCode, _p: object) -> None:
        if client is not self._client:
            return
        if reason.is_failure:
            wrong_version = reason.getName() == "Unsupported protocol version"
            self._end(client, Ended(f"it {REFUSED_US}: {reason}".lower(), wrong_version=wrong_version))
        else:
            self._accepted = True

    def _on_disconnect(
        self, client: PahoClient, _data: object, flags: DisconnectFlags, reason: ReasonCode, _p: object
    ) -> None:
        words = (
            f"the broker ended it: {reason}".lower() if flags.is_disconnect_packet_from_server else "connection lost"
        )
        self._end(client, Ended(words, self._link is Link.UP, early=self._link is not Link.UP))

    def _on_message(self, _client: PahoClient, _data: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            self.refused_messages += 1
            return
        self._take(Inbound(topic, bytes(message.payload), message.retain))

    def _on_subscribe(
        self, _client: PahoClient, _data: object, _mid: int, reasons: list[ReasonCode], _p: object
    ) -> None:
        for reason in reasons:
            if reason.is_failure:
                self._last_error = f"the broker refused a subscription ({reason})".lower()
                _logger.warning("%s: %s", self._session.client_id, self._last_error)

    def _on_publish(self, _client: PahoClient, _data: object, mid: int, reason: ReasonCode, _p: object) -> None:
        message = self._unacknowledged.acknowledged(mid)
        if message is not None and reason.is_failure:
            self.refused_messages += 1
            _logger.warning("%s: the broker refused a message (%s)", message.topic, reason)

    # --- sending and receiving ---

    def _pass_by(self, client: Client | None, topic: str, parts: Sequence[Buffer], size: int, retain: bool) -> bool:
        """Send at QoS 0 on the short way; give whether something waits for the socket."""
        lane = None if client is None else client.lane
        if client is None or lane is None:
            raise self._not_connected(topic)
        try:
            lane.publish(topic, parts, size, retain)
        except OSError as error:
            self._lost(client, error)
            raise self._not_connected(topic) from error
        self._bytes_sent += size
        return bool(lane.unsent)

    def _by_paho(self, client: Client | None, message: Kept, qos: int) -> bool:
        """Send at QoS 1, or with an expiry; give whether something waits for the socket."""
        if qos == 1:
            self._keep(client, message)
        elif client is None:
            raise self._not_connected(message.topic)
        else:
            self._hand_over(client, message, 0)
        return client is not None and client.unsent

    def _lost(self, client: Client, error: OSError) -> None:
        self._end(client, Ended(f"connection lost: {_words(error)}", self._link is Link.UP))

    def _keep(self, client: Client | None, message: Kept) -> None:
        if self._link is Link.CLOSED:
            raise self._not_connected(message.topic)
        number = self._unacknowledged.keep(message)
        if client is not None:
            self._send_kept(client, number, message)

    def _send_kept(self, client: Client, number: int, message: Kept) -> None:
        """Give a kept message to this connection; if it is lost meanwhile, the next one gets it."""
        client.on_publish = self._on_publish
        try:
            self._unacknowledged.sent(number, self._hand_over(client, message, 1))
        except NotConnected:
            return

    def _hand_over(self, client: Client, message: Kept, qos: int) -> int:
        """Give a message to paho, which writes what the socket takes; give paho's message id."""
        properties = None
        if message.expires_s is not None and self._redial.five:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.MessageExpiryInterval = max(1, round(message.expires_s - time.monotonic()))
        info = client.publish(message.topic, message.payload, qos, message.retain, properties)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise NotConnected(f"{message.topic}: {error_string(info.rc)}".rstrip("."))
        self._bytes_sent += len(message.payload)
        return info.mid

    def _wait_and_read(self, wait_s: float) -> None:
        """Wait for the socket or a wake-up, at most so long; write and read what is possible."""
        with self._lock:
            if self._wake_read < 0:
                return
            client = self._client
            poller = self._watching(client)
        wait_ms = None if wait_s == math.inf else max(0, math.ceil(wait_s * 1000))
        self._serve(client, poller.poll(wait_ms))

    def _serve(self, client: Client | None, ready: Sequence[tuple[int, int]]) -> None:
        """Write and read what is possible, after a wait over this client's socket."""
        for descriptor, events in ready:
            with self._lock:
                if descriptor == self._wake_read:
                    _drain(descriptor)
                    continue
                if client is None or client is not self._client:
                    continue
                if events & select.POLLOUT:
                    self._write(client)
                if events & ~select.POLLOUT and client is self._client:
                    if self.ahead is not None:
                        self.ahead()
                    self._read(client)

    def _watching(self, client: Client | None) -> select.poll:
        """The poller over the wake pipe and the connection, made anew only when what it watches has changed."""
        number, events = -1, 0
        if client is not None and client.lane is not None:
            number = client.lane.fileno()
            events = select.POLLIN | (select.POLLOUT if client.unsent else 0)
        polled = (self._wake_read, number, events)
        if polled != self._polled:
            self._polled = polled
            self._poller = select.poll()
            self._poller.register(self._wake_read, select.POLLIN)
            if number >= 0:
                self._poller.register(number, events)
        return self._poller

    def _write(self, client: Client) -> None:
        lane = client.lane
        if lane is not None:
            try:
                lane.flush()
            except OSError as error:
                self._lost(client, error)
                return
        client.loop_write()

    def _read(self, client: Client) -> None:
        """Read as long as there is something, up to the read-ahead; paho gets what is no message at QoS 0."""
        more = True
        while more and len(self._arrived) < READ_AHEAD_MESSAGES and self._arrived_bytes < READ_AHEAD_BYTES:
            lane = client.lane
            if lane is None:
                return
            try:
                messages, more = lane.read()
            except Nonsense as error:
                self._end(client, Ended(f"it speaks no MQTT: {error}", self._link is Link.UP))
                return
            if lane.refused:
                self.refused_messages += lane.refused
                lane.refused = 0
            for message in messages:
                self._take(message)
            while lane.others and client is self._client:
                client.loop_read()

    def _take(self, message: Inbound) -> None:
        if len(message.payload) > MAX_PUBLISH_BYTES:
            self.refused_messages += 1
            return
        self._arrived.append(message)
        self._arrived_bytes += len(message.payload)

    def _dispatch(self) -> int:
        """Call the handlers of what arrived, without the lock."""
        handled = 0
        while self._arrived and self._link is not Link.CLOSED:
            message = self._arrived.popleft()
            self._arrived_bytes -= len(message.payload)
            handled += 1
            self._handle(message)
        return handled

    def _drop_arrived(self) -> None:
        self._arrived.clear()
        self._arrived_bytes = 0

    def _notify(self) -> None:
        with self._lock:
            if self._wake_write >= 0:
                try:
                    os.write(self._wake_write, b"w")
                except BlockingIOError:
                    return  # full of wake-ups already: the reader will come


def _moment(expiry_s: int) -> float | None:
    return time.monotonic() + expiry_s if expiry_s else None


def _drain(descriptor: int) -> None:
    try:
        os.read(descriptor, 4096)
    except BlockingIOError:
        return


def _words(error: OSError | ValueError) -> str:
    """'connection refused' of an exception."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.lower()
