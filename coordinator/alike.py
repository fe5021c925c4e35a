"""What the boards of a deployment have in common, which is no board's fault. Pure.

A step in a stage is not quite what was measured: other steps are between two of them, so caches are colder; a machine
that carries several boards is busier. Stages of boards in good health took up to 1.5 times as long as profiles of a
quick measuring said, all of them alike. So a board is compared with the others that work on the same deployment; one
that works alone, with itself as it was at first. Faster than promised is nothing to be compared with: nobody is slow
who keeps his promise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from statistics import median
from typing import Final

from coordinator.promised import Ratio

RECENT_S: Final = 10.0
"""Older windows of other boards say nothing of now."""

FIRST_WINDOWS: Final = 5
"""Which a board that works alone is compared with."""

_Key = tuple[str, str]
"""Deployment and device."""


class Alike:
    """The last windows of all boards, by deployment."""

    def __init__(self) -> None:
        self._last: dict[_Key, tuple[float, Ratio]] = {}
        self._first: dict[_Key, list[Ratio]] = {}

    def common(self, deployment: str, device: str, slow: Mapping[str, float], now_s: float) -> float:
        """How many times as long as promised the others take at the moment, at the least 1; 1 for a board alone."""
        others = self._others(deployment, device, slow, now_s)
        return max(1.0, median(other.least for other in others)) if others else 1.0

    def _others(self, deployment: str, device: str, slow: Mapping[str, float], now_s: float) -> list[Ratio]:
        return [
            _over(seen, slow.get(other, 1.0))
            for (where, other), (at_s, seen) in self._last.items()
            if where == deployment and other != device and now_s - at_s <= RECENT_S
        ]

    def beside(
        self, deployment: str, device: str, ratio: Ratio, slow: Mapping[str, float], now_s: float
    ) -> Ratio | None:
        """How many times as long a board took as the others would have; None while there is nothing to compare with.

        `slow`: boards that are known to take so many times as long, for which nobody else should be blamed or excused.
        """
        own = _over(ratio, slow.get(device, 1.0))
        others = self._others(deployment, device, slow, now_s)
        self._last[deployment, device] = (now_s, ratio)
        if not others:
            others = self._first.setdefault((deployment, device), [])
            if len(others) < FIRST_WINDOWS:
                others.append(own)
                return None
        least, most = median(other.least for other in others), median(other.most for other in others)
        return Ratio(ratio.least / max(1.0, least), ratio.most / max(1.0, most))

    def forget(self, devices: Collection[str]) -> None:
        """These are gone, or were measured anew."""
        self._keep(lambda _deployment, device: device not in devices)

    def keep(self, deployments: Collection[str]) -> None:
        """All others are no more."""
        self._keep(lambda deployment, _device: deployment in deployments)

    def _keep(self, wanted: Callable[[str, str], bool]) -> None:
        self._last = {key: seen for key, seen in self._last.items() if wanted(*key)}
        self._first = {key: seen for key, seen in self._first.items() if wanted(*key)}


def _over(ratio: Ratio, times: float) -> Ratio:
    return Ratio(ratio.least / times, ratio.most / times)
