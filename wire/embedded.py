"""The embedded broker: amqtt in a process of its own, for machines without mosquitto. `python -m wire.embedded FILE`.

MQTT 3.1.1 only, and slow: see `wire.broker.EMBEDDED_COST`. FILE is JSON: {"host", "port", "users"}; users maps names to
[salt, scrypt hash] in hexadecimal, and none means that everyone may connect. Ends on SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from amqtt.broker import Broker
from amqtt.errors import MQTTError
from amqtt.mqtt.connect import ConnectPacket, ConnectVariableHeader
from amqtt.plugins.base import BaseAuthPlugin

from wire.addresses import host_port_text

MQTT_311: Final = 4
"""Protocol level in CONNECT."""


def password_hash(password: str, salt: bytes) -> bytes:
    """scrypt (RFC 7914) with its recommended interactive cost: 16 MB, some tens of milliseconds."""
    return hashlib.scrypt(password.encode(), salt=salt, n=2**14, r=8, p=1)


class OnlyThree(ConnectVariableHeader):  # type: ignore[misc]
    """Ends the connection of a client that speaks another version than 3.1.1, before more is read.

    amqtt takes the properties of an MQTT 5 CONNECT for the length of a name and waits for bytes that never come.
    """

    @classmethod
    async def from_stream(cls, reader: Any, fixed_header: Any) -> Any:
        header = await super().from_stream(reader, fixed_header)
        if header.proto_level != MQTT_311:
            raise MQTTError(f"MQTT protocol level {header.proto_level} is not spoken here")
        return header


class PasswordPlugin(BaseAuthPlugin):  # type: ignore[misc]
    """Lets in who gives one of the passwords. amqtt's own plugin reads another format in each of its versions."""

    @dataclass
    class Config:
        users: dict[str, list[str]] = field(default_factory=dict)

    async def authenticate(self, *, session: Any) -> bool:
        known = self.config.users.get(session.username or "")
        if known is None:
            return False
        salt, expected = (bytes.fromhex(part) for part in known)
        given = await asyncio.to_thread(password_hash, session.password or "", salt)
        return hmac.compare_digest(given, expected)


class Subscriptions(dict[str, Any]):
    """Filters with their subscribers, gone through as they are at that moment.

    amqtt waits in the middle of going through them: for each message, and for each client that connects. If another
    client subscribes meanwhile, a plain dictionary raises, and the message, or the new connection, is lost.
    """

    def __iter__(self) -> Iterator[str]:
        return iter(list(super().keys()))

    def items(self) -> Any:
        return [(topic_filter, list(subscribers)) for topic_filter, subscribers in super().items()]


async def serve(host: str, port: int, users: dict[str, list[str]]) -> None:
    """Run the broker until SIGTERM or SIGINT."""
    plugins: dict[str, Any] = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    if users:
        plugins = {"wire.embedded.PasswordPlugin": {"users": users}}
    bind = host_port_text(host, port)
    ConnectPacket.VARIABLE_HEADER = OnlyThree
    broker = Broker({"listeners": {"default": {"type": "tcp", "bind": bind}}, "plugins": plugins})
    broker._subscriptions = Subscriptions(broker._subscriptions)
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    await broker.start()
    await ended.wait()
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(broker.shutdown(), timeout=2)


def main() -> int:
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(message)s")
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    asyncio.run(serve(given["host"], given["port"], given["users"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
