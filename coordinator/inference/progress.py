"""Work that says how far it is, as a stream of events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from wire.errors import Unreachable

T = TypeVar("T")


class OutOfTime(Unreachable):
    """Work lasted too long; what kept it may be known from an earlier try."""


def _into(statuses: asyncio.Queue[str]) -> Callable[[str], None]:
    """Give a function that puts texts into the queue, from any thread."""
    loop = asyncio.get_running_loop()

    def say(text: str) -> None:
        loop.call_soon_threadsafe(statuses.put_nowait, text)

    return say


async def with_status(
    work: Callable[[Callable[[str], None]], Awaitable[T]], result: list[T], until_s: float | None = None
) -> AsyncGenerator[dict[str, Any], None]:
    """Run `work(say)`; yield its status events while it runs, and put what it gives into `result`. Raises OutOfTime
    when it lasts beyond `until_s` (monotonic)."""
    statuses: asyncio.Queue[str] = asyncio.Queue()
    working = asyncio.ensure_future(work(_into(statuses)))
    try:
        while not working.done() or not statuses.empty():
            if until_s is not None and time.monotonic() >= until_s:
                raise OutOfTime("no deployment became ready in time", try_="edgelam devices")
            text = await _either(statuses, working, until_s)
            if text is not None:
                yield {"event": "status", "text": text}
        result.append(working.result())
    finally:
        working.cancel()


async def _either(statuses: asyncio.Queue[str], working: asyncio.Future[Any], until_s: float | None) -> str | None:
    """The next status, or None when the future is done first, or time is over."""
    getting = asyncio.ensure_future(statuses.get())
    left_s = None if until_s is None else max(0.0, until_s - time.monotonic())
    try:
        await asyncio.wait({getting, working}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        return getting.result() if getting.done() else None
    finally:
        getting.cancel()
