"""An answer as a client hears it, over a coordinator that is killed and started again.

The client holds what it was given. When the coordinator goes away in the middle, the client asks whoever is there next
for the same answer behind that, and its own client sees a pause, as after the loss of a board. Stages keep nothing of a
request that the coordinator has not, so an exact answer goes on with the tokens that it would have had.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgspec

from coordinator.client import Broken, Client
from coordinator.inference.answer import Pause
from coordinator.inference.requests import GenerateRequest, Guesses
from wire.errors import Degraded, EdgelamError, Unreachable, UsageError

RETRY_S: Final = 0.25


def answer_events(connect: Callable[[], Client], request: GenerateRequest) -> Iterator[dict[str, Any]]:
    """The events of POST /v1/generate. `connect` makes a client of the coordinator that is there now. With no
    recoveries the loss of the coordinator is an error at once, as any other."""
    heard = _Heard(request)
    while True:
        try:
            with connect() as there:
                for event in there.stream("/v1/generate", heard.request):
                    yield from heard.events(event)
                    if heard.over:
                        return
            raise Broken("the coordinator ended the answer early", try_="run again")
        except EdgelamError as error:
            pause = heard.lost(error)
            if pause is not None:
                yield pause
            time.sleep(RETRY_S)


class _Heard:
    """What has come of an answer."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.over = False
        self._asked = request
        self._started = False
        self._given: list[int] = list(request.given)
        self._guesses: Guesses | None = request.guesses
        self._adapter = request.adapter
        """Its id, once it is known: a job may have another adapter meanwhile."""
        self._pauses: list[Pause] = []
        self._sign_s = time.monotonic()
        self._until_s = 0.0
        self._place: dict[str, Any] = {"epoch": 0, "boards": []}
        """Where it runs."""

    @property
    def _paused(self) -> bool:
        return bool(self._pauses) and self._pauses[-1].pause_s is None

    def events(self, event: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What a client is told of an event."""
        kind, now_s = event["event"], time.monotonic()
        if kind == "start":
            if event.get("guesses") is not None:
                self._guesses = msgspec.convert(event["guesses"], Guesses)
            self._adapter = event.get("adapter", self._adapter)
            self._place = {"epoch": event.get("epoch", 0), "boards": event.get("boards", [])}
            started, self._started = self._started, True
            if started:
                return
            self._sign_s = now_s
        elif kind == "token":
            if self._paused:
                yield self._resumed(now_s)
            self._given.append(event["id"])
            self._sign_s = now_s
        elif kind == "end":
            self.over = True
            if self._paused:  # all of it had come but for this event
                yield self._resumed(now_s)
            pauses = [*(msgspec.to_builtins(pause) for pause in self._pauses), *event.get("pauses", [])]
            event = {**event, "pauses": sorted(pauses, key=lambda pause: pause["given"])}
        yield event

    def lost(self, error: EdgelamError) -> dict[str, Any] | None:
        """The coordinator is gone, or can't go on yet: a pause to be told of, None while it lasts. Raises the error
        where nothing can be done about it."""
        now_s = time.monotonic()
        if self._paused:
            if isinstance(error, UsageError | Degraded):
                raise error
            if now_s + RETRY_S >= self._until_s:
                raise Unreachable(
                    f"{self._pauses[-1].reason}; the answer could not go on within "
                    f"{self._asked.recovery_timeout_s:.0f} s: {error.message}",
                    try_=error.try_,
                )
            return None
        if not isinstance(error, Broken) or not self._started or not self._asked.recoveries_at_most:
            raise error
        self._until_s = now_s + self._asked.recovery_timeout_s
        pause = Pause(reason="the coordinator went away", given=len(self._given), detection_s=now_s - self._sign_s)
        self._pauses.append(pause)
        self.request = msgspec.structs.replace(
            self._asked, given=tuple(self._given), guesses=self._guesses, adapter=self._adapter
        )
        return {"event": "pause", "reason": pause.reason, "given": pause.given}

    def _resumed(self, now_s: float) -> dict[str, Any]:
        pause = self._pauses[-1]
        pause.pause_s = now_s - self._sign_s
        return {"event": "resume", "pause_s": pause.pause_s, "reason": pause.reason, **self._place}
