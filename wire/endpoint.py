"""What every implementation of the Transport contract has: its state, counters and handlers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from wire.limits import RECONNECT_DELAY_S
from wire.subscriptions import Subscriptions
from wire.transport import MAX_QUEUED_MESSAGES, Inbound, Link, NotConnected, OutboundQueueFull


class Endpoint:
    """Base of the transports: link, last error, counters, and the calling of handlers."""

    def __init__(self) -> None:
        self._link = Link.DOWN
        self._last_error = ""
        self._bytes_sent = 0
        self._bytes_received = 0
        self._subscriptions = Subscriptions()
        self._up_handlers: list[Callable[[], None]] = []
        self._down_handlers: list[Callable[[str], None]] = []

    @property
    def link(self) -> Link:
        return self._link

    @property
    def last_error(self) -> str:
        return self._last_error

    @property
    def bytes_sent(self) -> int:
        return self._bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._bytes_received

    @property
    def handler_errors(self) -> int:
        """Handlers that raised; each was logged."""
        return self._subscriptions.handler_errors

    def on_up(self, handler: Callable[[], None]) -> None:
        self._up_handlers.append(handler)

    def on_down(self, handler: Callable[[str], None]) -> None:
        self._down_handlers.append(handler)

    def _tell_up(self) -> None:
        for handler in tuple(self._up_handlers):
            self._subscriptions.guard("on_up", handler)

    def _tell_down(self, reason: str) -> None:
        for handler in tuple(self._down_handlers):
            self._subscriptions.guard("on_down", handler, reason)

    def _handle(self, message: Inbound) -> None:
        self._bytes_received += len(message.payload)
        self._subscriptions.dispatch(message)

    def _not_connected(self, topic: str) -> NotConnected:
        return NotConnected(f"{topic}: the connection is {self._link.value}, nothing was sent")


class Kept(NamedTuple):
    """A QoS 1 message; `expires_s` on the sender's monotonic clock."""

    topic: str
    payload: bytes
    retain: bool
    expires_s: float | None


class Unacknowledged:
    """QoS 1 messages that the broker has not acknowledged, in order, over all connections to it."""

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {}
        self._next_number = 0
        self._number_of_mid: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, message: Kept) -> int:
        """Take a message and give its number; raise OutboundQueueFull."""
        if len(self._kept) >= MAX_QUEUED_MESSAGES:
            raise OutboundQueueFull(
                f"{message.topic}: {MAX_QUEUED_MESSAGES} messages wait for the broker already",
                try_="see whether the broker runs: edgelam devices",
            )
        number = self._next_number
        self._next_number += 1
        self._kept[number] = message
        return number

    def sent(self, number: int, mid: int) -> None:
        """The connection carries message `number` under the MQTT message id `mid`."""
        self._number_of_mid[mid] = number

    def acknowledged(self, mid: int) -> Kept | None:
        """The broker answered `mid`; give the message, None if it is none of ours."""
        number = self._number_of_mid.pop(mid, None)
        return None if number is None else self._kept.pop(number, None)

    def for_new_connection(self, now_s: float) -> list[tuple[int, Kept]]:
        """Everything that must be sent again; what has expired is forgotten."""
        self._number_of_mid.clear()
        for number, message in tuple(self._kept.items()):
            if message.expires_s is not None and message.expires_s <= now_s:
                del self._kept[number]
        return list(self._kept.items())


class Ended(NamedTuple):
    """A connection or an attempt ended; `early`: before it was accepted, which may be for the MQTT version."""

    reason: str
    was_up: bool = False
    early: bool = False
    wrong_version: bool = False


EARLY_IS_VERSION: Final = 2
"""Early ends in a row after which a broker that was spoken to before is taken for one of another version."""


class Redial:
    """Decides when to connect again and in which version. Pure: the time is given."""

    def __init__(self, five: bool = True) -> None:
        self.five = five
        """MQTT 5, else 3.1.1; the one to begin with."""
        self._proved = False
        self._early = 0

    @property
    def untried_five(self) -> bool:
        """MQTT 5 is tried, and this broker has not accepted it yet."""
        return self.five and not self._proved

    def accepted(self) -> None:
        self._proved = True
        self._early = 0

    def ended(self, ended: Ended, now_s: float) -> float:
        """Give the time of the next attempt: at once in 3.1.1 if MQTT 5 seems to be the reason, else after the delay.

        A broker that was proved to take a version gets a second chance in it: brokers close early when they stop.
        """
        self._early = self._early + 1 if ended.early else 0
        enough = 1 if not self._proved else EARLY_IS_VERSION
        if not ended.wrong_version and self._early < enough:
            return now_s + RECONNECT_DELAY_S
        self.five = not self.five
        self._proved = False
        self._early = 0
        return now_s if not self.five else now_s + RECONNECT_DELAY_S
