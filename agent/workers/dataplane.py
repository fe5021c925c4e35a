"""The connections over which a worker sends and receives frames.

A stage is reached on the site's broker in any case: requesters send prompts there. Where the plan says so, what the
stage before sends comes over the broker of this board, and what goes to the next stage goes to that of its board.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from agent.workers.pipe import BrokerLogin, DataBrokerAt
from wire.limits import DATA_KEEPALIVE_S
from wire.messages import InboxAddress, StageOrder
from wire.mqtt import MqttTransport
from wire.several import Several
from wire.transport import Link, Transport


def data_connection(login: BrokerLogin, keepalive_s: int = DATA_KEEPALIVE_S) -> MqttTransport:
    """A transport that is not started yet. It begins with MQTT 3.1.1: frames need nothing of MQTT 5."""
    return MqttTransport(
        login.url,
        login.client_id,
        keepalive_s=keepalive_s,
        username=login.username,
        password=login.password,
        five=False,
    )


class Connections:
    """`inward` brings what the stage before sends, `outward` takes what goes to the next stage; `site` is the way from
    and to requesters. They may be one and the same.

    `told_up(transport)` and `told_down(transport, reason)` are called as the transports tell it.
    """

    def __init__(
        self,
        site: Transport,
        connect: Callable[[str, str], MqttTransport],
        told_up: Callable[[Transport], None],
        told_down: Callable[[Transport, str], None],
    ) -> None:
        """`connect(url, what)` gives a transport that is not started; `what` tells it from the others in its name."""
        self.site = site
        self.inward: Transport = site
        self.outward: Transport = site
        self._connect = connect
        self._told_up = told_up
        self._told_down = told_down
        self._others: dict[str, MqttTransport] = {}
        """Broker, as plans name it -> connection."""
        self._several: Several | None = None
        self._closed_bytes = [0, 0]
        self._started = False
        self._listen(site)

    @property
    def up(self) -> bool:
        return all(transport.link is Link.UP for transport in self)

    @property
    def bytes_sent(self) -> int:
        return self._closed_bytes[0] + sum(transport.bytes_sent for transport in self)

    @property
    def bytes_received(self) -> int:
        return self._closed_bytes[1] + sum(transport.bytes_received for transport in self)

    def __iter__(self) -> Iterator[Transport]:
        yield self.site
        yield from self._others.values()

    def follow(self, order: StageOrder, own: DataBrokerAt | None) -> None:
        """Have the connections that an order needs, and no others; `own` is the broker of this board."""
        wanted = {address.broker for address in (order.inbox, order.next) if address.broker}
        for address in [address for address in self._others if address not in wanted]:
            gone = self._others.pop(address)
            gone.close()
            self._closed_bytes[0] += gone.bytes_sent
            self._closed_bytes[1] += gone.bytes_received
        for address in sorted(wanted - self._others.keys()):
            ours = own is not None and own.address == address
            url = own.url if own is not None and ours else address
            made = self._others[address] = self._connect(url, "own" if ours else "next")
            self._listen(made)
            if self._started:
                made.start()
        self.inward, self.outward = self._of(order.inbox), self._of(order.next)
        members = [self.site, *self._others.values()]
        self._several = Several(members) if self._others else None  # type: ignore[arg-type]

    def start(self) -> None:
        self._started = True
        for transport in self:
            transport.start()

    def poll(self, timeout_s: float) -> None:
        if self._several is None:
            self.site.poll(timeout_s)
        else:
            self._several.poll(timeout_s)

    def wake(self) -> None:
        """End a `poll` early. Any thread."""
        several = self._several
        if several is None:
            self.site.wake()
        else:
            several.wake()

    def close(self) -> None:
        for transport in self:
            transport.close()

    def _of(self, address: InboxAddress) -> Transport:
        return self._others[address.broker] if address.broker else self.site

    def _listen(self, transport: Transport) -> None:
        transport.on_up(lambda: self._told_up(transport))
        transport.on_down(lambda reason: self._told_down(transport, reason))
