"""A network switch in user space, with rate, delay, jitter and loss for each port.

For kernels without sch_netem, which many small ones lack. Each host is a TAP device in a network namespace; this one
process reads every Ethernet frame and passes it on, learning addresses and flooding broadcast and multicast, so that
mDNS works. A frame crosses the link of its sender and then the link of its receiver: a ping from a host with 5 ms to
one with none takes 10 ms. Frames of one link keep their order, also under jitter. Segmentation offload is off: what
is lost is one true packet. That bounds it to some 300 Mbit/s on a slow core.

`Switch` decides and does no I/O. The program (`python -m testbed.switch`, started by testbed.namespaces as root) takes
its ports as JSON in its one argument, {"namespace": ..., "link": {...}} by name, and JSON lines on standard input:

    {"op": "set", "port": "pi5", "link": {"delay_s": 0.02}, "loss": 0.01}
    {"op": "plug", "port": "pi5", "up": false}

Each is answered with {"ok": true}. The end of input ends it.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import struct
import sys
import time
from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from testbed.links import LinkSpec
from testbed.shaper import QUEUE_S

MAX_ADDRESSES: Final = 4_096
"""Learned Ethernet addresses; the table is emptied when it is full, and learned again."""

MAX_WAITING: Final = 65_536
"""Frames under way at one time: 100 MB. More are dropped."""

MAX_FRAME_BYTES: Final = 2_048
FRAMES_PER_TURN: Final = 64
"""Frames taken from one port before the others get a turn."""

MAC_BYTES: Final = 6
_GROUP_BIT: Final = 1

_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_CLONE_NEWNET: Final = 0x40000000
"""<linux/if_tun.h>, <sched.h>"""


class PortSpec(Struct, frozen=True, kw_only=True):
    namespace: str
    link: LinkSpec = LinkSpec()


class SetPort(Struct, frozen=True, kw_only=True, tag_field="op", tag="set"):
    port: str
    link: LinkSpec
    loss: float = 0.0
    """Probability that a frame is lost, drawn once for each direction."""


class Plug(Struct, frozen=True, kw_only=True, tag_field="op", tag="plug"):
    port: str
    up: bool


class _Lane:
    """One direction of a link: when it is free, and when its last frame is due."""

    __slots__ = ("_busy_until_s", "_last_due_s")

    def __init__(self) -> None:
        self._busy_until_s = 0.0
        self._last_due_s = 0.0

    def enter(self, count: int, link: LinkSpec, now_s: float, chance: random.Random) -> float | None:
        """Give the time at which a frame of `count` bytes comes out, None if the queue is full."""
        left_s = now_s
        if link.rate_bytes_per_s is not None:
            starts_s = max(now_s, self._busy_until_s)
            if starts_s - now_s > QUEUE_S:
                return None
            left_s = self._busy_until_s = starts_s + count / link.rate_bytes_per_s
        wander_s = chance.uniform(0, link.jitter_s) if link.jitter_s else 0.0
        self._last_due_s = max(self._last_due_s, left_s + link.delay_s + wander_s)
        return self._last_due_s


class Port:
    def __init__(self, name: str, link: LinkSpec) -> None:
        self.name = name
        self.link = link
        self.loss = 0.0
        self.up = True
        self.sent = _Lane()
        self.received = _Lane()


class Delivery(NamedTuple):
    due_s: float
    port: int


class Switch:
    """Which ports a frame goes to, and when. Time is an argument, chance is seeded."""

    def __init__(self, links: Mapping[str, LinkSpec], seed: int = 0) -> None:
        self.ports = [Port(name, link) for name, link in links.items()]
        self._by_name = {port.name: port for port in self.ports}
        self._learned: dict[bytes, int] = {}
        self._chance = random.Random(seed)

    def change(self, command: SetPort | Plug) -> None:
        """Set a port; raise KeyError if there is none of that name."""
        port = self._by_name[command.port]
        if isinstance(command, Plug):
            port.up = command.up
        else:
            port.link, port.loss = command.link, command.loss

    def forward(self, source: int, frame: bytes, now_s: float) -> list[Delivery]:
        """Where a frame from port `source` goes; nothing if it is lost, dropped or malformed."""
        origin = self.ports[source]
        if len(frame) < 2 * MAC_BYTES + 2 or not origin.up:
            return []
        if len(self._learned) >= MAX_ADDRESSES:
            self._learned.clear()
        target, sender = frame[:MAC_BYTES], frame[MAC_BYTES : 2 * MAC_BYTES]
        self._learned[sender] = source
        at_switch_s = None if self._lost(origin) else origin.sent.enter(len(frame), origin.link, now_s, self._chance)
        if at_switch_s is None:
            return []
        known = None if target[0] & _GROUP_BIT else self._learned.get(target)
        deliveries = []
        for number in range(len(self.ports)) if known is None else (known,):
            port = self.ports[number]
            if number == source or not port.up or self._lost(port):
                continue
            due_s = port.received.enter(len(frame), port.link, at_switch_s, self._chance)
            if due_s is not None:
                deliveries.append(Delivery(due_s, number))
        return deliveries

    def _lost(self, port: Port) -> bool:
        return port.loss > 0 and self._chance.random() < port.loss


class _Program:
    """The switch at work: TAP devices, commands, and the frames that are under way."""

    def __init__(self, switch: Switch, taps: list[int]) -> None:
        self._switch = switch
        self._taps = taps
        self._numbers = {tap: number for number, tap in enumerate(taps)}
        self._waiting: list[tuple[float, int, int, bytes]] = []
        self._serial = 0
        self._input = b""

    def run(self) -> None:
        """Serve until the end of input. `select`, because its timeout is exact to the microsecond."""
        while True:
            pause_s = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            ready, _, _ = select.select([0, *self._taps], [], [], pause_s)
            for descriptor in ready:
                if descriptor != 0:
                    self._take(descriptor)
                elif not self._obey():
                    return
            self._deliver()

    def _take(self, tap: int) -> None:
        source = self._numbers[tap]
        for _ in range(FRAMES_PER_TURN):
            try:
                frame = os.read(tap, MAX_FRAME_BYTES)
            except BlockingIOError:
                return
            for due_s, port in self._switch.forward(source, frame, time.monotonic()):
                if len(self._waiting) < MAX_WAITING:
                    self._serial += 1  # equal times keep their order
                    heapq.heappush(self._waiting, (due_s, self._serial, port, frame))

    def _deliver(self) -> None:
        now_s = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now_s:
            _, _, port, frame = heapq.heappop(self._waiting)
            try:
                os.write(self._taps[port], frame)
            except OSError:
                continue  # the device is down or its queue is full: the frame is lost, as on a wire

    def _obey(self) -> bool:
        part = os.read(0, 65_536)
        *lines, self._input = (self._input + part).split(b"\n")
        for line in filter(None, lines):
            try:
                self._switch.change(msgspec.json.decode(line, type=SetPort | Plug))
                answer = b'{"ok": true}\n'
            except (msgspec.MsgspecError, KeyError) as error:
                answer = msgspec.json.encode({"ok": False, "error": str(error)}) + b"\n"
            os.write(1, answer)
        return bool(part)


def open_tap(namespace: str, name: str = "eth0") -> int:
    """Make a TAP device in a network namespace and give its descriptor. Needs root; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(descriptor: int) -> None:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), namespace)

    home = os.open("/proc/self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        enter(there)
        try:
            tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
        finally:
            enter(home)
    finally:
        os.close(there)
        os.close(home)
    return tap


def main() -> int:
    ports = msgspec.json.decode(sys.argv[1].encode(), type=dict[str, PortSpec])
    taps = [open_tap(port.namespace) for port in ports.values()]
    os.write(1, b'{"ok": true}\n')
    _Program(Switch({name: port.link for name, port in ports.items()}), taps).run()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
