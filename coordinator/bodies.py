"""Bodies of requests: capped, then checked as a struct."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import Request

from wire.errors import UsageError

MAX_BODY_BYTES = 4 * 1024 * 1024

T = TypeVar("T", bound=Struct)


async def read_body(request: Request) -> bytes:
    """The request's body; raise UsageError for one above the cap."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MAX_BODY_BYTES:
            raise UsageError(f"the request's body exceeds {MAX_BODY_BYTES} bytes")
    return bytes(data)


async def body_of(request: Request, kind: type[T]) -> T:
    """The request's JSON as a checked struct; raise UsageError."""
    data = await read_body(request)
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"the request is not a {kind.__name__}: {error}") from None
