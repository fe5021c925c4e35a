"""Errors say whose fault, what happened and what to do, in two lines and with an exit code.

    EdgelamError
     ├─ UsageError         2   the command line or a file given by the user is wrong
     ├─ Refused            3   a rule says no (unsupported model, identity in use, unlike conditions)
     │   └─ Busy               others come first: the same may be asked again in a moment
     ├─ Unreachable        4   broker, coordinator or device can't be reached
     ├─ Degraded           5   it worked, but not all of it
     ├─ CorruptData        1   a file or an artifact is damaged
     └─ PeerError          1   something that came from the network breaks the protocol
         └─ MalformedFrame

A message names what and where; `try_` is the next thing the user can do. A user never sees a traceback for a user's
mistake: the command lines catch EdgelamError once and print `render(error)`.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of both programs; docs/exit-codes.md is generated from this table."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNREACHABLE = 4
    DEGRADED = 5
    INTERRUPTED = 130


class EdgelamError(Exception):
    """Base of all errors that a user may see."""

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, try_: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.try_ = try_


class UsageError(EdgelamError):
    exit_code = ExitCode.USAGE


class Refused(EdgelamError):
    exit_code = ExitCode.REFUSED


class Busy(Refused):
    """There are more requests than can be served now."""


class Unreachable(EdgelamError):
    exit_code = ExitCode.UNREACHABLE


class Degraded(EdgelamError):
    exit_code = ExitCode.DEGRADED


class CorruptData(EdgelamError):
    """A file or artifact is damaged; nothing of it was used."""


class PeerError(EdgelamError):
    """A peer broke the protocol; what it sent was dropped and counted."""


class MalformedFrame(PeerError):
    """Bytes that are no frame of ours, or a frame that contradicts itself."""


def render(error: EdgelamError, program: str = "edgelam") -> str:
    """Give the two lines a user sees."""
    first = f"{program}: {error.message}"
    return f"{first}\n  try: {error.try_}" if error.try_ else first
