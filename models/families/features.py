"""A model of which the task module alone is trained: samples come to it as features that never change."""

from __future__ import annotations

from msgspec import Struct


class FeatureConfig(Struct, frozen=True, kw_only=True):
    """`hidden`: features of a sample. It has no blocks, and no words."""

    hidden: int

    @property
    def blocks(self) -> int:
        return 0

    @property
    def vocabulary(self) -> int:
        return 1

    def check_context(self, tokens: int) -> None:
        """Samples are no texts."""
