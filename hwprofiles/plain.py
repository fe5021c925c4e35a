"""Readings for terminals and as JSON: text without control characters, named tuples as objects (msgspec writes them as
arrays, which say nothing to a reader).
"""

from __future__ import annotations

import msgspec


def clean(text: str) -> str:
    """Text without control characters and line breaks."""
    return "".join(character if character.isprintable() else "?" for character in text)


def named(value: object) -> object:
    """The same value of dicts, lists and scalars, with named tuples and structs as dicts."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        found = {name: named(getattr(value, name)) for name in value.__struct_fields__}
        return {"type": tag, **found} if isinstance(tag, str) else found
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: named(one) for name, one in value._asdict().items()}
    if isinstance(value, dict):
        return {name: named(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [named(one) for one in value]
    return value
