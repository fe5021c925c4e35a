"""Network interfaces that are up, with their addresses and the speed that the link negotiated."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from hwprofiles.probe import files
from hwprofiles.profile import Interface
from hwprofiles.reading import Absent, Failed, Reading

Addresses = Mapping[str, Sequence[tuple[int, str]]]
"""Interface -> (address family, address)."""


def live_addresses() -> Addresses:
    """What psutil says of this host."""
    return {
        name: [(int(entry.family), entry.address) for entry in entries]
        for name, entries in psutil.net_if_addrs().items()
    }


def interfaces(root: Path, ask: Callable[[], Addresses] = live_addresses) -> tuple[Interface, ...]:
    """Interfaces with an IP address, loopback left out, by name. Addresses of a recorded tree are not recorded: they
    are personal, so only names and speeds are given for one."""
    live = root == Path("/")
    known = ask() if live else {name: [] for name in files.listed(root, "sys/class/net")}
    found = []
    for name, entries in sorted(known.items()):
        addresses = tuple(address for family, address in entries if family in (socket.AF_INET, socket.AF_INET6))
        if name == "lo" or (live and not addresses):
            continue
        folder = f"sys/class/net/{name}"
        files.exists(root, folder)  # a recording keeps the interface even if no file of it can be read
        found.append(
            Interface(
                name=name,
                addresses=addresses,
                wireless=files.exists(root, f"{folder}/wireless") or files.exists(root, f"{folder}/phy80211"),
                link_bits_per_s=_link_speed(root, folder),
            )
        )
    return tuple(found)


def _link_speed(root: Path, folder: str) -> Reading[float] | Absent | Failed:
    """Mbit/s as a cable negotiated it. Wireless and virtual interfaces have none: the kernel says -1 or EINVAL."""
    found = files.parsed(root, f"{folder}/speed", files.whole)
    if isinstance(found, Failed) and found.because.startswith("EINVAL"):
        return Absent("the interface negotiates no speed")
    if not isinstance(found, Reading):
        return found
    if found.value <= 0:
        return Absent("the interface negotiates no speed")
    return Reading(found.value * 1e6, found.source)
