"""A file as an answer, whose bytes are counted as they go out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from starlette.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send


class Handed(FileResponse):
    """`count` is called with the bytes of each piece that was sent."""

    def __init__(self, path: Path, digest: str, count: Callable[[int], None]) -> None:
        super().__init__(path, media_type="application/octet-stream", headers={"ETag": f'"{digest}"'})
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            await send(message)
            self._count(len(message.get("body", b"")))

        await super().__call__(scope, receive, counted)
