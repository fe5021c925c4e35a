"""What an engine is to the worker that owns it: one loaded stage that makes steps for requests in slots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from wire.errors import EdgelamError

Array = npt.NDArray[np.generic]


class EngineFailed(EdgelamError):
    """The engine could not load or run; the text says which engine, where, and what it said."""


class NoSlot(EdgelamError):
    """All slots are taken: the stage is busy."""


class ContextFull(EdgelamError):
    """The request would grow beyond the context length that the stage was planned for."""


class StageSpec(Struct, frozen=True, kw_only=True):
    """What must be known besides graph and weights. Blocks are [first_block, end_block)."""

    embedding: bool
    head: bool
    first_block: int
    end_block: int
    hidden: int
    vocabulary: int
    wire_dtype: str
    """'f32', 'f16' or 'bf16': the dtype of hidden states at the stage's edges (bf16 travels as uint16 bits)."""
    context_tokens: int
    slots: int
    threads: int
    config: str = ""


def without_adapters(adapter: str) -> None:
    """Raise EngineFailed for an adapter, at an engine that has none."""
    if adapter:
        raise EngineFailed(f"this engine runs no adapters, and {adapter} was asked for")


class RowStep(Protocol):
    """Steps of one row in one slot, input and output where they lie. Good until the slot is closed."""

    output: memoryview | None
    """The hidden states that a stage without the head gives, as they travel."""
    result: Array
    """What StageEngine.step would give, valid until the next step."""

    def fill(self, given: memoryview) -> bool:
        """Write the input: one row of hidden states as they travel, or a token id, int32. False if it is no input."""

    def run(self, position: int) -> None:
        """Make the step; nothing but the input was checked. Raises EngineFailed."""

    def settle(self, position: int) -> None:
        """Check what the step gave, and count its row. Raises EngineFailed. Every `run` is settled before the next."""


class StageEngine(Protocol):
    """One stage, loaded. Not thread-safe: one worker thread owns it."""

    @property
    def name(self) -> str:
        """'onnxruntime 1.31.1 CPUExecutionProvider'; what was loaded, not what was asked for."""

    @property
    def held_bytes(self) -> int:
        """Weights, KV buffers and scratch that this stage accounts for."""

    @property
    def idle_bytes(self) -> int:
        """What of `held_bytes` is kept for slots that are free."""

    def open(self, adapter: str = "") -> int:
        """Take a free slot for a new request, with an adapter of those in the graph or none, and give its number; raise
        NoSlot, and EngineFailed for an adapter that is not there."""

    def close(self, slot: int) -> None:
        """Free a slot. Closing a free slot is an error of the caller."""

    def step(self, slot: int, given: Array, position: int, logits_rows: int = 1) -> Array:
        """Run rows `position .. position + n` of one request through the stage.

        `given`: token ids int64 [n] for a stage with the embedding, else hidden states [n, hidden] in wire dtype.
        `position` must equal the number of rows already run in this slot (or less: the tail is forgotten and
        overwritten). Gives hidden states [n, hidden] in wire dtype, or for a stage with the head the logits of the
        last row, float32 [vocabulary]; with `logits_rows` above 1, at most n, those of so many last rows, float32
        [logits_rows, vocabulary]. The result is valid until the next step. Raises ContextFull, EngineFailed.
        """

    def step_many(
        self, slots: Sequence[int], given: Array, positions: Sequence[int]
    ) -> tuple[Array, dict[int, EdgelamError]]:
        """Run one row of each of several requests in one step.

        `given`: token ids int64 [b], or hidden states [b, hidden] in wire dtype; row i belongs to `slots[i]`, all
        different, and has the number `positions[i]` there, as in `step`. Gives hidden states [b, hidden] or logits
        [b, vocabulary], valid until the next step, and why the rows that failed did, by their number; what is given
        for those means nothing. A row's result does not depend on the others in the step, nor on their order, as long
        as there are any: one row alone may be computed otherwise, in the last bits. Raises EngineFailed when none could
        be run; then the rows have not been counted, and may be run again.
        """

    def row(self, slot: int) -> RowStep | None:
        """Give the bare way of a step of one row, to be used between two calls of `step`; None if this engine has
        none, or has not made a step of one row in this slot."""
