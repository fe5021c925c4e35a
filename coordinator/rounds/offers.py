"""What devices would bring to a round, from what they took in rounds before and from their measured links. Pure.

A device that was never timed counts as fast: so it is tried, and known from then on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from msgspec import Struct

from coordinator.rounds.airtime import Offer
from hwprofiles.link import bytes_per_s
from hwprofiles.profile import LinkMeasurement, Profile

NEW: Final = 0.5
"""Weight of the newest round in what is known of a device (EWMA): it warms up, and other programs come and go."""
CLEAR: Final = 0.1
"""Of a round's time, or of a second: a transfer that takes less says nothing of a link's rate."""
SLOWER: Final = 0.6
"""Of its known rate: a board that keeps to a pace is only taken for slower when it is clearly slower than that."""
UNKNOWN_BYTES_PER_S: Final = 1e9


class Timing(Struct, frozen=True, kw_only=True):
    """Of one device in one job."""

    compute_s: float = 0.0
    """All of a round but the ways of the factors; of a split model's, all that it takes by itself, ways too."""
    bytes_per_s: float = 0.0
    """Each way, with the medium to itself; 0: only what its profile says."""
    warm: bool = False
    """Of a split model: timed twice at least. Its first round loads what later ones find there, and counts no more."""


class Took(Struct, frozen=True, kw_only=True):
    """A device's part in a round that is over."""

    wall_s: float
    """From the question to the whole answer."""
    compute_s: float
    """0: not told."""
    down_bytes: int
    up_bytes: int
    share: float = 1.0
    paced: bool = False
    """It was told how fast to send: that it did not send faster says nothing of its link."""
    sharers: int = 1
    """How many were sent the factors over the same medium."""


def offer_of(
    device: str, timing: Timing, measured: float | None, down_bytes: int, up_bytes: int, samples: int, sharers: int = 1
) -> Offer:
    """`measured`: bytes/s of its link by its profile; `sharers`: to how many factors are sent over the same medium, at
    most."""
    rate = timing.bytes_per_s or measured or UNKNOWN_BYTES_PER_S
    return Offer(device, timing.compute_s + down_bytes * sharers / rate, float(up_bytes), rate, float(max(1, samples)))


def learnt(timing: Timing | None, measured: float | None, took: Took) -> Timing:
    """What is known of a device after a round."""
    before = timing or Timing()
    known = before.bytes_per_s or measured
    crossed = took.down_bytes * took.sharers + took.up_bytes / took.share
    told_s = min(took.compute_s, took.wall_s)
    net_s = took.wall_s - told_s
    heard = before.bytes_per_s
    if told_s > 0 and net_s >= CLEAR * max(1.0, took.wall_s):
        rate = crossed / net_s
        if known is None or not took.paced or not SLOWER * known < rate < known:
            heard = _mixed(known, rate)
    # What the ways do not explain at the rate that the next round is planned with is the device's, whatever it is.
    rest_s = max(told_s, took.wall_s - crossed / (heard or known or UNKNOWN_BYTES_PER_S))
    return Timing(compute_s=_mixed(before.compute_s or None, rest_s), bytes_per_s=heard)


def joint_offer_of(device: str, timing: Timing, samples: int) -> Offer:
    """Of a round of a split model: nothing crosses but what is in its own time."""
    return Offer(device, timing.compute_s, 0.0, UNKNOWN_BYTES_PER_S, float(max(1, samples)))


def learnt_together(
    timing: Mapping[str, Timing], each_s: float | None, own_s: Mapping[str, float], took_s: float | None
) -> tuple[dict[str, Timing], float | None]:
    """What is known of devices, and of what each adds, after a round of a split model in which they took so long by
    themselves; `took_s`: the round, None where it was begun more than once."""
    found, warm = dict(timing), True
    for device, own in own_s.items():
        before = timing.get(device)
        is_warm = before is not None and before.warm
        known = before.compute_s if before is not None and is_warm else None
        found[device] = Timing(compute_s=_mixed(known, own), warm=before is not None)
        warm = warm and is_warm
    if own_s and took_s is not None:
        each_s = _mixed(each_s if warm else None, max(0.0, took_s - max(own_s.values())) / len(own_s))
    return found, each_s


def _mixed(before: float | None, now: float) -> float:
    return now if before is None else (1 - NEW) * before + NEW * now


def weights_of(samples: Mapping[str, int], devices: Collection[str]) -> dict[str, int]:
    """Samples of each device; who never told is taken for an average one."""
    known = [samples[device] for device in devices if samples.get(device)]
    usual = round(sum(known) / len(known)) if known else 1
    return {device: samples.get(device) or usual for device in devices}


def link_rate(profile: Profile | None) -> float | None:
    """Bytes/s of a board's link, as it measured it."""
    return bytes_per_s(profile.link) if profile and isinstance(profile.link, LinkMeasurement) else None
