"""What is said in a sum of which nobody learns a part (docs/decisions/0029-secure-aggregation.md)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from wire import limits
from wire.messages import Name


class SummedDevice(Struct, frozen=True, kw_only=True):
    """A device of a sum, as all others of it are told of it."""

    device: Name
    samples: Annotated[int, Meta(ge=1, le=2**53)]
    """Its weight."""


class SecureMeta(Struct, frozen=True, kw_only=True):
    """Rides in front of a step of a sum (models.secure.session), both of what is asked and of what is answered. The
    request is that of the round.

    step     asked with                                       answered with
    keys     nothing                                          its public keys, uint8 [64]
    shares   public keys of all, uint8 [devices, 64]          shares for all, sealed, uint8 [devices, 82]
    masked   what the others sealed for it, the same          the change, masked, int32 [m]
    reveal   nothing                                          shares, uint8 [devices, 33]
    """

    session: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    """Another one each time that a sum is begun anew."""
    step: Literal["keys", "shares", "masked", "reveal"]
    devices: Annotated[tuple[SummedDevice, ...], Meta(max_length=limits.MAX_SUMMED)] = ()
    """Asked with shares: all, in the order of their names, which is that of rows."""
    farthest: Annotated[float, Meta(ge=0, le=1e30)] = 0.0
    """Asked with shares: what no element of a change is beyond."""
    among: Annotated[tuple[Name, ...], Meta(max_length=limits.MAX_SUMMED)] = ()
    """Asked with masked: those whose shares came; with reveal: those whose masked changes came."""
