"""Parcels of kind ROWS: the next row of each of several requests in one tensor, whose first dimension counts them.

Meta says whose each row is, 12 bytes a row, little-endian:

    0  request   u64
    8  position  u32   number of the row in that request

The frame's own request and position are 0. A request has one row at most. Every check is made before anything is
allocated for a row; what fails is a MalformedFrame.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from wire.errors import MalformedFrame
from wire.limits import MAX_LIVE_REQUESTS

_ROW: Final = struct.Struct("<QI")
ROW_BYTES: Final = _ROW.size


class RowOf(NamedTuple):
    """Whose row it is, and which."""

    request: int
    position: int


def rows_meta(rows: Sequence[RowOf]) -> bytes:
    """Meta of a ROWS parcel; raise ValueError for more than may be (our own fault)."""
    if not 1 <= len(rows) <= MAX_LIVE_REQUESTS:
        raise ValueError(f"{len(rows)} rows in a parcel, 1 to {MAX_LIVE_REQUESTS} are possible")
    return b"".join(_ROW.pack(row.request, row.position) for row in rows)


def rows_in(meta: bytes | memoryview, shape: Sequence[int]) -> tuple[RowOf, ...]:
    """Whose rows a ROWS parcel with this meta and a tensor of this shape carries; raise MalformedFrame."""
    count = len(meta) // ROW_BYTES
    if count * ROW_BYTES != len(meta) or not 1 <= count <= MAX_LIVE_REQUESTS:
        raise MalformedFrame(f"meta of {len(meta)} bytes names no rows, 1 to {MAX_LIVE_REQUESTS} of {ROW_BYTES} bytes")
    if not shape or shape[0] != count:
        raise MalformedFrame(f"{count} rows are named, the tensor is {tuple(shape)}")
    rows = tuple(RowOf(*row) for row in _ROW.iter_unpack(meta))
    if len({row.request for row in rows}) != count:
        raise MalformedFrame("two rows of one request in a parcel")
    return rows
