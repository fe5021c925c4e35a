"""Addresses of this host: which ones others can use, and which of theirs are near."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple

import psutil

from wire.errors import UsageError

DEFAULT_MQTT_PORT: Final = 8570
"""Of the broker that a coordinator starts. Not MQTT's own 1883: a broker of somebody else may have that."""

MAX_INTERFACES: Final = 16
"""Linux lets one socket join 20 multicast groups (igmp_max_memberships)."""

_CONTAINER_BRIDGE: Final = re.compile(r"^(docker|br-[0-9a-f]{12}$|veth|virbr|cni|flannel|podman|lxc|lxd)")
"""Bridges of container engines: their addresses are the same on every host that runs one, so nobody else can use
them. To be found through such a bridge, name its address as an interface."""


def is_loopback(host: str) -> bool:
    """Whether an address, or the name localhost, is of this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_port_text(host: str, port: int) -> str:
    """'10.0.0.5:1883', '[::1]:1883'."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class HostAddress(NamedTuple):
    address: str
    network: ipaddress.IPv4Network


def host_addresses() -> list[HostAddress]:
    """IPv4 addresses of interfaces that are up, without container bridges; loopback only if there is nothing else."""
    states = psutil.net_if_stats()
    outward: list[HostAddress] = []
    loopback: list[HostAddress] = []
    for interface, entries in psutil.net_if_addrs().items():
        state = states.get(interface)
        if state is None or not state.isup or _CONTAINER_BRIDGE.match(interface):
            continue
        for entry in entries:
            if entry.family != socket.AF_INET:
                continue
            network = ipaddress.IPv4Network(f"{entry.address}/{entry.netmask or 32}", strict=False)
            (loopback if network.is_loopback else outward).append(HostAddress(entry.address, network))
    return sorted(outward)[:MAX_INTERFACES] or loopback[:1]


def checked_interfaces(interfaces: Sequence[str] | None) -> tuple[str, ...] | None:
    """Give the addresses back if all are IP addresses; raise UsageError otherwise."""
    if interfaces is None:
        return None
    for text in interfaces:
        try:
            ipaddress.ip_address(text)
        except ValueError:
            raise UsageError(
                f"interface {text!r} is not an IP address", try_="an address of this host, for example 127.0.0.1"
            ) from None
    return tuple(interfaces[:MAX_INTERFACES])


def nearest_first(addresses: Sequence[str], networks: Sequence[ipaddress.IPv4Network]) -> tuple[str, ...]:
    """Order addresses of one host: in a network of ours, then other IPv4, then IPv6. Order is kept within each."""

    def rank(text: str) -> int:
        try:
            address = ipaddress.IPv4Address(text)
        except ValueError:
            return 2
        return 0 if any(address in network for network in networks) else 1

    return tuple(sorted(addresses, key=rank))
