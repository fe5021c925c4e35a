"""What ends a request through no fault of its own: it may go on where it stood, on what is left."""

from __future__ import annotations

from wire.errors import EdgelamError, Refused, Unreachable


class Interrupted(EdgelamError):
    """What was under way is lost. Done again, on another deployment perhaps, it works."""


class Lost(Interrupted, Unreachable):
    """A device, a stage, the broker, or a message between them went away."""


class Overtaken(Interrupted, Refused):
    """A deployment was replaced by another one before it could be used."""
