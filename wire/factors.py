"""What orders and rounds say of factors that are not the same on all devices."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

Begins = Literal["shared", "own-b", "fresh"]
"""With what a device's rounds begin. 'shared': with all factors as they come. 'own-b': A comes and goes, B is the
device's own: it is trained, kept there and never sent. 'fresh': A is drawn anew by seed and round, B is zeros, beside
factors of any rank that come and are not trained: as many ranks as there are numbers."""

OwnRound = Annotated[int, Meta(ge=-1, le=2**53)]
"""The last round whose update of a device counted; -1: none has."""
