"""A model of several modalities: a linear connector of each, from its features into a space of `width` that they share,
and a task module there."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from msgspec import Struct


class ModalitiesConfig(Struct, frozen=True, kw_only=True):
    """`features`: modality -> numbers that a sample of it has. There are no blocks, and no words."""

    width: int
    features: Mapping[str, int]

    @property
    def hidden(self) -> int:
        """What the task module looks at."""
        return self.width

    @property
    def blocks(self) -> int:
        return 0

    @property
    def vocabulary(self) -> int:
        return 1

    def of(self, owned: Collection[str]) -> ModalitiesConfig:
        """What a device with these modalities has of it."""
        features = {name: count for name, count in self.features.items() if name in owned}
        return ModalitiesConfig(width=self.width, features=features)

    def connectors(self) -> dict[str, tuple[int, int]]:
        """Name -> [width, features + 1] of each connector, the last column its bias."""
        return {f"connector.{name}.c": (self.width, count + 1) for name, count in sorted(self.features.items())}

    def check_context(self, tokens: int) -> None:
        """Samples are no texts."""
