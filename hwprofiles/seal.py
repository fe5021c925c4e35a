"""A seal on a profile in a file: whether somebody changed it after it was measured. Against slips, not against malice:
who wants to can make another seal.

The seal is a digest of all else that the document says, however it is indented or ordered. It is no field of a profile:
readers who don't know it leave it out. Files without one, from earlier versions, are taken.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

KEY: Final = "seal"


def sealed(data: bytes) -> bytes:
    """The JSON object `data` with its seal at the end."""
    seal = msgspec.json.encode({KEY: _digest(msgspec.json.decode(data))})
    return data.rstrip()[:-1] + b"," + seal[1:]


def broken(data: bytes) -> bool:
    """Whether the seal of a JSON object is not the one that it should have; False where there is none."""
    whole = msgspec.json.decode(data)
    seal = whole.pop(KEY, None) if isinstance(whole, dict) else None
    return seal is not None and seal != _digest(whole)


def _digest(whole: object) -> str:
    return f"sha256:{hashlib.sha256(msgspec.json.encode(whole, order='sorted')).hexdigest()}"
