"""paho's client as we use it: made for one attempt to connect, with a Lane for its socket, TCP_NODELAY set."""

from __future__ import annotations

import socket
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from paho.mqtt.client import MQTT_CLEAN_START_FIRST_ONLY
from paho.mqtt.client import Client as PahoClient
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from wire.addresses import DEFAULT_MQTT_PORT
from wire.errors import UsageError
from wire.lane import Lane
from wire.limits import MAX_PUBLISH_BYTES
from wire.transport import Will

DEFAULT_PORT: Final = 1883
"""What mqtt:// means where a URL names no port."""

CONNECT_TIMEOUT_S: Final = 3.0

MAX_INFLIGHT: Final = 20
"""QoS 1 messages without acknowledgement: the broker's own default, more would be queued there and may be dropped."""

MAX_PACKET_BYTES: Final = MAX_PUBLISH_BYTES + 4096
"""The largest packet that we announce to take: topic and properties stand around a payload."""


class Address(NamedTuple):
    host: str
    port: int


def parse_url(url: str) -> Address:
    """'mqtt://host:port' (port 1883 if left out) -> Address; raise UsageError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = urlsplit(""), None, None
    if parts.scheme != "mqtt" or not host or parts.path not in ("", "/") or parts.username is not None:
        raise UsageError(
            f"broker {url!r} is no address of a broker",
            try_=f"mqtt://HOST:PORT, as in mqtt://10.0.0.5:{DEFAULT_MQTT_PORT}",
        )
    return Address(host, DEFAULT_PORT if port is None else port)


class Session(NamedTuple):
    """Who we are to a broker, at every attempt."""

    client_id: str
    keepalive_s: int
    will: Will | None
    username: str
    password: str


class Client(PahoClient):
    """One connection, or the attempt to make it. Callbacks are the owner's to set."""

    lane: Lane | None = None
    """None while there is no socket."""

    def __init__(self, session: Session, five: bool) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=session.client_id,
            clean_session=None if five else True,
            protocol=MQTTProtocolVersion.MQTTv5 if five else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        self._session_keepalive_s = session.keepalive_s
        self._five = five
        self.connect_timeout = CONNECT_TIMEOUT_S
        self.max_inflight_messages_set(MAX_INFLIGHT)
        if session.username:
            self.username_pw_set(session.username, session.password)
        if session.will is not None:
            self.will_set(session.will.topic, session.will.payload, qos=1, retain=True)
        self.on_socket_close = _forget_lane

    @property
    def unsent(self) -> bool:
        """Something waits for the socket."""
        return self.lane is not None and (bool(self.lane.unsent) or self.want_write())

    def dial(self, address: Address) -> None:
        """Resolve, connect and send CONNECT: may block for seconds. Raises OSError or ValueError."""
        start: Any = MQTT_CLEAN_START_FIRST_ONLY
        properties = None
        if self._five:
            start = True
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.MaximumPacketSize = MAX_PACKET_BYTES
        self.connect(*address, self._session_keepalive_s, clean_start=start, properties=properties)

    def hang_up(self) -> None:
        """Close the socket of a connection that is given up."""
        if self.lane is not None:
            self.lane.close()

    def _create_socket(self) -> Any:
        """Runs in paho at every connect."""
        connection: Any = super()._create_socket()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.lane = Lane(connection, five=self._five, most_bytes=MAX_PACKET_BYTES)
        return self.lane


def _forget_lane(client: PahoClient, _data: object, _connection: object) -> None:
    if isinstance(client, Client):
        client.lane = None
