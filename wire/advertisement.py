"""What stands in an mDNS advertisement: written with care, read with suspicion. Pure.

    <site>-coordinator._edgelam._tcp.local.   SRV port = MQTT port   TXT: role site id boot v http
    <site>-<device>._edgelam._tcp.local.      SRV port = 0           TXT: role site id boot v cores mem engines

The TXT record, not the instance label, says who it is: labels are shortened, and renamed when two hosts claim one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Final, Literal, cast

from msgspec import Struct

from wire import limits
from wire.errors import PeerError, UsageError
from wire.ids import checked_name, is_name
from wire.version import PROTOCOL

COORDINATOR_NAME: Final = "coordinator"

MAX_PAIR_BYTES: Final = 255
"""One length byte stands in front of each TXT pair (RFC 6763, 6.1)."""

MAX_ADDRESSES: Final = 16
"""Addresses kept of one host; a person's machine has fewer."""

_LABEL_BYTES: Final = 60
"""DNS labels hold 63 bytes; zeroconf may append "-2" to a name that is taken."""

_HOST: Final = re.compile(r"^[A-Za-z0-9](?:[A-Za-z0-9.:-]{0,98}[A-Za-z0-9])?$")
_BOOT: Final = re.compile(r"^[0-9a-f]{1,32}$")

Role = Literal["coordinator", "agent"]
RESERVED: Final = ("role", "site", "id", "boot", "v")


class Found(Struct, frozen=True, kw_only=True):
    """Somebody who answered. `addresses` are IP addresses, those in a network of ours and IPv4 first; never empty."""

    role: Role
    site: str
    name: str
    """'coordinator' or the device name."""
    boot: str
    addresses: tuple[str, ...]
    port: int
    """Port of the control broker for a coordinator, 0 for an agent."""
    protocol: int
    properties: dict[str, str]

    @property
    def http_port(self) -> int | None:
        """Port of the coordinator's HTTP API; None if it did not say one."""
        text = self.properties.get("http", "")
        return int(text) if text.isascii() and text.isdigit() and len(text) <= 5 and 0 < int(text) < 65536 else None

    @property
    def broker_hosts(self) -> tuple[str, ...]:
        """Where the broker is: the host that the coordinator names, else its own addresses. Port: `port`."""
        named = self.properties.get("broker", "")
        return (named,) if _HOST.match(named) else self.addresses


def coordinator_properties(http_port: int, broker_host: str = "") -> dict[str, str]:
    """What a coordinator says of itself: its HTTP port, and where its broker is if that runs on another machine."""
    return {"http": str(http_port), **({"broker": broker_host} if broker_host else {})}


def agent_properties(cores: float, memory_bytes: int, engines: Sequence[str]) -> dict[str, str]:
    """What an agent says of itself in TXT: processors, memory in MiB, engine names. The rest travels over MQTT."""
    return {"cores": f"{cores:g}", "mem": str(memory_bytes >> 20), "engines": ",".join(engines)}


def txt_record(site: str, name: str, role: Role, boot: str, properties: Mapping[str, str]) -> dict[str, str]:
    """Give the pairs of the TXT record; raise UsageError for a name, pair or record that may not stand in one."""
    checked_name(site, "site")
    checked_name(name, "device")
    taken = [key for key in properties if key in RESERVED]
    if taken:
        raise UsageError(f"mDNS property {taken[0]!r} is reserved", try_=f"use a key other than {', '.join(RESERVED)}")
    record = {"role": role, "site": site, "id": name, "boot": boot, "v": str(PROTOCOL), **properties}
    total = 0
    for key, value in record.items():
        pair = len(key.encode()) + 1 + len(value.encode())
        if not key or not key.isascii() or not key.isprintable() or "=" in key or pair > MAX_PAIR_BYTES:
            raise UsageError(
                f"mDNS property {key!r} of {pair} bytes can't stand in a TXT record",
                try_=f"printable ASCII keys without '=', at most {MAX_PAIR_BYTES} bytes as key=value",
            )
        total += pair + 1
    if total > limits.MAX_TXT_BYTES:
        raise UsageError(
            f"mDNS properties of {site}-{name} take {total} bytes, at most {limits.MAX_TXT_BYTES} fit in one packet",
            try_="publish less over mDNS: profiles travel over MQTT",
        )
    return record


def instance_label(site: str, name: str) -> str:
    """The DNS label of an instance: `site-name`, shortened with a digest where it would not fit."""
    label = f"{site}-{name}"
    if len(label) <= _LABEL_BYTES:
        return label
    digest = hashlib.sha256(f"{site}/{name}".encode()).hexdigest()[:8]
    return f"{label[: _LABEL_BYTES - 9]}-{digest}"


def read_record(raw: Mapping[bytes, bytes | None], addresses: Sequence[str], port: int | None) -> Found:
    """Check what came from the network and make it a Found; raise PeerError naming the field that is wrong."""
    pairs: dict[str, str] = {}
    for key, value in raw.items():
        try:
            pairs[key.decode("ascii")] = (value or b"").decode()
        except UnicodeDecodeError:
            raise PeerError(f"mDNS: property {key!r} is not text") from None
    role, site, name = pairs.get("role", ""), pairs.get("site", ""), pairs.get("id", "")
    protocol = pairs.get("v", "")
    checks = {
        "role": role in ("coordinator", "agent"),
        "site": is_name(site),
        "id": is_name(name),
        "boot": _BOOT.match(pairs.get("boot", "")) is not None,
        "v": protocol.isascii() and protocol.isdigit() and len(protocol) <= 4,
        "port": port is not None and (0 if role == "agent" else 1) <= port < 65536,
        "address": bool(addresses),
    }
    for field, right in checks.items():
        if not right:
            raise PeerError(f"mDNS: {field} missing or malformed")
    return Found(
        role=cast(Role, role),
        site=site,
        name=name,
        boot=pairs["boot"],
        addresses=tuple(addresses[:MAX_ADDRESSES]),
        port=port or 0,
        protocol=int(protocol),
        properties={key: value for key, value in pairs.items() if key not in RESERVED},
    )
