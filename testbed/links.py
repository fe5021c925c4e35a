"""What a board's network link is: rate, delay and jitter, by name or by figures. Pure.

A link is the cable (or the air) between one board and the network: everything the board sends crosses it once, and
everything it receives crosses it once. With a central broker an activation thus crosses two links: the sender's and
the receiver's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final, NamedTuple

from msgspec import Struct

from wire.addresses import DEFAULT_MQTT_PORT, host_port_text
from wire.errors import UsageError
from wire.units import rate_text, seconds_text

MIN_RATE_BYTES_PER_S: Final = 1_000.0
"""Below 8 kbit/s an MQTT keepalive no longer fits."""

MAX_DELAY_S: Final = 10.0
"""More than any link on Earth; a larger one is a unit mistaken."""


class LinkSpec(Struct, frozen=True, kw_only=True):
    """One board's link. Rate holds for each direction by itself; delay and jitter are one way, once per crossing."""

    rate_bytes_per_s: float | None = None
    """Payload bytes, TCP and IP headers not counted; None is unlimited."""
    delay_s: float = 0.0
    """The least that each byte takes."""
    jitter_s: float = 0.0
    """The most that is added to the delay, uniformly; order is kept."""

    def text(self) -> str:
        """For people: '20.0 Mbit/s, 5.0 ms + up to 1.0 ms one way'."""
        rate = "unlimited" if self.rate_bytes_per_s is None else rate_text(self.rate_bytes_per_s)
        jitter = f" + up to {seconds_text(self.jitter_s)}" if self.jitter_s else ""
        return f"{rate}, {seconds_text(self.delay_s)}{jitter} one way"


ETHERNET: Final = LinkSpec(rate_bytes_per_s=100e6 / 8, delay_s=0.001)
WIFI: Final = LinkSpec(rate_bytes_per_s=20e6 / 8, delay_s=0.005, jitter_s=0.001)

PRESETS: Final[Mapping[str, LinkSpec | None]] = {"none": None, "ethernet": ETHERNET, "wifi": WIFI}
"""None: no shaper stands between board and coordinator."""


def preset(name: str) -> LinkSpec | None:
    """Give a link by name; raise UsageError listing the names."""
    if name not in PRESETS:
        raise UsageError(f"no link preset {name!r}", try_=f"one of: {', '.join(PRESETS)}")
    return PRESETS[name]


def checked_link(spec: LinkSpec) -> LinkSpec:
    """Give `spec` back; raise UsageError for figures that no link has (NaN included)."""
    rate = spec.rate_bytes_per_s
    if rate is not None and not MIN_RATE_BYTES_PER_S <= rate < float("inf"):
        raise UsageError(f"link rate of {rate:g} bytes/s", try_=f"at least {MIN_RATE_BYTES_PER_S:g}, or unlimited")
    for name, value_s in (("delay", spec.delay_s), ("jitter", spec.jitter_s)):
        if not 0 <= value_s <= MAX_DELAY_S:
            raise UsageError(f"link {name} of {value_s:g} s", try_=f"0 to {MAX_DELAY_S:g} s")
    return spec


class Address(NamedTuple):
    """Where something listens. `host` is a name or an IP address without brackets."""

    host: str
    port: int

    def text(self) -> str:
        return host_port_text(self.host, self.port)


def broker_address(text: str) -> Address:
    """Read 'host:port' or 'mqtt://host:port'; raise UsageError."""
    return parse_address(text.removeprefix("mqtt://").removesuffix("/"), "broker")


def parse_address(text: str, what: str) -> Address:
    """Read 'host:port' or '[ipv6]:port'; raise UsageError naming `what`."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    right = bool(host) and port.isascii() and port.isdigit() and int(port) < 65536 and (bracketed or ":" not in host)
    if bracketed:
        try:
            ipaddress.IPv6Address(host.partition("%")[0])
        except ValueError:
            right = False
    if not right:
        raise UsageError(
            f"{what} {text!r} is not HOST:PORT",
            try_=f"for example 127.0.0.1:{DEFAULT_MQTT_PORT} or [::1]:{DEFAULT_MQTT_PORT}",
        )
    return Address(host, int(port))
