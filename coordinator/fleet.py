"""The registry of devices.

A device is SEEN while only mDNS knows it, JOINING once the broker carried anything from it, ONLINE when info and a
heartbeat of one and the same boot are there, SUSPECT when heartbeats stop, and OFFLINE when it said so, its last will
did, or the silence lasted (coordinator.presence has the table). Three rules keep the past out:

    only a heartbeat is a sign of life     what is retained may be years old, and mDNS remembers the dead for an hour
    a boot speaks for itself alone         the last will of an earlier boot doesn't end the boot that came after it
    a restart is an update                 a new boot id takes the place of the old one; if the old one goes on
                                           beating, two agents use one name, and that is said with both hosts

Events become signals (what an event means for one device), signals move along NEXT, and nothing here does I/O:
`Fleet.after` is the whole protocol. Times are monotonic seconds of the coordinator, given with each event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from coordinator.device import Device, restarted, took_charge, with_host
from coordinator.notices import Notice, notice
from coordinator.presence import NEXT, SAID, Presence, Signal
from hwprofiles.profile import Profile
from wire.ids import is_name
from wire.limits import MAX_DEVICES, OFFLINE_AFTER_S, SUSPECT_AFTER_S
from wire.messages import Applied, DeviceInfo, DeviceState, Telemetry

__all__ = [
    "AppliedArrived",
    "Device",
    "Fleet",
    "FleetEvent",
    "InfoArrived",
    "LinkDown",
    "LinkUp",
    "MdnsGone",
    "MdnsSeen",
    "Notice",
    "Presence",
    "ProfileArrived",
    "StateArrived",
    "TelemetryArrived",
    "Tick",
    "Unanswered",
]

JOIN_PATIENCE_S: Final = 10.0
"""How long a device may be visible over mDNS before its absence from the broker is worth a notice: an agent retries
every second, so ten attempts have failed by then."""

RIVAL_BEATS: Final = 2
"""Heartbeats of a boot that was replaced, before they mean a second agent: one may still have been under way."""

MAX_COUNTED: Final = 64
"""Different things counted as ignored; names come from code, so this is never reached unless by a defect."""


class StateArrived(NamedTuple):
    device: str
    state: DeviceState
    now_s: float


class InfoArrived(NamedTuple):
    device: str
    info: DeviceInfo
    now_s: float


class ProfileArrived(NamedTuple):
    device: str
    profile: Profile
    now_s: float


class AppliedArrived(NamedTuple):
    device: str
    applied: Applied
    now_s: float


class TelemetryArrived(NamedTuple):
    device: str
    telemetry: Telemetry
    now_s: float


class MdnsSeen(NamedTuple):
    device: str
    boot: str
    host: str
    now_s: float


class MdnsGone(NamedTuple):
    device: str
    now_s: float


class Unanswered(NamedTuple):
    """A stage on the device did not answer in time, however its heartbeat goes."""

    device: str
    now_s: float


class LinkDown(NamedTuple):
    """Our own connection to the broker is lost: silence means nothing until it is back."""

    now_s: float


class LinkUp(NamedTuple):
    """Our own connection is there (again): silence counts from here."""

    now_s: float


class Tick(NamedTuple):
    now_s: float


Message = StateArrived | InfoArrived | ProfileArrived | AppliedArrived | TelemetryArrived
DeviceEvent = Message | MdnsSeen | MdnsGone | Unanswered
FleetEvent = DeviceEvent | LinkDown | LinkUp | Tick


class Fleet(Struct, frozen=True, kw_only=True):
    """All devices of a site. Immutable: `after` gives the next one."""

    devices: Mapping[str, Device] = {}
    ignored: Mapping[str, int] = {}
    """What was not taken, by what it was: late wills, rivals, illegal names, steps that are not in NEXT."""
    listening_since_s: float | None = 0.0
    """Since when silence can be judged; None while our own connection is down."""

    def after(self, event: FleetEvent) -> tuple[Fleet, tuple[Notice, ...]]:
        """Give the fleet after `event`, and what people should know of it."""
        if isinstance(event, LinkDown):
            return msgspec.structs.replace(self, listening_since_s=None), ()
        if isinstance(event, LinkUp):
            return msgspec.structs.replace(self, listening_since_s=event.now_s), ()
        if isinstance(event, Tick):
            return _after_tick(self, event.now_s)
        return _after_device_event(self, event)


class _Step(NamedTuple):
    """A device with what an event told about it, the signal this is, and what was not taken of it."""

    device: Device
    signal: Signal | None
    ignored: str = ""
    notices: tuple[Notice, ...] = ()


def _after_device_event(fleet: Fleet, event: DeviceEvent) -> tuple[Fleet, tuple[Notice, ...]]:
    if not is_name(event.device):
        return _counting(fleet, "illegal device name"), ()
    device = fleet.devices.get(event.device)
    if device is None:
        if isinstance(event, MdnsGone | Unanswered):
            return fleet, ()
        fleet, admitted = _with_room(fleet)
        if not admitted:
            full = notice("fleet-full", device=event.device, limit=MAX_DEVICES)
            first = "fleet full" not in fleet.ignored
            return _counting(fleet, "fleet full"), (full,) if first else ()
        device = Device(name=event.device, since_s=event.now_s)
    step = _step(device, event)
    if step.ignored:
        fleet = _counting(fleet, step.ignored)
    fleet, notices = _moved(fleet, device, step, event.now_s)
    return fleet, (*notices, *step.notices)


def _moved(fleet: Fleet, before: Device, step: _Step, now_s: float) -> tuple[Fleet, tuple[Notice, ...]]:
    """Move a device along NEXT. A step that isn't there is counted by name, and the presence stays."""
    after, signal = step.device, step.signal
    if signal is None:
        return _holding(fleet, after) if after.name in fleet.devices else fleet, ()
    key = (before.presence, signal)
    if key not in NEXT:
        return _holding(_counting(fleet, f"{signal.name} in {before.presence.value}"), after), ()
    presence = NEXT[key]
    if presence is None:
        return _without(fleet, before.name), ()
    if presence is not before.presence:
        after = msgspec.structs.replace(after, presence=presence, since_s=now_s)
    said = (_said(SAID[key], before, after, now_s),) if key in SAID else ()
    return _holding(fleet, after), said


def _said(code: str, before: Device, after: Device, now_s: float) -> Notice:
    silent_s = now_s - (before.beat_s if before.beat_s is not None else before.since_s)
    reason = f": {after.state.reason}" if after.state and after.state.reason else ""
    return notice(
        code,
        device=after.name,
        host=after.host,
        silent_s=silent_s,
        reason=reason,
        old=f"boot {before.boot}" if before.boot else "an earlier boot",
        new=f"boot {after.boot}",
    )


def _step(device: Device, event: DeviceEvent) -> _Step:
    return _STEPS[type(event)](device, event)


def _on_state(device: Device, event: StateArrived) -> _Step:
    state, now_s = event.state, event.now_s
    device = msgspec.structs.replace(device, heard_s=now_s)
    if state.boot != device.boot and device.boot:
        if state.state == "offline":
            return _Step(device, None, ignored="last will of an earlier boot")
        if state.boot in device.retired and device.in_charge(now_s):
            return _Step(device, None, ignored="state of a replaced boot")
        device = msgspec.structs.replace(restarted(device, state.boot, now_s), state=state)
        return _Step(device, Signal.RESTARTED)
    device = msgspec.structs.replace(took_charge(device, state.boot, now_s), state=state)
    if state.state == "offline":
        return _Step(device, Signal.LEFT)
    return _Step(device, Signal.READY if device.complete(now_s) else Signal.SPOKE)


def _on_info(device: Device, event: InfoArrived) -> _Step:
    info, now_s = event.info, event.now_s
    device = msgspec.structs.replace(device, heard_s=now_s)
    if info.device != device.name:
        return _Step(device, None, ignored="info of another name")
    if info.boot in device.retired:
        hosts = with_host(device, info.boot, _host_of(info))
        return _Step(msgspec.structs.replace(device, hosts=hosts), None, ignored="info of a replaced boot")
    hosts = with_host(device, info.boot, _host_of(info))
    device = msgspec.structs.replace(device, info=info, hosts=hosts)
    return _Step(device, Signal.READY if device.complete(now_s) else Signal.TOLD)


def _on_profile(device: Device, event: ProfileArrived) -> _Step:
    return _Step(msgspec.structs.replace(device, heard_s=event.now_s, profile=event.profile), Signal.TOLD)


def _on_applied(device: Device, event: AppliedArrived) -> _Step:
    applied = event.applied
    device = msgspec.structs.replace(device, heard_s=event.now_s)
    if applied.device != device.name:
        return _Step(device, None, ignored="applied of another name")
    if applied.boot in device.retired:
        return _Step(device, None, ignored="applied of a replaced boot")
    return _Step(msgspec.structs.replace(device, applied=applied), Signal.TOLD)


def _on_telemetry(device: Device, event: TelemetryArrived) -> _Step:
    boot, now_s = event.telemetry.boot, event.now_s
    device = msgspec.structs.replace(device, heard_s=now_s)
    if device.boot and boot != device.boot:
        if device.in_charge(now_s):
            return _rival(device, boot, now_s)
        device = restarted(device, boot, now_s)
        return _Step(msgspec.structs.replace(device, telemetry=event.telemetry, beat_s=now_s), Signal.RESTARTED)
    device = took_charge(device, boot, now_s)
    device = msgspec.structs.replace(device, telemetry=event.telemetry, beat_s=now_s)
    return _Step(device, Signal.READY if device.complete(now_s) else Signal.BEAT)


def _on_mdns_seen(device: Device, event: MdnsSeen) -> _Step:
    hosts = with_host(device, event.boot, event.host)
    return _Step(msgspec.structs.replace(device, advertised=True, hosts=hosts), Signal.ADVERTISED)


def _on_mdns_gone(device: Device, _event: MdnsGone) -> _Step:
    return _Step(msgspec.structs.replace(device, advertised=False), Signal.WITHDRAWN)


def _on_unanswered(device: Device, _event: Unanswered) -> _Step:
    """What it beat before is no sign of life any more."""
    return _Step(msgspec.structs.replace(device, beat_s=None), Signal.UNANSWERING)


_STEPS: Final[Mapping[type, Callable[..., _Step]]] = {
    StateArrived: _on_state,
    InfoArrived: _on_info,
    ProfileArrived: _on_profile,
    AppliedArrived: _on_applied,
    TelemetryArrived: _on_telemetry,
    MdnsSeen: _on_mdns_seen,
    MdnsGone: _on_mdns_gone,
    Unanswered: _on_unanswered,
}


def _rival(device: Device, boot: str, now_s: float) -> _Step:
    """A heartbeat of another boot while one is in charge: late, or of a second agent with the same name."""
    answered = device.beat_s is not None and (device.rival_s is None or device.beat_s > device.rival_s)
    beats = device.rival_beats + 1 if answered else device.rival_beats
    device = msgspec.structs.replace(device, rival_beats=beats, rival_s=now_s)
    if beats < RIVAL_BEATS or "identity-twice" in device.told:
        return _Step(device, None, ignored="heartbeat of another boot")
    other_host = device.hosts.get(boot, f"an unknown address (boot {boot})")
    twice = notice("identity-twice", device=device.name, host=device.host, other_host=other_host)
    device = msgspec.structs.replace(device, told=(*device.told, "identity-twice"))
    return _Step(device, None, ignored="heartbeat of another boot", notices=(twice,))


def _host_of(info: DeviceInfo) -> str:
    return ", ".join(info.addresses) or info.board


def _after_tick(fleet: Fleet, now_s: float) -> tuple[Fleet, tuple[Notice, ...]]:
    """Judge silence, unless we ourselves hear nothing."""
    if fleet.listening_since_s is None:
        return fleet, ()
    notices: list[Notice] = []
    listening_since_s = fleet.listening_since_s
    for device in fleet.devices.values():
        if device.presence is Presence.OFFLINE:
            continue
        if device.presence is Presence.SEEN:
            told, said = _not_joining(device, now_s)
            fleet = _holding(fleet, told)
        else:
            alive_s = device.beat_s if device.beat_s is not None else device.since_s
            silent_s = now_s - max(alive_s, listening_since_s)
            if silent_s < SUSPECT_AFTER_S:
                continue
            signal = Signal.SILENT if silent_s >= OFFLINE_AFTER_S else Signal.QUIET
            fleet, said = _moved(fleet, device, _Step(device, signal), now_s)
        notices += said
    return fleet, tuple(notices)


def _not_joining(device: Device, now_s: float) -> tuple[Device, tuple[Notice, ...]]:
    waited_s = now_s - device.since_s
    if waited_s < JOIN_PATIENCE_S or "device-not-joining" in device.told:
        return device, ()
    said = notice("device-not-joining", device=device.name, host=device.host, waited_s=waited_s)
    return msgspec.structs.replace(device, told=(*device.told, "device-not-joining")), (said,)


def _with_room(fleet: Fleet) -> tuple[Fleet, bool]:
    """Make room for one more device: one that was merely seen is forgotten first, then who is longest offline."""
    if len(fleet.devices) < MAX_DEVICES:
        return fleet, True
    absent = [d for d in fleet.devices.values() if d.presence in (Presence.OFFLINE, Presence.SEEN)]
    if not absent:
        return fleet, False
    return _without(fleet, min(absent, key=lambda d: (d.presence is Presence.OFFLINE, d.since_s, d.name)).name), True


def _holding(fleet: Fleet, device: Device) -> Fleet:
    return msgspec.structs.replace(fleet, devices={**fleet.devices, device.name: device})


def _without(fleet: Fleet, name: str) -> Fleet:
    devices = {other: device for other, device in fleet.devices.items() if other != name}
    return msgspec.structs.replace(fleet, devices=devices)


def _counting(fleet: Fleet, what: str) -> Fleet:
    if what not in fleet.ignored and len(fleet.ignored) >= MAX_COUNTED:
        return fleet
    return msgspec.structs.replace(fleet, ignored={**fleet.ignored, what: fleet.ignored.get(what, 0) + 1})
