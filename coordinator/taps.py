"""Ears on several brokers at once: the site's, and those that boards have of their own (docs/decisions/0007)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wire.mqtt import MqttTransport
from wire.several import Several
from wire.transport import Inbound, Link

Heard = Callable[[Inbound, str], None]
"""(message, whose broker it crossed: '' for the site's)."""


class Taps:
    """Hears `topic_filter` on the site's broker, and on those that `follow` names. `connect(url)` makes a connection
    that is not started yet."""

    def __init__(self, url: str, topic_filter: str, connect: Callable[[str], MqttTransport], heard: Heard) -> None:
        self._filter = topic_filter
        self._connect = connect
        self._heard = heard
        self._of: dict[str, tuple[str, MqttTransport]] = {}
        self.site = self._tap(url, "")
        self._all = Several((self.site,))

    def follow(self, brokers: Mapping[str, str]) -> None:
        """Hear the brokers of these boards (device -> address), besides the site's, and no others."""
        if {device: url for device, (url, _) in self._of.items()} == dict(brokers):
            return
        for device, (url, transport) in list(self._of.items()):
            if brokers.get(device) != url:
                transport.close()
                del self._of[device]
        for device, url in brokers.items():
            if device not in self._of:
                self._of[device] = url, self._tap(url, device)
        self._all = Several((self.site, *(transport for _, transport in self._of.values())))

    def unreached(self) -> dict[str, str]:
        """Boards whose broker is not heard now, with the reason as far as it is known."""
        return {
            device: transport.last_error
            for device, (_, transport) in self._of.items()
            if transport.link is not Link.UP and transport.last_error
        }

    def poll(self, timeout_s: float) -> None:
        self._all.poll(timeout_s)

    def close(self) -> None:
        self.follow({})
        self.site.close()

    def _tap(self, url: str, device: str) -> MqttTransport:
        transport = self._connect(url)
        transport.subscribe(self._filter, lambda message: self._heard(message, device))
        transport.start()
        return transport
