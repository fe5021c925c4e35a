"""What the command line knows of a running coordinator: its HTTP door, nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from coordinator.config import coordinator_url
from wire.errors import Degraded, EdgelamError, ExitCode, Refused, Unreachable, UsageError

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 30.0
STREAM_SILENCE_S = 900.0
"""Packing a large model or fetching weights over a slow link says nothing for a while."""

JSON = {"Content-Type": "application/json"}

_BY_CODE: dict[int, type[EdgelamError]] = {
    ExitCode.USAGE: UsageError,
    ExitCode.REFUSED: Refused,
    ExitCode.UNREACHABLE: Unreachable,
    ExitCode.DEGRADED: Degraded,
}


def raise_told(body: Any) -> None:
    """Raise the error that a body holds, as the coordinator raised it; return if it holds none."""
    if isinstance(body, dict) and body.get("event") == "error":
        kind = _BY_CODE.get(int(body.get("exit_code", 1)), EdgelamError)
        raise kind(str(body.get("message", "unknown error")), try_=str(body.get("try", "")))


def checked_url(url: str) -> str:
    """The URL; raise UsageError if it is none of a coordinator."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise _no_address(url, str(error).lower()) from None
    if parts.scheme not in ("http", "https"):
        raise _no_address(url, "it does not begin with http://")
    if not parts.hostname:
        raise _no_address(url, "it names no host")
    return url


def _no_address(url: str, reason: str) -> UsageError:
    return UsageError(f"{url!r} is no address of a coordinator: {reason}", try_="--coordinator http://HOST:8571")


def reason_of(error: httpx.HTTPError) -> str:
    """What went wrong with a call, in words: 'connection refused'."""
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    text = re.sub(r"^\[Errno -?\d+\] ", "", str(error))
    if text.startswith("[SSL"):
        return "it does not speak TLS: http:// instead of https://"
    return text.lower() or "the connection broke off"


class Broken(Unreachable):
    """The coordinator went away in the middle of an answer, or is not there at all."""


class Client:
    """Calls to one coordinator; every failure is an EdgelamError."""

    def __init__(self, url: str | None = None, site_key: str = "") -> None:
        self.url = checked_url(coordinator_url(url))
        headers = {"Authorization": f"Bearer {site_key}"} if site_key else {}
        timeout = httpx.Timeout(STREAM_SILENCE_S, connect=CONNECT_TIMEOUT_S)
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)
        except httpx.InvalidURL as error:
            raise _no_address(self.url, str(error)) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """The answer's JSON; `path` is one that answers at once."""
        return self._call("GET", path)

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def post(self, path: str) -> Any:
        """The answer's JSON; for what is said by the path alone."""
        return self._call("POST", path)

    def file(self, path: str) -> bytes:
        """The answer as it is; raises what it says if it is an error."""
        try:
            response = self._http.get(path)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != httpx.codes.OK:
            raise_told(self._parse(response.content))
            raise self._unanswered()
        return response.content

    def _call(self, method: str, path: str) -> Any:
        try:
            body = {"content": b"{}", "headers": JSON} if method == "POST" else {}
            response = self._http.request(method, path, timeout=ANSWER_TIMEOUT_S, **body)  # type: ignore[arg-type]
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        found = self._parse(response.content)
        raise_told(found)
        return found

    def stream(self, path: str, request: msgspec.Struct) -> Iterator[dict[str, Any]]:
        """POST a request and yield its events; an error event is raised."""
        data = msgspec.json.encode(request)
        try:
            with self._http.stream("POST", path, content=data, headers=JSON) as response:
                for line in response.iter_lines():
                    if line:
                        event = self._parse(line.encode())
                        raise_told(event)
                        yield event
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None

    def last(self, path: str, request: msgspec.Struct, on_status: Any) -> dict[str, Any]:
        """POST a request, give each status line to `on_status`, and return the last event."""
        final: dict[str, Any] = {}
        for event in self.stream(path, request):
            if event.get("event") == "status":
                on_status(event["text"])
            else:
                final = event
        if not final:
            raise Unreachable(f"the coordinator at {self.url} ended the answer early", try_="run again")
        return final

    def _parse(self, data: bytes) -> Any:
        try:
            return msgspec.json.decode(data)
        except msgspec.DecodeError:
            raise self._unanswered() from None

    def _unanswered(self) -> Unreachable:
        return Unreachable(f"{self.url} does not answer like a coordinator", try_="check --coordinator")

    def _unreachable(self, error: httpx.HTTPError) -> Broken:
        return Broken(f"no coordinator at {self.url} ({reason_of(error)})", try_="edgelam up, or check --coordinator")
