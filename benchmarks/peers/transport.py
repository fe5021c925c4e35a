"""The other processes of the transport benchmark: an MQTT echo, a TCP echo and a TCP relay.

    python -m benchmarks.peers.transport mqtt-echo URL TOPIC REPLY_TOPIC CHUNK_BYTES
    python -m benchmarks.peers.transport tcp-echo
    python -m benchmarks.peers.transport tcp-relay HOST:PORT

Each prints one line when it is ready (the TCP ones their port) and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import threading

import numpy as np

from wire.channel import Inbox, Outbox
from wire.frames import Kind, Parcel, Tensor
from wire.mqtt import MqttTransport
from wire.transport import Link

LENGTH = struct.Struct("<I")
RELAY_BYTES = 262_144

WHOLE, RECEIPT = 0, 1
"""`position` of a request: send the tensor back, or only say that it arrived."""


def mqtt_echo(url: str, topic: str, reply_topic: str, chunk_bytes: str) -> None:
    transport = MqttTransport(url, f"echo-{os.getpid()}", keepalive_s=30)
    transport.start()
    while transport.link is not Link.UP:
        transport.poll(0.05)
    inbox = Inbox(transport, topic)
    outbox = Outbox(transport, reply_topic, chunk_bytes=int(chunk_bytes))
    transport.poll(0.1)
    print("ready", flush=True)
    receipt = Tensor.of(np.zeros(1, np.int32))
    while True:
        transport.poll(0.5)
        outbox.tick()
        while (delivery := inbox.take()) is not None:
            asked = delivery.parcel
            tensor = asked.tensor if asked.position == WHOLE else receipt
            outbox.send(Parcel(Kind.PROBE, request=asked.request, tensor=tensor))
            inbox.done(delivery)


def read_exactly(connection: socket.socket, buffer: memoryview) -> None:
    """Fill `buffer`; raise ConnectionError at the end of the stream."""
    while len(buffer):
        count = connection.recv_into(buffer)
        if count == 0:
            raise ConnectionError("the stream ended")
        buffer = buffer[count:]


def tcp_echo() -> None:
    """Read whole messages, each with its length in front, and send them back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(LENGTH.size + (1 << 23))
    while True:
        read_exactly(connection, memoryview(buffer)[: LENGTH.size])
        (length,) = LENGTH.unpack_from(buffer)
        read_exactly(connection, memoryview(buffer)[LENGTH.size : LENGTH.size + length])
        connection.sendall(memoryview(buffer)[: LENGTH.size + length])


def tcp_relay(upstream: str) -> None:
    """Pass bytes on as they come, both ways, a thread for each."""
    host, _, port = upstream.rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        near, _ = listener.accept()
    far = socket.create_connection((host, int(port)))
    for connection in (near, far):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def pass_on(source: socket.socket, target: socket.socket) -> None:
        buffer = memoryview(bytearray(RELAY_BYTES))
        while count := source.recv_into(buffer):
            target.sendall(buffer[:count])

    threading.Thread(target=pass_on, args=(far, near), daemon=True).start()
    pass_on(near, far)


def main() -> None:
    def end_with_input() -> None:
        sys.stdin.read()
        os._exit(0)

    threading.Thread(target=end_with_input, daemon=True).start()
    with contextlib.suppress(ConnectionError):  # the benchmark is over
        {"mqtt-echo": mqtt_echo, "tcp-echo": tcp_echo, "tcp-relay": tcp_relay}[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
