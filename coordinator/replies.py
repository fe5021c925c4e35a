"""What the HTTP door says: JSON, and one shape for all errors."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from wire.errors import EdgelamError, ExitCode

HTTP_STATUS = {
    ExitCode.USAGE: 400,
    ExitCode.REFUSED: 409,
    ExitCode.UNREACHABLE: 503,
    ExitCode.DEGRADED: 503,
    ExitCode.FAILED: 500,
}


def error_body(error: EdgelamError) -> dict[str, Any]:
    return {"event": "error", "message": error.message, "try": error.try_, "exit_code": int(error.exit_code)}


def json_reply(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status_code=status, media_type="application/json")


def error_reply(error: EdgelamError, status: int | None = None) -> Response:
    """An error with the status given, else with that of its kind."""
    return json_reply(error_body(error), status or HTTP_STATUS.get(error.exit_code, 500))
