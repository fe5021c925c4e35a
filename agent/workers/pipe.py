"""What supervisor and workers say to each other: JSON lines, one struct each, over the worker's stdin and stdout.

The first line to a worker is its assignment. End of input means that the supervisor is gone: the worker ends.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from hwprofiles.profile import LinkMeasurement, ModuleMeasurement
from hwprofiles.reading import Absent, Failed
from wire.messages import KitModule, StageCounters, StageOrder

MAX_LINE_BYTES: Final = 4 * 1024 * 1024
"""Longest line either side reads: an order of 4096 weight files with long paths, or a profile with all samples."""

S = TypeVar("S", bound=Struct)


class BrokerLogin(Struct, frozen=True, kw_only=True):
    """How a worker reaches the broker with a connection of its own."""

    url: str
    client_id: str
    username: str = ""
    password: str = ""


class Assignment(Struct, frozen=True, kw_only=True):
    """To an inference worker: hold this stage. Paths belong to `order.graph` and `order.weights`, in order."""

    device: str
    site: str
    order: StageOrder
    graph_path: str
    weight_paths: tuple[str, ...]
    login: BrokerLogin
    threads: int
    speed: float
    memory_limit_bytes: int = 0
    """Emulated memory that the stage must fit in; 0 = none."""


class Tell(Struct, frozen=True, kw_only=True):
    """To a running inference worker."""

    adopt: StageOrder | None = None
    """New epoch, inbox or neighbours for what is loaded; weights and config are left out."""
    stop: bool = False


class Status(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """From an inference worker: at each change, and each second while it is ready."""

    phase: Literal["loading", "ready", "failed"]
    epoch: int
    detail: str = ""
    engine: str = ""
    held_bytes: int = 0
    resident_bytes: int = 0
    counters: StageCounters | None = None
    answered: bool = False
    """A request has just ended: whoever made it waits for the counters."""
    final: bool = False
    """Failed in a way that starting again would not cure."""


class MeasureModule(Struct, frozen=True, kw_only=True):
    module: KitModule
    graph_paths: tuple[tuple[int, str], ...]
    """(number of blocks stacked, file)."""


class MeasureTask(Struct, frozen=True, kw_only=True):
    """To a measuring worker: time these, then the link, then end."""

    device: str
    site: str
    modules: tuple[MeasureModule, ...]
    login: BrokerLogin | None
    """None = leave the link alone."""
    threads: int
    speed: float
    budget_s: float = 0.5
    """Seconds per point."""
    nice: int = 0


class Measured(Struct, frozen=True, kw_only=True):
    """From a measuring worker, the last line: what it got, and per module key why not."""

    modules: tuple[ModuleMeasurement, ...]
    failed: dict[str, str]
    link: LinkMeasurement | Absent | Failed
    engines_loaded: dict[str, str]
    """Engine -> what it said it is, proof that it runs here."""
    allow_spinning: bool


class MeasureNote(Struct, frozen=True, kw_only=True):
    """From a measuring worker: how far it is, for people."""

    note: Annotated[str, Meta(max_length=4096)]


def line_of(message: Struct) -> bytes:
    """One line; JSON has no raw newlines."""
    return msgspec.json.encode(message) + b"\n"


def read_line(line: bytes, kind: type[S]) -> S:
    """Parse a line; raise msgspec.ValidationError or DecodeError."""
    return msgspec.json.decode(line, type=kind)
