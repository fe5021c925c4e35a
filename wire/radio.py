"""An emulated radio channel, as a private job may ask for one."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class Channel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An emulated uplink (models.privacy.channel)."""

    power: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    """Most that a board sends with."""
    gain: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    """Mean |h|, Rayleigh in each round."""
    sigma: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    """Of the channel's noise."""
