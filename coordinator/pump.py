"""An answer on its way from the stages to a client that reads at its own pace.

Who reads slowly, or not at all, must not keep a turn at the stages, which others wait for. So items are taken as they
come and wait here, MOST_UNREAD of them: then the work behind them is ended, and the error waits as the last item, for a
client that reads again. A socket's own buffers come on top, and uvicorn fills them no further than its high-water mark.
A connection that takes nothing for STALLED_S is ended, with all that waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, Generic, TypeVar

from wire.errors import EdgelamError, Refused

LOG = logging.getLogger("edgelam.api")

T = TypeVar("T")

LOOK_AGAIN_S: Final = 60.0

MOST_UNREAD: Final = 4096
"""Items that wait for one client: about 300 bytes each, so 1.2 MB. docs/http.md states it."""

STALLED_S: Final = 600.0
"""Somebody who looks at a page of the answer in a pager comes back earlier. docs/http.md states it."""


def end_stalled(door: socket.socket, after_s: float = STALLED_S) -> None:
    """Have connections that this listening socket accepts end when bytes wait for a client that takes none of them for
    so long. The kernel's own limit (RFC 5482, on Linux): it knows what is read, a program only what it has written."""
    if sys.platform == "linux":
        door.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * after_s))


class Pump(Generic[T]):
    """Takes `items` in a task of its own from the moment it is made; whoever made it closes it."""

    def __init__(self, items: AsyncGenerator[T, None], most_unread: int = MOST_UNREAD) -> None:
        self._most_unread = most_unread
        self._queue: asyncio.Queue[T] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._error: EdgelamError | None = None
        self._taking = asyncio.ensure_future(self._take(items))

    def __len__(self) -> int:
        """Items that wait to be read."""
        return self._queue.qsize()

    @property
    def over(self) -> bool:
        """Whether everything was taken and read."""
        return self._taking.done() and self._queue.empty()

    async def next(self, patience_s: float) -> T | None:
        """The next item; None if there is none for so long, or at the end (`over`). An error is raised where it came,
        behind the items before it."""
        if self._queue.empty() and not self._taking.done():
            self._changed.clear()
            await self._bell(patience_s)
        if not self._queue.empty():
            return self._queue.get_nowait()
        if self._error is not None and self._taking.done():
            raise self._error
        return None

    async def close(self) -> None:
        """End the work behind it at once, if it is not over."""
        self._taking.cancel()
        await asyncio.wait({self._taking})

    async def _bell(self, patience_s: float) -> None:
        """Wait until something has changed, or for so long (coordinator.changes says why without wait_for)."""
        timer = asyncio.get_running_loop().call_later(patience_s, self._changed.set)
        try:
            await self._changed.wait()
        finally:
            timer.cancel()

    async def _take(self, items: AsyncGenerator[T, None]) -> None:
        try:
            async with aclosing(items):
                async for item in items:
                    self._queue.put_nowait(item)
                    self._changed.set()
                    if len(self) >= self._most_unread:
                        raise Refused(
                            f"the answer was ended here: its client had left {len(self)} events unread",
                            try_="read as the answer comes, or ask for less at once (max_tokens)",
                        )
        except EdgelamError as error:
            self._error = error
        except Exception as error:
            LOG.exception("an error that was not foreseen")
            words = f"the coordinator failed: {type(error).__name__}: {error}"
            self._error = EdgelamError(words, try_="see the coordinator's log")
        finally:
            # The task is done a moment later: who waits is woken then.
            asyncio.get_running_loop().call_soon(self._changed.set)


async def pumped(items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same items, taken as they come from the moment the first one is asked for."""
    pump = Pump(items)
    try:
        while True:
            item = await pump.next(LOOK_AGAIN_S)
            if item is not None:
                yield item
            elif pump.over:
                return
    finally:
        await pump.close()
