"""What an agent reaches the world by: connections, processes, mDNS, systemd, clock. Tests give their own."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from agent.databroker import DataBroker, Wanted
from agent.finder import Find
from agent.launcher import Launcher
from agent.notify import Notifier
from agent.records import Records
from wire.messages import DeviceInfo
from wire.transport import Transport, Will


class Advertised(Protocol):
    """wire.discovery.Advertiser, as far as it is used here."""

    def start(self) -> None: ...

    def close(self) -> None: ...


class Outside(Struct, frozen=True, kw_only=True):
    connect: Callable[[str, str, Will], Transport]
    """(url, client id, will) -> a transport, not yet started."""
    launcher: Callable[[Callable[[], None]], Launcher]
    """(wake) -> what starts workers."""
    find: Find
    advertise: Callable[[str, DeviceInfo], Advertised] | None = None
    """(site, info) -> an mDNS advertisement; None = be silent."""
    data_broker: Callable[[Path, Wanted, Records, Callable[[], None]], DataBroker] | None = None
    """(folder, what is wanted, records, changed) -> the board's own broker; None = have none."""
    notifier: Notifier
    root: Path = Path("/")
    clock: Callable[[], float] = time.monotonic
