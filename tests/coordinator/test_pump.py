"""Answers that wait for a client that does not read: how many, how long, and what it finds when it comes back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.lines import Lines
from coordinator.pump import MOST_UNREAD, Pump, end_stalled, pumped
from wire.errors import Refused


def test_what_waits_for_a_client_has_an_end_and_the_reason_stands_behind_it() -> None:
    taken: list[int] = []
    closed: list[bool] = []

    async def items() -> AsyncGenerator[int, None]:
        try:
            for number in range(10 * MOST_UNREAD):
                taken.append(number)
                yield number
                await asyncio.sleep(0)
        finally:
            closed.append(True)

    async def play() -> None:
        pump = Pump(items())
        while not closed:
            await asyncio.sleep(0.01)
        assert len(taken) == len(pump) == MOST_UNREAD
        assert [await pump.next(1.0) for _ in range(MOST_UNREAD)] == list(range(MOST_UNREAD))
        with pytest.raises(Refused, match=f"{MOST_UNREAD} events unread"):
            await pump.next(1.0)

    asyncio.run(asyncio.wait_for(play(), 20.0))


def test_who_keeps_up_may_read_any_number() -> None:
    async def items() -> AsyncGenerator[int, None]:
        for number in range(100):
            yield number
            await asyncio.sleep(0)

    async def play() -> None:
        pump = Pump(items(), most_unread=8)
        found = []
        while not pump.over:
            found.append(await pump.next(1.0))
        assert [number for number in found if number is not None] == list(range(100))

    asyncio.run(asyncio.wait_for(play(), 5.0))


class Served:
    """A door with one endless answer; `ended` is set when the work behind it ends."""

    def __init__(self, stalled_s: float) -> None:
        self.ended = asyncio.Event()
        self.door = socket.create_server(("127.0.0.1", 0))
        end_stalled(self.door, stalled_s)
        app = Starlette(routes=[Route("/", self._answer)])
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))

    async def _answer(self, _request: Request) -> Response:
        return Lines(pumped(self._events()))

    async def _events(self) -> AsyncGenerator[dict[str, Any], None]:
        try:
            while True:
                yield {"event": "token", "text": "x" * 50_000}
                await asyncio.sleep(0.02)
        finally:
            self.ended.set()


Read = Callable[[], Awaitable[bytes]]


@contextlib.asynccontextmanager
async def serving(stalled_s: float) -> AsyncGenerator[tuple[Served, Read], None]:
    """A door, and what reads some more of it for a client that has asked, with a small buffer of its own."""
    served, loop = Served(stalled_s), asyncio.get_running_loop()
    running = asyncio.ensure_future(served.server.serve(sockets=[served.door]))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.setblocking(False)
        await loop.sock_connect(client, served.door.getsockname())
        await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        yield served, lambda: loop.sock_recv(client, 50_000)
    served.server.should_exit = True
    await running


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limit is Linux's")
def test_a_client_that_takes_nothing_for_so_long_is_ended() -> None:
    async def play() -> float:
        async with serving(1.0) as (served, read):
            await read()
            began_s = time.monotonic()
            await asyncio.wait_for(served.ended.wait(), 20.0)
            return time.monotonic() - began_s

    assert asyncio.run(play()) >= 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limit is Linux's")
def test_a_client_that_reads_slowly_is_not_ended() -> None:
    async def play() -> bool:
        async with serving(1.0) as (served, read):
            for _ in range(30):
                assert await read()
                await asyncio.sleep(0.1)
            return served.ended.is_set()

    assert not asyncio.run(play())
