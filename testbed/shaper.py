"""A link in user space: TCP forwards that share one board's rate, delay and jitter, and can be stalled or cut.

Needs neither root nor kernel support. Bytes, not packets, are delayed: nothing is lost or reordered, and TCP's own
congestion control never sees the link. What is kept: serialisation time, latency, sharing, back-pressure.

Each direction of a link has a virtual clock, `busy_until`: the time at which the bytes accepted so far have left the
sender's interface. A chunk of n bytes that arrives at t has left at max(t, busy_until) + n / rate and is delivered
`delay + jitter` later. Forwards take turns, a small quantum each, so a short message waits for nobody's megabyte.
When QUEUE_S of bytes wait, nothing more is read: the sender feels the back-pressure through TCP, as it would from its
own interface's queue.

`python -m testbed.shaper --help` is the same as a program of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import selectors
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from testbed.links import Address, LinkSpec, checked_link
from wire.errors import Refused, Unreachable, UsageError

QUEUE_S: Final = 0.05
"""What may wait in front of a link: the depth a plain token bucket filter is usually given."""

QUANTUM_S: Final = 0.002
"""Link time one turn may take: at 20 Mbit/s 5 KB. A short message waits at most so long for each rival forward."""

MIN_QUANTUM_BYTES: Final = 1_448
"""One TCP segment in an Ethernet frame."""

MAX_QUANTUM_BYTES: Final = 262_144
"""Read at a time from an unlimited link: a gigabyte per second at 4,000 turns per second."""

MAX_PIPE_BYTES: Final = 64 * 1024 * 1024
"""Bytes in flight in one direction of one connection, however long and fat the link."""

UNLIMITED_PIPE_BYTES: Final = 4 * 1024 * 1024
"""The same for a link without a rate: enough for 800 MB/s over 5 ms."""

MAX_DESCRIPTOR: Final = 1_000
"""`select` stops at 1024. It is used because its timeout is exact to the microsecond; epoll's rounds up to 1 ms."""

DIAL_TIMEOUT_S: Final = 10.0
ACCEPT_PAUSE_S: Final = 0.1

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)
"""struct linger: close sends RST."""


def new_event_loop() -> asyncio.AbstractEventLoop:
    """The loop a shaper needs: timers exact to about 0.1 ms instead of 1 to 2 ms."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Direction:
    """One direction of a link, shared by all of its forwards."""

    def __init__(self) -> None:
        self.bytes_carried = 0
        self._busy_until_s = 0.0
        self._turn = asyncio.Lock()

    async def enter(self, count: int, rate_bytes_per_s: float | None, now: Callable[[], float]) -> float:
        """Wait for a turn and for room in the queue; give the time at which `count` bytes will have left."""
        async with self._turn:
            while (ahead_s := self._busy_until_s - now() - QUEUE_S) > 0:
                await asyncio.sleep(ahead_s)
            self.bytes_carried += count
            takes_s = 0.0 if rate_bytes_per_s is None else count / rate_bytes_per_s
            self._busy_until_s = max(self._busy_until_s, now()) + takes_s
            return self._busy_until_s

    def forget_queue(self) -> None:
        """What waited is gone or was counted at another rate: the link is free from now on."""
        self._busy_until_s = 0.0


class BoardLink:
    """One board's link: a spec that may change at any time, two directions, and the connections that use it."""

    def __init__(self, name: str, spec: LinkSpec, seed: int = 0) -> None:
        self.name = name
        self.up = Direction()
        self.down = Direction()
        self.refusing = False
        self._spec = checked_link(spec)
        self._random = random.Random(f"{seed}/{name}")
        self._passing = asyncio.Event()
        self._passing.set()
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def spec(self) -> LinkSpec:
        return self._spec

    @property
    def connections(self) -> int:
        return len(self._connections)

    @property
    def stalled(self) -> bool:
        return not self._passing.is_set()

    @property
    def quantum_bytes(self) -> int:
        rate = self._spec.rate_bytes_per_s
        if rate is None:
            return MAX_QUANTUM_BYTES
        return int(min(max(rate * QUANTUM_S, MIN_QUANTUM_BYTES), MAX_QUANTUM_BYTES))

    @property
    def pipe_bytes(self) -> int:
        """How much one direction of one connection may hold: what the link itself holds, and two quanta."""
        spec = self._spec
        if spec.rate_bytes_per_s is None:
            return UNLIMITED_PIPE_BYTES
        held = spec.rate_bytes_per_s * (QUEUE_S + spec.delay_s + spec.jitter_s)
        return int(min(held, MAX_PIPE_BYTES)) + 2 * self.quantum_bytes

    def change(self, spec: LinkSpec) -> None:
        """Use another spec from now on; bytes already on their way keep the time they were given."""
        self._spec = checked_link(spec)
        self.up.forget_queue()
        self.down.forget_queue()

    def stall(self) -> None:
        """Pull the cable: nothing passes and nobody is told. New connections are taken but not served."""
        self._passing.clear()

    def cut(self) -> None:
        """Reset all connections, and every new one at once, until `resume`."""
        self.refusing = True
        self.reset()

    def resume(self) -> None:
        """Undo `stall` and `cut`. What waited goes on."""
        self.refusing = False
        self._passing.set()

    def reset(self) -> None:
        """Reset all connections; new ones work."""
        for task in self._connections:
            task.cancel()

    async def passing(self) -> None:
        """Return as soon as the link is not stalled."""
        await self._passing.wait()

    def one_way_s(self) -> float:
        """Draw the time that one chunk is under way."""
        return self._spec.delay_s + (self._random.uniform(0, self._spec.jitter_s) if self._spec.jitter_s else 0.0)

    def adopt(self, near: socket.socket, upstream: Address, inward: bool = False) -> None:
        """Carry a new connection, as one of this link's, until it ends. `inward`: it was opened towards the board."""
        task = asyncio.ensure_future(_carry(self, near, upstream, inward))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        task.add_done_callback(lambda _: near.close())  # a task that is cancelled before its first step closes nothing

    async def close(self) -> None:
        self.reset()
        if self._connections:
            await asyncio.wait(self._connections)


class _Pipe:
    """One direction of one connection: chunks with the time at which each is due, in order."""

    def __init__(self, link: BoardLink, direction: Direction, source: socket.socket, target: socket.socket) -> None:
        self._link = link
        self._direction = direction
        self._source = source
        self._target = target
        self._chunks: deque[tuple[float, bytes | OSError]] = deque()
        self._held_bytes = 0
        self._last_due_s = 0.0
        self._filled = asyncio.Event()
        self._drained = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def take(self) -> None:
        """Read until the end and enter each chunk into the link; the end, or a reset, travels like a chunk."""
        while True:
            chunk: bytes | OSError
            try:
                chunk = await self._loop.sock_recv(self._source, self._link.quantum_bytes)
            except OSError as error:
                chunk = error
            count = len(chunk) if isinstance(chunk, bytes) else 0
            await self._link.passing()
            left_s = await self._direction.enter(count, self._link.spec.rate_bytes_per_s, self._loop.time)
            self._last_due_s = max(self._last_due_s, left_s + self._link.one_way_s())
            self._chunks.append((self._last_due_s, chunk))
            self._held_bytes += count
            self._filled.set()
            if count == 0:
                return
            while self._held_bytes > self._link.pipe_bytes:
                self._drained.clear()
                await self._drained.wait()

    async def give(self) -> None:
        """Deliver each chunk when it is due; raise what `take` met, ConnectionError included."""
        while True:
            while not self._chunks:
                self._filled.clear()
                await self._filled.wait()
            due_s, chunk = self._chunks[0]
            wait_s = due_s - self._loop.time()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            await self._link.passing()
            self._chunks.popleft()
            if isinstance(chunk, OSError):
                raise chunk
            if not chunk:
                self._target.shutdown(socket.SHUT_WR)
                return
            await self._loop.sock_sendall(self._target, chunk)
            self._held_bytes -= len(chunk)
            self._drained.set()


async def _carry(link: BoardLink, near: socket.socket, upstream: Address, inward: bool) -> None:
    """Serve one connection until both ends have closed, or reset it on both sides."""
    far: socket.socket | None = None
    tasks: list[asyncio.Task[None]] = []
    in_order = False
    try:
        far = await _dial(link, upstream)
        there, back = (link.down, link.up) if inward else (link.up, link.down)
        to, fro = _Pipe(link, there, near, far), _Pipe(link, back, far, near)
        tasks = [asyncio.ensure_future(step) for step in (to.take(), to.give(), fro.take(), fro.give())]
        await asyncio.gather(*tasks)
        in_order = True
    except (OSError, asyncio.TimeoutError):
        in_order = False  # one end reset, vanished or never answered: the other end gets a reset
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for end in (near, far):
            if end is not None:
                if not in_order:
                    with contextlib.suppress(OSError):
                        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                end.close()


async def _dial(link: BoardLink, upstream: Address) -> socket.socket:
    """Connect to the upstream; the handshake crosses the link once each way, as SYN and SYN-ACK do."""
    loop = asyncio.get_running_loop()
    await link.passing()
    await asyncio.sleep(link.one_way_s())
    far = socket.socket(socket.AF_INET6 if ":" in upstream.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        _prepare(far)
        await asyncio.wait_for(loop.sock_connect(far, tuple(upstream)), DIAL_TIMEOUT_S)
        await asyncio.sleep(link.one_way_s())
    except BaseException:
        far.close()
        raise
    return far


def _prepare(end: socket.socket) -> None:
    if end.fileno() >= MAX_DESCRIPTOR:
        raise OSError(f"the shaper holds more than {MAX_DESCRIPTOR} descriptors")
    end.setblocking(False)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class LinkStats(Struct, frozen=True, kw_only=True):
    link: str
    up_bytes: int
    down_bytes: int
    connections: int
    stalled: bool
    cut: bool


class Shaper:
    """All links of one process, by name. Every method must be called in the loop's thread."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._links: dict[str, BoardLink] = {}
        self._listeners: dict[tuple[str, str], tuple[socket.socket, asyncio.Task[None]]] = {}

    def add_link(self, name: str, spec: LinkSpec) -> BoardLink:
        """Make a link; raise UsageError if there is one of that name."""
        if name in self._links:
            raise UsageError(f"there is a link {name!r} already")
        link = self._links[name] = BoardLink(name, spec, self._seed)
        return link

    def link(self, name: str) -> BoardLink:
        """Give a link; raise Refused naming those there are."""
        if name not in self._links:
            raise Refused(f"no shaped link {name!r}", try_=f"one of: {', '.join(self._links) or 'none at all'}")
        return self._links[name]

    async def add_forward(
        self, link_name: str, name: str, listen: Address, upstream: Address, *, inward: bool = False
    ) -> Address:
        """Listen on `listen` (port 0: any) and carry each connection over the link to `upstream`; give the address.
        `inward`: the board is the one that is reached, not the one that reaches out.

        Raises UsageError for an address that can't be listened on or a name that doesn't resolve, Refused for a link
        that doesn't exist.
        """
        link = self.link(link_name)
        if (link_name, name) in self._listeners:
            raise UsageError(f"link {link_name!r} has a forward {name!r} already")
        resolved = await _resolved(upstream)
        listener = _listener(listen)
        task = asyncio.ensure_future(self._accept(link, listener, resolved, inward))
        self._listeners[link_name, name] = (listener, task)
        host, port, *_ = listener.getsockname()
        return Address(host, port)

    async def _accept(self, link: BoardLink, listener: socket.socket, upstream: Address, inward: bool) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                near, _ = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_S)  # out of descriptors, or the client left; others wait meanwhile
                continue
            try:
                if link.refusing:
                    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                    near.close()
                    continue
                _prepare(near)
            except OSError:
                near.close()  # gone before we looked, or one too many
                continue
            link.adopt(near, upstream, inward)

    def stats(self) -> tuple[LinkStats, ...]:
        return tuple(
            LinkStats(
                link=name,
                up_bytes=link.up.bytes_carried,
                down_bytes=link.down.bytes_carried,
                connections=link.connections,
                stalled=link.stalled,
                cut=link.refusing,
            )
            for name, link in self._links.items()
        )

    async def close(self) -> None:
        """Stop listening and reset what is open. Idempotent."""
        tasks = [task for _, task in self._listeners.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener, _ in self._listeners.values():
            listener.close()
        self._listeners.clear()
        for link in self._links.values():
            await link.close()


def _listener(listen: Address) -> socket.socket:
    """A listening socket; raise UsageError if the address can't be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in listen.host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(tuple(listen))
        listener.listen(64)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise UsageError(f"can't listen on {listen.text()}: {error.strerror}", try_="port 0 takes a free one") from None
    return listener


async def _resolved(upstream: Address) -> Address:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(upstream.host, upstream.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"no address for upstream {upstream.text()}: {error}", try_="give an IP address") from None
    family_order = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    host, port, *_ = family_order[0][4]
    return Address(str(host), int(port))


def main() -> int:
    from testbed.shaper_cli import run  # the program needs this module, not the other way round

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
