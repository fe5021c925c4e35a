"""How present a device is, as one table: (presence, signal) -> presence.

    SEEN ──> JOINING ──> ONLINE <──> SUSPECT
               ^ │          │           │
               │ v          v           │
              OFFLINE <─────┴───────────┘

A signal is what an event means for one device (coordinator.fleet turns events into signals). A step that isn't in
the table is not taken; the fleet counts it by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final


class Presence(Enum):
    SEEN = "seen"
    JOINING = "joining"
    ONLINE = "online"
    SUSPECT = "suspect"
    OFFLINE = "offline"


class Signal(Enum):
    """What an event means for one device."""

    ADVERTISED = "mDNS shows it"
    WITHDRAWN = "mDNS shows it no more"
    TOLD = "a fact about it: info, profile, applied"
    SPOKE = "its current boot says that it is there"
    BEAT = "a heartbeat, but the info of that boot is missing, or it said offline"
    READY = "info and a fresh heartbeat of the boot in charge"
    RESTARTED = "another boot took its place"
    LEFT = "its current boot, or the last will of it, says offline"
    QUIET = "no heartbeat for SUSPECT_AFTER_S"
    SILENT = "no heartbeat for OFFLINE_AFTER_S"
    UNANSWERING = "a stage of it did not answer a requester; its next heartbeat brings it back"


_S, _P = Signal, Presence

NEXT: Final[Mapping[tuple[Presence, Signal], Presence | None]] = {
    (_P.SEEN, _S.ADVERTISED): _P.SEEN,
    (_P.SEEN, _S.WITHDRAWN): None,  # forgotten: it never was more than an advertisement
    (_P.SEEN, _S.TOLD): _P.JOINING,
    (_P.SEEN, _S.SPOKE): _P.JOINING,
    (_P.SEEN, _S.BEAT): _P.JOINING,
    (_P.SEEN, _S.LEFT): _P.OFFLINE,
    (_P.JOINING, _S.ADVERTISED): _P.JOINING,
    (_P.JOINING, _S.WITHDRAWN): _P.JOINING,
    (_P.JOINING, _S.TOLD): _P.JOINING,
    (_P.JOINING, _S.SPOKE): _P.JOINING,
    (_P.JOINING, _S.BEAT): _P.JOINING,
    (_P.JOINING, _S.READY): _P.ONLINE,
    (_P.JOINING, _S.RESTARTED): _P.JOINING,
    (_P.JOINING, _S.LEFT): _P.OFFLINE,
    (_P.JOINING, _S.QUIET): _P.JOINING,
    (_P.JOINING, _S.SILENT): _P.OFFLINE,
    (_P.ONLINE, _S.ADVERTISED): _P.ONLINE,
    (_P.ONLINE, _S.WITHDRAWN): _P.ONLINE,
    (_P.ONLINE, _S.TOLD): _P.ONLINE,
    (_P.ONLINE, _S.SPOKE): _P.ONLINE,
    (_P.ONLINE, _S.BEAT): _P.ONLINE,
    (_P.ONLINE, _S.READY): _P.ONLINE,
    (_P.ONLINE, _S.RESTARTED): _P.JOINING,
    (_P.ONLINE, _S.LEFT): _P.OFFLINE,
    (_P.ONLINE, _S.QUIET): _P.SUSPECT,
    (_P.ONLINE, _S.SILENT): _P.OFFLINE,
    (_P.SUSPECT, _S.ADVERTISED): _P.SUSPECT,
    (_P.SUSPECT, _S.WITHDRAWN): _P.SUSPECT,
    (_P.SUSPECT, _S.TOLD): _P.SUSPECT,
    (_P.SUSPECT, _S.SPOKE): _P.SUSPECT,
    (_P.SUSPECT, _S.BEAT): _P.ONLINE,
    (_P.SUSPECT, _S.READY): _P.ONLINE,
    (_P.SUSPECT, _S.RESTARTED): _P.JOINING,
    (_P.SUSPECT, _S.LEFT): _P.OFFLINE,
    (_P.SUSPECT, _S.QUIET): _P.SUSPECT,
    (_P.SUSPECT, _S.SILENT): _P.OFFLINE,
    (_P.OFFLINE, _S.ADVERTISED): _P.OFFLINE,  # an mDNS ghost never brings a device back
    (_P.OFFLINE, _S.WITHDRAWN): _P.OFFLINE,
    (_P.OFFLINE, _S.TOLD): _P.OFFLINE,
    (_P.OFFLINE, _S.SPOKE): _P.JOINING,
    (_P.OFFLINE, _S.BEAT): _P.OFFLINE,  # a heartbeat that was under way when it left
    (_P.OFFLINE, _S.READY): _P.ONLINE,
    (_P.OFFLINE, _S.RESTARTED): _P.JOINING,
    (_P.OFFLINE, _S.LEFT): _P.OFFLINE,
    (_P.SEEN, _S.UNANSWERING): _P.SEEN,
    (_P.JOINING, _S.UNANSWERING): _P.JOINING,
    (_P.ONLINE, _S.UNANSWERING): _P.OFFLINE,
    (_P.SUSPECT, _S.UNANSWERING): _P.OFFLINE,
    (_P.OFFLINE, _S.UNANSWERING): _P.OFFLINE,
}

SAID: Final[Mapping[tuple[Presence, Signal], str]] = {
    (_P.JOINING, _S.READY): "device-online",
    (_P.OFFLINE, _S.READY): "device-online",
    (_P.SUSPECT, _S.READY): "device-back",
    (_P.ONLINE, _S.RESTARTED): "device-restarted",
    (_P.SUSPECT, _S.RESTARTED): "device-restarted",
    (_P.JOINING, _S.LEFT): "device-left",
    (_P.ONLINE, _S.LEFT): "device-left",
    (_P.SUSPECT, _S.LEFT): "device-left",
    (_P.ONLINE, _S.QUIET): "device-suspect",
    (_P.ONLINE, _S.SILENT): "device-silent",
    (_P.SUSPECT, _S.SILENT): "device-silent",
    (_P.JOINING, _S.SILENT): "device-stale",
    (_P.ONLINE, _S.UNANSWERING): "device-unanswering",
    (_P.SUSPECT, _S.UNANSWERING): "device-unanswering",
}
"""Which steps are worth a notice, and which (coordinator.notices)."""
