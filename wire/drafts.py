"""Tokens guessed for a step: meta of a HIDDEN parcel with FLAG_DRAFTS, int32 little-endian.

The tensor's first row is that of the last token drawn, the others are those of the guesses, in order. The head draws
after each row for as long as the guess for it was right. Every check is made before anything is allocated; what fails
is a MalformedFrame.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from wire.errors import MalformedFrame
from wire.limits import MAX_DRAFTS

TOKEN_BYTES = 4


def drafts_meta(tokens: Sequence[int]) -> bytes:
    """Meta with these guesses; raise ValueError for more than may be (our own fault)."""
    if not 1 <= len(tokens) <= MAX_DRAFTS:
        raise ValueError(f"{len(tokens)} guesses in a parcel, 1 to {MAX_DRAFTS} are possible")
    return struct.pack(f"<{len(tokens)}i", *tokens)


def drafts_in(meta: bytes | memoryview, shape: Sequence[int]) -> tuple[int, ...]:
    """The guesses that ride with a tensor of this shape; raise MalformedFrame."""
    count = len(meta) // TOKEN_BYTES
    if count * TOKEN_BYTES != len(meta) or not 1 <= count <= MAX_DRAFTS:
        raise MalformedFrame(f"meta of {len(meta)} bytes holds no guesses, 1 to {MAX_DRAFTS} of {TOKEN_BYTES} bytes")
    if not shape or shape[0] != count + 1:
        raise MalformedFrame(f"{count} guesses after a token, the tensor is {tuple(shape)}")
    tokens: tuple[int, ...] = struct.unpack(f"<{count}i", meta)
    if min(tokens) < 0:
        raise MalformedFrame(f"{min(tokens)} is no token id")
    return tokens
