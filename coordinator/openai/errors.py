"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}} with an HTTP status.

One table says which of our errors is which of theirs; a client's own error class follows from the status.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from starlette.responses import Response

from coordinator.replies import error_reply, json_reply
from models.catalog import UnknownModel
from wire.errors import Busy, Degraded, EdgelamError, Refused, Unreachable, UsageError

PREFIXES: Final = (
    "/v1/models",
    "/v1/chat/",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
)
"""Paths of OpenAI's. /v1/responses is not served, and who asks for it is told so in the shape that it reads."""

RETRY_AFTER_S: Final = 1
"""What a client that is told 'busy' should wait: most answers on a shelf of boards take seconds."""


class Row(NamedTuple):
    kind: type[EdgelamError]
    status: int
    type: str
    code: str | None


ROWS: Final = (
    Row(UnknownModel, 404, "invalid_request_error", "model_not_found"),
    Row(UsageError, 400, "invalid_request_error", None),
    Row(Busy, 429, "rate_limit_error", "busy"),
    Row(Refused, 400, "invalid_request_error", "refused"),
    Row(Unreachable, 503, "server_error", "unreachable"),
    Row(Degraded, 503, "server_error", "degraded"),
    Row(EdgelamError, 500, "server_error", "failed"),
)
"""The first row that fits counts."""

CODES: Final = {401: "invalid_api_key", 403: "forbidden", 404: "not_found"}
"""Where the status was decided before anything was served."""


class BadParameter(UsageError):
    """A field of a request's body that can't be served as it stands."""

    def __init__(self, message: str, *, param: str | None, try_: str = "", code: str | None = None) -> None:
        super().__init__(message, try_=try_)
        self.param = param
        self.code = code


def is_openai(path: str) -> bool:
    """Whether who asks for this path expects OpenAI's shapes."""
    return path.startswith(PREFIXES)


def row_of(error: EdgelamError) -> Row:
    return next(row for row in ROWS if isinstance(error, row.kind))


def openai_body(error: EdgelamError, status: int | None = None) -> dict[str, Any]:
    row = row_of(error)
    param, code = ("model" if isinstance(error, UnknownModel) else None), row.code
    if isinstance(error, BadParameter):
        param, code = error.param, error.code
    elif status is not None:
        code = CODES.get(status, code)
    message = f"{error.message} (try: {error.try_})" if error.try_ else error.message
    return {"error": {"message": message, "type": row.type, "param": param, "code": code}}


def openai_reply(error: EdgelamError, status: int | None = None) -> Response:
    reply = json_reply(openai_body(error, status), status or row_of(error).status)
    if isinstance(error, Busy):
        reply.headers["Retry-After"] = str(RETRY_AFTER_S)
    return reply


def reply_at(path: str, error: EdgelamError, status: int | None = None) -> Response:
    """An error in the shape that is spoken at a path: OpenAI's or ours."""
    return openai_reply(error, status) if is_openai(path) else error_reply(error, status)
