"""Times the codecs of cuts on this board: what it takes to code rows of hidden states and to decode them."""

from __future__ import annotations

from typing import Final

from hwprofiles.coding import RULE
from hwprofiles.measure import sample
from hwprofiles.samples import Coding, Codings
from models.coding import CodingStep
from wire.codecs import AS_IS, ELEMENT_BYTES, codecs_for

WIDTH: Final = 1024
"""Of the rows: that of small language models. Others are reckoned from it (hwprofiles.coding)."""
ROWS: Final = (1, 64)
"""A token of an answer, and a chunk of a prompt."""

SWEPT_BYTES: Final = 4 << 20
"""Before each time, which has to be cheap on a small board."""


def time_codings() -> Codings:
    """Every codec of every wire dtype, at one row and at a chunk of them."""
    timings = [
        Coding(
            codec=codec,
            wire_dtype=wire_dtype,
            rows=rows,
            samples=sample(CodingStep(codec, wire_dtype, rows, WIDTH, SWEPT_BYTES), RULE),
        )
        for wire_dtype in ELEMENT_BYTES
        for codec in codecs_for(wire_dtype, WIDTH)
        if codec != AS_IS
        for rows in ROWS
    ]
    return Codings(width=WIDTH, timings=tuple(timings))
