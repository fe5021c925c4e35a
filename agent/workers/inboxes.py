"""Where parcels reach a stage: on the site's broker, and on its own board's if the plan says so; under one topic."""

from __future__ import annotations

from collections.abc import Sequence

from agent.workers.echo import Echo
from wire.channel import Delivery, Inbox
from wire.transport import Transport


class Inboxes:
    """One inbox per connection, the first of which gets what the stage before sends. A stage is reached when every one
    has given back an echo."""

    def __init__(self, topic: str, transports: Sequence[Transport]) -> None:
        self.topic = topic
        self._inboxes = {id(transport): Inbox(transport, topic) for transport in transports}
        self._transports = {id(transport): transport for transport in transports}
        self._main = self._inboxes[id(transports[0])]
        self._echoes: dict[int, Echo] = {}
        self._proved: set[int] = set()

    @property
    def main(self) -> Inbox:
        """The one for what comes from the stage before."""
        return self._main

    @property
    def open(self) -> bool:
        """Whether every inbox has proved to be open since its connection stands."""
        return len(self._proved) == len(self._inboxes)

    @property
    def refused(self) -> int:
        return sum(inbox.counters.refused for inbox in self._inboxes.values())

    @property
    def last_refusal(self) -> str:
        return next((inbox.last_refusal for inbox in self._inboxes.values() if inbox.last_refusal), "")

    def up(self, transport: Transport) -> None:
        """A connection stands (again): its inbox must prove itself."""
        number = id(transport)
        if number not in self._inboxes:
            return
        self.down(transport)
        self._echoes[number] = Echo(transport, self.topic)
        self._echoes[number].send()

    def down(self, transport: Transport) -> None:
        """A connection is lost: its inbox is not open."""
        number = id(transport)
        self._proved.discard(number)
        if number in self._echoes:
            self._echoes.pop(number).close()

    def take(self) -> Delivery | None:
        """The next parcel that is no echo, or None."""
        for number, inbox in self._inboxes.items():
            while (delivery := inbox.take()) is not None:
                if number in self._echoes and self._echoes[number].is_answer(delivery.parcel):
                    inbox.done(delivery)
                    self._echoes.pop(number).close()
                    self._proved.add(number)
                    continue
                return delivery
        return None

    def tick(self) -> None:
        for inbox in self._inboxes.values():
            inbox.tick()
        for echo in self._echoes.values():
            echo.send()

    def close(self) -> None:
        for transport in list(self._transports.values()):
            self.down(transport)
        for inbox in self._inboxes.values():
            inbox.close()
