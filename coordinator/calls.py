"""Commands to devices, and the replies that come back."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated, Any

from msgspec import Meta, Struct

from coordinator.changes import Changes
from wire import messages, topics
from wire.errors import EdgelamError
from wire.limits import MOST_SUSTAINED_S
from wire.messages import Command, Reply

REQUESTER = "coordinator"
"""Under which name replies come to us."""


class CallFailed(EdgelamError):
    """A device did not answer, or answered that it could not."""


class MeasureRequest(Struct, frozen=True, kw_only=True):
    """Have boards measure a model's modules: those that have not, or with `again` whatever is known."""

    model: str
    precision: str = "int4"
    again: bool = False
    devices: tuple[str, ...] = ()
    """Who measures again, or is put under load; empty: all that are online."""
    sustained_s: Annotated[float, Meta(ge=0, le=MOST_SUSTAINED_S)] = 0.0
    """Above 0: for so long boards make steps without a pause, one board after the other."""


class Calls:
    """All methods run in the event loop's thread. `publish(topic, payload, *fields)` is the hub's."""

    def __init__(self, site: str, changes: Changes, publish: Callable[..., None]) -> None:
        self._site = site
        self._changes = changes
        self._publish = publish
        self._waiting: dict[str, str] = {}
        self._replies: dict[str, Reply] = {}

    async def call(
        self, device: str, verb: str, there: Callable[[], bool], timeout_s: float, **arguments: Any
    ) -> dict[str, Any]:
        """Give the result of a command. Raises CallFailed if the device can't do it, is no longer `there`, or is silent
        for `timeout_s`."""
        number = secrets.token_hex(8)
        command = Command(id=number, reply_topic=topics.REPLY.on(self._site, REQUESTER, number), arguments=arguments)
        self._waiting[number] = device
        try:
            self._publish(topics.COMMAND, messages.encode(command), device, verb)
            await self._changes.wait(lambda: number in self._replies or not there(), timeout_s)
            reply = self._replies.get(number)
        finally:
            del self._waiting[number]
            self._replies.pop(number, None)
        if reply is None:
            what = f"gave no answer to {verb!r} within {timeout_s:.0f} s" if there() else f"went away during {verb!r}"
            raise CallFailed(f"{device} {what}", try_=f"edgelam devices; the log of the agent on {device}")
        if not reply.ok:
            raise CallFailed(f"{device}: {reply.error}")
        return reply.result

    def heard(self, reply: Reply) -> None:
        """Take a reply; one that nobody waits for, or another device's, is dropped."""
        if self._waiting.get(reply.id) == reply.device:
            self._replies[reply.id] = reply
            self._changes.ring()
