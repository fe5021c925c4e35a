"""What a hop costs: tensors through transport and broker, beside a raw TCP relay in the same run.

    python -m benchmarks.transport [--quick] [--skip-embedded]

Round trips: this process publishes a tensor into an inbox, an echo in another process sends it back; everything is in
use: frames, checksums, chunks, credit. The control is the same bytes over TCP through a relay process to an echo
process. Samples of all ways are interleaved, medians are compared. Shaped: one way and a receipt, sender and receiver
each behind a link of their own that is limited in rate (testbed.shaper); the control is bytes / bandwidth.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.peers.transport import LENGTH, RECEIPT, WHOLE, read_exactly
from benchmarks.report import Figure, at_most, emit, machine
from wire.broker import Broker, EmbeddedBroker, start_broker
from wire.channel import Inbox, Outbox
from wire.frames import Kind, Parcel, Tensor
from wire.limits import CHUNK_BYTES_DEFAULT
from wire.mqtt import MqttTransport
from wire.topics import INBOX
from wire.transport import Link
from wire.units import bytes_text

SIZES = {1024: 300, 65_536: 120, 1 << 20: 30, 4 << 20: 12}
"""Payload bytes -> samples."""

SHAPED_BYTES = 1 << 20
RATES_MBIT = (100.0, 20.0)
WARM_UP = 5
ROUND_TRIP_LIMIT = 5.0
SHAPED_LIMIT = 1.3
TIMEOUT_S = 60.0


@contextlib.contextmanager
def peer(*arguments: str, module: str = "benchmarks.peers.transport") -> Iterator[str]:
    """Run a peer process; give the line it prints when it is ready. It ends with this context."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        if not line:
            raise SystemExit(f"{module} {' '.join(arguments)} did not start")
        yield line
    finally:
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class Tcp:
    """Length and bytes there and back over one connection."""

    def __init__(self, port: int) -> None:
        self._connection = socket.create_connection(("127.0.0.1", port))
        self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray(1 << 23)

    def round_trip(self, payload: np.ndarray) -> None:
        self._connection.sendall(LENGTH.pack(payload.nbytes) + payload.tobytes())
        read_exactly(self._connection, memoryview(self._buffer)[: LENGTH.size + payload.nbytes])

    def close(self) -> None:
        self._connection.close()


class Hop:
    """A tensor into an inbox and what comes back."""

    def __init__(self, url: str, deployment: str, chunk_bytes: int) -> None:
        self._transport = MqttTransport(url, f"bench-{deployment}-{os.getpid()}", keepalive_s=30)
        self._transport.start()
        while self._transport.link is not Link.UP:
            self._transport.poll(0.05)
        self._inbox = Inbox(self._transport, INBOX.on("bench", deployment, "back"))
        self._outbox = Outbox(self._transport, INBOX.on("bench", deployment, "to"), chunk_bytes=chunk_bytes)
        self._transport.poll(0.2)

    def round_trip(self, payload: np.ndarray, *, mode: int = WHOLE) -> None:
        until_s = time.monotonic() + TIMEOUT_S
        self._outbox.send(Parcel(Kind.PROBE, position=mode, tensor=Tensor.of(payload)))
        while (delivery := self._inbox.take()) is None:
            self._transport.poll(0.5)
            self._outbox.tick()
            if time.monotonic() > until_s:
                raise SystemExit(f"no answer for {payload.nbytes} bytes in {TIMEOUT_S} s")
        self._inbox.done(delivery)

    def one_way(self, payload: np.ndarray) -> None:
        self.round_trip(payload, mode=RECEIPT)

    def close(self) -> None:
        self._transport.close()


@contextlib.contextmanager
def hop(broker: Broker, deployment: str, rate_mbit: float | None = None) -> Iterator[Hop]:
    """Client and echo on one broker; with a rate, each behind a link of its own."""
    with contextlib.ExitStack() as stack:
        near = far = broker.url
        if rate_mbit is not None:
            near, far = (stack.enter_context(shaped(broker, rate_mbit)) for _ in range(2))
        to, back = INBOX.on("bench", deployment, "to"), INBOX.on("bench", deployment, "back")
        stack.enter_context(peer("mqtt-echo", far, to, back, str(CHUNK_BYTES_DEFAULT)))
        made = Hop(near, deployment, CHUNK_BYTES_DEFAULT)
        stack.callback(made.close)
        yield made


@contextlib.contextmanager
def shaped(broker: Broker, rate_mbit: float) -> Iterator[str]:
    """A link to the broker that is limited in rate; gives the URL to use."""
    upstream = broker.url.removeprefix("mqtt://")
    arguments = ("--listen", "127.0.0.1:0", "--upstream", upstream, "--rate-mbit", str(rate_mbit), "--control")
    with peer(*arguments, module="testbed.shaper") as line:
        yield f"mqtt://{json.loads(line)['result']['default']}"


def interleaved(
    ways: dict[str, tuple[Callable[[np.ndarray], None], int]], payload_bytes: int
) -> dict[str, list[float]]:
    """Time every way in turns; each may have a smaller number of samples. Gives seconds by way."""
    payload = np.random.default_rng(1).integers(0, 255, payload_bytes, np.uint8)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(WARM_UP + max(count for _, count in ways.values())):
        for name, (way, count) in ways.items():
            if number >= WARM_UP + count:
                continue
            began_s = time.perf_counter()
            way(payload)
            if number >= WARM_UP:
                taken[name].append(time.perf_counter() - began_s)
    return taken


def round_trips(broker: Broker, embedded: Broker | None, scale: float) -> list[Figure]:
    figures = []
    with contextlib.ExitStack() as stack:
        echo = stack.enter_context(peer("tcp-echo"))
        relay = Tcp(int(stack.enter_context(peer("tcp-relay", f"127.0.0.1:{echo}"))))
        stack.callback(relay.close)
        main_hop = stack.enter_context(hop(broker, "main"))
        slow_hop = stack.enter_context(hop(embedded, "embedded")) if embedded is not None else None
        for payload_bytes, samples in SIZES.items():
            count = max(3, round(samples * scale))
            ways = {"relay": (relay.round_trip, count), "hop": (main_hop.round_trip, count)}
            if slow_hop is not None:
                ways["embedded"] = (slow_hop.round_trip, max(3, count // 3))
            taken = interleaved(ways, payload_bytes)
            median = {name: statistics.median(values) for name, values in taken.items()}
            size = bytes_text(payload_bytes)
            figures.append(Figure(f"{size} round trip, TCP relay", median["relay"] * 1e3, "ms"))
            figures.append(Figure(f"{size} round trip, {broker.name}", median["hop"] * 1e3, "ms"))
            ratio, name = median["hop"] / median["relay"], f"{size} round trip, {broker.name} / relay"
            promised = payload_bytes == min(SIZES)
            figures.append(at_most(name, ratio, "", ROUND_TRIP_LIMIT) if promised else Figure(name, ratio, ""))
            if embedded is not None:
                figures.append(Figure(f"{size} round trip, {embedded.name}", median["embedded"] * 1e3, "ms"))
    return figures


def shaped_transfers(broker: Broker, scale: float) -> list[Figure]:
    figures = []
    for rate_mbit in RATES_MBIT:
        ideal_s = SHAPED_BYTES * 8 / (rate_mbit * 1e6)
        with hop(broker, f"shaped{rate_mbit:.0f}", rate_mbit) as made:
            taken = interleaved({"hop": (made.one_way, max(3, round(12 * scale)))}, SHAPED_BYTES)
        median_s = statistics.median(taken["hop"])
        name = f"{bytes_text(SHAPED_BYTES)} one way, both ends {rate_mbit:.0f} Mbit/s"
        figures.append(Figure(name, median_s * 1e3, "ms"))
        figures.append(at_most(f"{name}, / (bytes / bandwidth)", median_s / ideal_s, "", SHAPED_LIMIT))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="what a hop costs")
    parser.add_argument("--quick", action="store_true", help="a fifth of the samples")
    parser.add_argument("--skip-embedded", action="store_true", help="leave the embedded broker out")
    options = parser.parse_args()
    scale = 0.2 if options.quick else 1.0
    conditions = machine()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgelam-bench-")))
        broker = start_broker(directory / "main", "127.0.0.1", 0)
        stack.callback(broker.stop)
        embedded: Broker | None = None
        if not options.skip_embedded and not isinstance(broker, EmbeddedBroker):
            embedded = EmbeddedBroker(directory / "embedded", "127.0.0.1", 0)
            embedded.start()
            stack.callback(embedded.stop)
        conditions |= {"broker": broker.name, "because": broker.because, "chunk_bytes": CHUNK_BYTES_DEFAULT}
        figures = round_trips(broker, embedded, scale) + shaped_transfers(broker, scale)
    conditions |= {"load_1min_after": round(os.getloadavg()[0], 2), "statistic": "median"}
    return 0 if emit("transport", conditions, figures) else 1


if __name__ == "__main__":
    sys.exit(main())
