"""Engines on which stages of a deployment could not be loaded, though their boards measured themselves on them. Pure.

A board that loads a stage on another engine than was ordered says so. Until it starts anew or has measured itself anew,
that deployment is planned without that engine there: else every plan would reckon with a speed that does not come, and
the board would be taken for a slow one. Other deployments may be smaller, and are planned as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from wire.messages import EngineName


class Failure(Struct, frozen=True):
    """A deployment on an engine of a board."""

    device: str
    deployment: str
    engine: EngineName


class Fallen:
    """All boards of a site."""

    def __init__(self) -> None:
        self._because: dict[Failure, tuple[str, str]] = {}
        """Failure -> (boot of the board, what the board says)."""

    def saw(self, failure: Failure, boot: str, because: str) -> None:
        self._because[failure] = boot, because

    def of(self, device: str, deployment: str, boot: str) -> Mapping[str, str]:
        """Engine -> why it does without, for a board that is in this boot."""
        return {
            failure.engine: because
            for failure, (seen, because) in self._because.items()
            if (failure.device, failure.deployment, seen) == (device, deployment, boot)
        }

    @property
    def all(self) -> frozenset[Failure]:
        return frozenset(self._because)

    def forget(self, devices: Iterable[str]) -> None:
        """These boards are gone, or have measured themselves anew."""
        gone = set(devices)
        self._because = {failure: why for failure, why in self._because.items() if failure.device not in gone}

    def keep(self, deployments: Iterable[str]) -> None:
        """There are no others."""
        names = set(deployments)
        self._because = {failure: why for failure, why in self._because.items() if failure.deployment in names}
