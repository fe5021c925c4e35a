"""Long work off the event loop that does not hold up the end of the process.

The threads of asyncio.to_thread are waited for when the loop ends and again when the interpreter does: right for a file
to be written, wrong for minutes of arithmetic after Ctrl-C. The threads here die with the process, so what they do must
leave nothing that is taken for whole (models.cache.write_atomic).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """Run `work` in a thread of its own; the future gets its result or what it raised."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:  # noqa: BLE001 - whoever awaits the future gets it
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
