"""The contract of a connection to one broker; `wire.mqtt` and `wire.memory` keep it, one test class checks both.

A transport does I/O only inside `poll` (and `publish`, which writes at once when the socket takes it), in the
thread that calls it: a worker receives, computes and publishes from one thread, without a hand-over. `publish` and
`wake` may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Final, NamedTuple, Protocol, runtime_checkable

from wire.errors import EdgelamError, Unreachable

Buffer = bytes | bytearray | memoryview

REFUSED_US: Final = "refused us"
"""Stands in `last_error` when a broker answered and said no, as to a wrong password."""

MAX_QUEUED_MESSAGES: Final = 1000
"""QoS 1 messages that may wait for a connection: all retained state of a device is a tenth of this."""


class Inbound(NamedTuple):
    """One message as it came: `payload` is valid as long as somebody holds it."""

    topic: str
    payload: bytes
    retained: bool


class Link(Enum):
    """State of the connection."""

    DOWN = "down"
    CONNECTING = "connecting"
    UP = "up"
    CLOSED = "closed"


class NotConnected(Unreachable):
    """A QoS 0 message was given while the connection is down; it was not sent and not queued."""


class OutboundQueueFull(EdgelamError):
    """Too many QoS 1 messages wait for a connection; this one was not queued."""


class TooLarge(EdgelamError):
    """The payload exceeds MAX_PUBLISH_BYTES; nothing was sent and the connection stays up."""


class Will(NamedTuple):
    """What the broker publishes, retained at QoS 1, when this client vanishes."""

    topic: str
    payload: bytes


class Expected(NamedTuple):
    """A packet of which only `gap` bytes behind `head` and the end, behind `rest`, are not known yet."""

    head: bytes
    gap: int
    rest: bytes
    packet_bytes: int


Handler = Callable[[Inbound], None]


class Transport(Protocol):
    """One connection to one broker, reconnecting by itself every RECONNECT_DELAY_S."""

    @property
    def link(self) -> Link: ...

    @property
    def protocol(self) -> str:
        """'MQTT 5', 'MQTT 3.1.1' or 'memory'; meaningful once `link` was UP."""

    @property
    def last_error(self) -> str:
        """Why the last attempt to connect failed, for people; '' if it didn't."""

    @property
    def local_host(self) -> str:
        """Our own address on the connection, '' while there is none."""

    @property
    def bytes_sent(self) -> int:
        """Payload bytes published since the start, topic names and MQTT headers not counted."""

    @property
    def bytes_received(self) -> int: ...

    def subscribe(self, topic_filter: str, handler: Handler, *, qos: int = 0) -> None:
        """Call `handler` for each message that matches; kept over reconnects. QoS 0 or 1, never 2.

        Several handlers may share one filter. Different filters of one transport should not overlap: a broker may
        then deliver a message once for each, and every handler that matches sees each delivery.
        """

    def unsubscribe(self, topic_filter: str, handler: Handler | None = None) -> None:
        """Remove one handler of a filter, or all (None); the subscription ends with its last handler."""

    def on_up(self, handler: Callable[[], None]) -> None:
        """Call `handler` at each connect, after subscriptions were renewed: the place to republish retained state."""

    def on_down(self, handler: Callable[[str], None]) -> None:
        """Call `handler(reason)` when an established connection is lost."""

    def start(self) -> None:
        """Begin to connect; returns at once. Progress is made in `poll`."""

    def publish(
        self, topic: str, payload: Buffer | Sequence[Buffer], *, qos: int = 0, retain: bool = False, expiry_s: int = 0
    ) -> None:
        """Send one message; a sequence of buffers is sent as their concatenation.

        QoS 0 raises NotConnected when the link is not UP. QoS 1 is queued (at most MAX_QUEUED_MESSAGES) and sent later.
        `expiry_s` is a v5 message expiry; a 3.1.1 connection ignores it.
        """

    def poll(self, timeout_s: float) -> int:
        """Run I/O and handlers until at least one message was handled, or `timeout_s` is over; give their number.

        `timeout_s` 0 takes what is there. Handlers run in the calling thread; they may publish and subscribe.
        """

    def wake(self) -> None:
        """Make a running or the next `poll` return soon. Any thread."""

    def close(self) -> None:
        """Disconnect in order (no last will) after sending what is queued, within 2 s. Idempotent."""


@runtime_checkable
class ShortWay(Protocol):
    """What a transport may offer besides, to who knows what will come next: packets laid out beforehand."""

    ahead: Callable[[], None] | None
    """Called in `poll` when something has come, before it is read."""

    def peek(self, expected: Expected) -> memoryview | None:
        """See what has come, from `gap` on, if it is this packet and nothing else. It is read afterwards in any case,
        and the view holds until then. Only within `ahead`."""

    def packet_head(self, topic: str, payload_bytes: int) -> bytes:
        """What stands before the payload of a message at QoS 0 on this connection. Raises NotConnected."""

    def put(self, pieces: Sequence[Buffer], packet_bytes: int, payload_bytes: int) -> None:
        """Send a whole packet that begins with a head of this connection. Raises NotConnected."""
