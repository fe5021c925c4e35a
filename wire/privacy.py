"""What a job may come to know of boards' data, as orders say it."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct


class Channel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An emulated uplink (models.privacy.channel)."""

    power: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    """Most that a board sends with."""
    gain: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    """Mean |h|, Rayleigh in each round."""
    sigma: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    """Of the channel's noise."""


class Privacy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a job may come to know of the data, and what a device does for that."""

    epsilon: Annotated[float, Meta(gt=0, le=1e6)]
    """Of each device, over all rounds of the job."""
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    unit: Literal["sample", "device"] = "sample"
    """Whose presence can't be told: 'sample': one sample; noise goes on each step's gradient, a sum of clipped ones of
    samples that were drawn by chance. 'device': all data of the device; noise goes on what a round has changed."""
    clip: Annotated[float, Meta(gt=0, le=1e9)] = 1.0
    """Most that the norm of a sample's gradient, or of a device's change, is left with."""
    by: Literal["joint", "per-factor"] = "joint"
    """'per-factor': A and B are clipped to `clip` each."""
    losses: bool = False
    """Whether losses are told, in the clear."""
    channel: Channel | None = None
