"""The device's end of the control broker: its topics, read and written, for one connection.

What comes from the network is decoded and checked here; what is wrong is counted, told at most every TELL_PERIOD_S,
and goes no further.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from msgspec import Struct

from wire import topics
from wire.errors import PeerError
from wire.messages import (
    Applied,
    Command,
    Desired,
    DeviceInfo,
    DeviceState,
    Event,
    Kit,
    Reply,
    Telemetry,
    decode,
    encode,
)
from wire.transport import Inbound, Link, NotConnected, OutboundQueueFull, TooLarge, Transport

LOG = logging.getLogger("edgelam.session")
TELL_PERIOD_S: Final = 30.0
S = TypeVar("S", bound=Struct)

Unreadable = Callable[[bytes | memoryview, str], None]
"""Hears of a message that could not be read: its bytes, and what is wrong with it."""


class Listener(Protocol):
    """Who hears what came."""

    def desired(self, message: Desired) -> None: ...

    def unreadable_order(self, payload: bytes | memoryview, problem: str) -> None: ...

    def kit(self, message: Kit) -> None: ...

    def command(self, verb: str, message: Command) -> None: ...

    def own_state(self, message: DeviceState) -> None: ...

    def own_heartbeat(self, message: Telemetry) -> None: ...

    def own_info(self, message: DeviceInfo) -> None: ...


class Session:
    """Subscribes at once; the transport delivers when it is up."""

    def __init__(self, transport: Transport, site: str, device: str, listener: Listener) -> None:
        self.transport = transport
        self.site = site
        self.refused = 0
        """Messages that could not be read."""
        self._device = device
        self._told_s = 0.0
        self._read(topics.STATE, DeviceState, listener.own_state)
        self._read(topics.TELEMETRY, Telemetry, listener.own_heartbeat)
        self._read(topics.INFO, DeviceInfo, listener.own_info)
        self._read(topics.DESIRED, Desired, listener.desired, listener.unreadable_order)
        transport.subscribe(topics.KIT.on(site), self._handler(Kit, lambda _topic, kit: listener.kit(kit)), qos=1)

        def command(topic: str, message: Command) -> None:
            fields = topics.COMMAND.fields_of(topic)
            if fields is not None:
                listener.command(fields[1], message)

        transport.subscribe(topics.COMMAND.on(site, device, "+"), self._handler(Command, command), qos=1)

    @property
    def up(self) -> bool:
        return self.transport.link is Link.UP

    def publish(self, topic: topics.Topic, message: Struct, *fields: str) -> bool:
        """Publish as the table says; False if it could not be sent nor queued (it is told in the log)."""
        where = topic.on(self.site, *(fields or (self._device,)))
        try:
            self.transport.publish(where, encode(message), qos=topic.qos, retain=topic.retained)
        except NotConnected:
            return False
        except (OutboundQueueFull, TooLarge, ValueError) as error:
            LOG.warning("%s: not published: %s", where, error)
            return False
        return True

    def announce(self, state: DeviceState, info: DeviceInfo, profile: Struct | None, applied: Applied) -> None:
        """Publish everything retained, the state last: who sees 'online' finds the rest."""
        self.publish(topics.INFO, info)
        if profile is not None:
            self.publish(topics.PROFILE, profile)
        self.publish(topics.APPLIED, applied)
        self.publish(topics.STATE, state)

    def reply(self, topic: str, reply: Reply) -> None:
        """Answer a command; only on a reply topic of this site: a command can't make us publish elsewhere."""
        fields = topics.REPLY.fields_of(topic)
        if fields is None or topic != topics.REPLY.on(self.site, *fields) or "+" in topic or "#" in topic:
            self.refused += 1
            return
        self.publish(topics.REPLY, reply, *fields)

    def event(self, event: Event) -> None:
        self.publish(topics.EVENT, event)

    def _read(
        self,
        topic: topics.Topic,
        kind: type[S],
        handle: Callable[[S], None],
        unreadable: Unreadable = lambda _payload, _problem: None,
    ) -> None:
        handler = self._handler(kind, lambda _topic, message: handle(message), unreadable)
        self.transport.subscribe(topic.on(self.site, self._device), handler, qos=topic.qos)

    def _handler(
        self,
        kind: type[S],
        handle: Callable[[str, S], None],
        unreadable: Unreadable = lambda _payload, _problem: None,
    ) -> Callable[[Inbound], None]:
        def read(inbound: Inbound) -> None:
            if not inbound.payload:
                return  # A cleared retained topic says nothing.
            try:
                message = decode(inbound.payload, kind, inbound.topic)
            except PeerError as error:
                self.refused += 1
                now_s = time.monotonic()
                if not self._told_s or now_s - self._told_s > TELL_PERIOD_S:
                    self._told_s = now_s
                    LOG.warning("%s (%d refused so far)", error.message[:400], self.refused)
                unreadable(inbound.payload, error.message[:400])
                return
            handle(inbound.topic, message)

        return read
