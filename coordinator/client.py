"""What the command line knows of a running coordinator: its HTTP door, nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

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


class Client:
    """Calls to one coordinator; every failure is an EdgelamError."""

    def __init__(self, url: str | None = None, site_key: str = "") -> None:
        self.url = coordinator_url(url)
        headers = {"Authorization": f"Bearer {site_key}"} if site_key else {}
        timeout = httpx.Timeout(STREAM_SILENCE_S, connect=CONNECT_TIMEOUT_S)
        try:
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)
        except httpx.InvalidURL as error:
            raise UsageError(f"{self.url!r} is no address ({error})", try_="--coordinator http://HOST:8571") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def get(self, path: str) -> Any:
        """The answer's JSON; `path` is one that answers at once."""
        return self._call("GET", path)

    def delete(self, path: str) -> Any:
        return self._call("DELETE", path)

    def _call(self, method: str, path: str) -> Any:
        try:
            response = self._http.request(method, path, timeout=ANSWER_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        body = self._parse(response.content)
        raise_told(body)
        return body

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
            raise Unreachable(f"{self.url} does not answer like a coordinator", try_="check --coordinator") from None

    def _unreachable(self, error: httpx.HTTPError) -> Unreachable:
        return Unreachable(
            f"no coordinator at {self.url} ({type(error).__name__}: {error})", try_="edgelam up, or check --coordinator"
        )
