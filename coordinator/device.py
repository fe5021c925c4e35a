"""What is known of one device, and which of its boots speaks for it. Pure data and pure steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Struct

from coordinator.presence import Presence
from hwprofiles.profile import Profile
from wire.limits import SUSPECT_AFTER_S
from wire.messages import Applied, DeviceInfo, DeviceState, Telemetry

RETIRED_KEPT: Final = 8
"""Earlier boots remembered per device: enough to know a late will or a rival, few enough to bound memory."""


class Device(Struct, frozen=True, kw_only=True):
    """What is known of one device. Times are monotonic; None: not yet."""

    name: str
    presence: Presence = Presence.SEEN
    since_s: float
    """When it came into this presence."""
    boot: str = ""
    """The boot that speaks for the device; '' until the broker carried one."""
    state: DeviceState | None = None
    info: DeviceInfo | None = None
    profile: Profile | None = None
    applied: Applied | None = None
    telemetry: Telemetry | None = None
    heard_s: float | None = None
    """When anything came from it over the broker, retained or not."""
    beat_s: float | None = None
    """When the last heartbeat of `boot` came: the only sign of life."""
    advertised: bool = False
    """Whether mDNS shows it; says nothing about life."""
    hosts: Mapping[str, str] = {}
    """Boot -> where it runs, as far as info or mDNS told."""
    retired: tuple[str, ...] = ()
    """Boots that were replaced, the latest last."""
    boot_since_s: float | None = None
    """When `boot` took charge."""
    rival_beats: int = 0
    """Heartbeats of other boots, each with one of `boot` since the last: a late one is alone, a second agent isn't."""
    rival_s: float | None = None
    """When the last of them came."""
    told: tuple[str, ...] = ()
    """Notices that are given once until the cause is over."""

    @property
    def host(self) -> str:
        return self.hosts.get(self.boot) or next(iter(self.hosts.values()), "an unknown address")

    def complete(self, now_s: float) -> bool:
        """Info and a fresh heartbeat of the boot in charge, which did not say offline.

        The state itself may be missing: a late last will of an earlier boot can have overwritten what is retained.
        """
        left = self.state is not None and self.state.boot == self.boot and self.state.state == "offline"
        return not left and self.info is not None and self.info.boot == self.boot and self.beating(now_s)

    def beating(self, now_s: float) -> bool:
        return self.beat_s is not None and now_s - self.beat_s < SUSPECT_AFTER_S

    def in_charge(self, now_s: float) -> bool:
        """Whether `boot` beats, or is so new that its first heartbeat may still be on its way."""
        fresh = self.boot_since_s is not None and now_s - self.boot_since_s < SUSPECT_AFTER_S
        return fresh or self.beating(now_s)


def took_charge(device: Device, boot: str, now_s: float) -> Device:
    """The device with its first boot in charge; unchanged if there is one."""
    return device if device.boot else msgspec.structs.replace(device, boot=boot, boot_since_s=now_s)


def restarted(device: Device, boot: str, now_s: float) -> Device:
    """The device with another boot in charge: what the old one said of itself no longer counts."""
    retired = (*(old for old in device.retired if old not in (boot, device.boot)), device.boot)[-RETIRED_KEPT:]
    return msgspec.structs.replace(
        device,
        boot=boot,
        boot_since_s=now_s,
        state=None,
        applied=device.applied if device.applied and device.applied.boot == boot else None,
        telemetry=None,
        beat_s=None,
        retired=retired,
        rival_beats=0,
        rival_s=None,
        told=(),
    )


def with_host(device: Device, boot: str, host: str) -> Mapping[str, str]:
    """Where the boots run, with one more; the oldest beyond RETIRED_KEPT are dropped."""
    hosts = {known: where for known, where in device.hosts.items() if known != boot}
    hosts[boot] = host
    return dict(list(hosts.items())[-RETIRED_KEPT:])
