"""A reading is present, absent or failed; none of the three is ever shown as another."""

from __future__ import annotations

from typing import Generic, TypeVar

from msgspec import Struct

T = TypeVar("T")


class Reading(Struct, Generic[T], frozen=True, tag="reading"):
    """A value and where it came from."""

    value: T
    source: str


class Absent(Struct, frozen=True, tag="absent"):
    """The board has no such thing, or nothing is known of it yet."""

    because: str


class Failed(Struct, frozen=True, tag="failed"):
    """The board has it, but reading it failed."""

    because: str
