"""Answers of the HTTP door as lines of JSON, and errors of handlers as answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from coordinator.replies import error_body, error_reply
from wire.errors import EdgelamError

LOG = logging.getLogger("edgelam.api")


def defect(error: Exception) -> EdgelamError:
    """What a caller is told of an error that nobody foresaw; the log has the rest."""
    return EdgelamError(f"the coordinator failed: {type(error).__name__}: {error}", try_="see the coordinator's log")


def guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except EdgelamError as error:
            return error_reply(error)

    return run


class Lines(StreamingResponse):
    """Events as NDJSON; an error becomes the last line. A client that goes away closes the events at once: what they
    hold (a turn, a request at the stages) must not wait for the garbage collector."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        self._events = events
        super().__init__(self._encoded(), media_type="application/x-ndjson")

    async def _encoded(self) -> AsyncGenerator[bytes, None]:
        try:
            async for event in self._events:
                yield msgspec.json.encode(event) + b"\n"
        except EdgelamError as error:
            yield msgspec.json.encode(error_body(error)) + b"\n"
        except Exception as error:
            LOG.exception("an error that was not foreseen")
            yield msgspec.json.encode(error_body(defect(error))) + b"\n"

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        finally:
            await self._events.aclose()


async def with_progress(
    work: Callable[[Callable[[str], None]], Awaitable[dict[str, Any]]],
) -> AsyncGenerator[dict[str, Any], None]:
    """Run `work(progress)`; yield its status lines while it runs and its result at the end."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def progress(text: str) -> None:
        loop.call_soon_threadsafe(queue.put_nowait, {"event": "status", "text": text})

    async def run() -> dict[str, Any]:
        try:
            return await work(progress)
        finally:
            loop.call_soon(queue.put_nowait, None)

    task = asyncio.ensure_future(run())
    try:
        while (event := await queue.get()) is not None:
            yield event
        yield await task
    finally:
        task.cancel()
