"""What a hop takes where the way between two boards was measured; else what their own links say. Pure.

A pair's figures are of the way straight from one board to the broker of the other (hwprofiles.pairs), and are taken
where that way is shorter than the one through the site's broker, by the rule of coordinator.planning.topology:

    hop_s(d -> e, b)      = round trip / 2 + max(0, b - P) / rate(d -> e)
    transfer_s(d -> e, b) = b / rate(d -> e)

The site's broker stores a message and forwards it, so that a message crosses two links one after the other; on the
straight way it is on both at once, and `rate` is that of the slower one, as measured in this direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from hwprofiles import pairs as measured
from hwprofiles.profile import PairMeasurement, Profile

FASTEST_BYTES_PER_S: Final = 1e9
"""Of loads whose chunks all came at once."""


class PairCost(Struct, frozen=True, kw_only=True):
    """A way from one board to another. Now it takes `more_s` longer than it was measured, and its bytes `times` as long
    (coordinator.slowlinks)."""

    one_way_s: float
    probe_bytes: int
    bytes_per_s: float
    measured_at_unix: float
    times: float = 1.0
    more_s: float = 0.0

    def hop_s(self, payload_bytes: int) -> float:
        beyond_bytes = max(0, payload_bytes - self.probe_bytes)
        return self.one_way_s + self.more_s + self.times * beyond_bytes / self.bytes_per_s

    def transfer_s(self, payload_bytes: int) -> float:
        return self.times * payload_bytes / self.bytes_per_s


Pair = tuple[str, str]
"""Sender and receiver."""

Direct = Mapping[Pair, PairCost]


def direct_of(profiles: Mapping[str, Profile], brokers: Mapping[str, str]) -> dict[Pair, PairCost]:
    """The ways that were measured between boards that both have brokers of their own, in both directions; the latest
    measurement of each. `brokers`: device -> URL of its own, '' if it has none."""
    found: dict[Pair, PairCost] = {}
    for device, profile in profiles.items():
        for pair in profile.pairs:
            if pair.way != "direct" or not (brokers.get(device) and brokers.get(pair.peer)):
                continue
            for ends, cost in _costs(device, pair):
                known = found.get(ends)
                if known is None or known.measured_at_unix < cost.measured_at_unix:
                    found[ends] = cost
    return found


def _costs(device: str, pair: PairMeasurement) -> list[tuple[Pair, PairCost]]:
    one_way_s = measured.one_way_s(pair)
    if one_way_s is None:
        return []
    return [
        (
            ends,
            PairCost(
                one_way_s=one_way_s,
                probe_bytes=pair.round_trip_payload_bytes,
                bytes_per_s=measured.bytes_per_s(goodput) or FASTEST_BYTES_PER_S,
                measured_at_unix=pair.measured_at_unix,
            ),
        )
        for ends, goodput in (((device, pair.peer), pair.there), ((pair.peer, device), pair.back))
    ]
