"""What shards of one block are told, and say (docs/decisions/0031-looped.md): each has some of its attention heads and
of the columns of its feed-forward layer, and the same block stands at every depth."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from wire.limits import MAX_DIM

Edge = Annotated[int, Meta(ge=0, le=MAX_DIM)]

PartOfBlock = Literal["attention", "feed-forward"]


class Share(Struct, frozen=True, kw_only=True):
    """Of a block: heads [first_head, end_head), columns [first_column, end_column)."""

    first_head: Edge
    end_head: Edge
    first_column: Edge
    end_column: Edge

    @property
    def heads(self) -> int:
        return self.end_head - self.first_head

    @property
    def columns(self) -> int:
        return self.end_column - self.first_column


class Turn(Struct, frozen=True, kw_only=True):
    """One product that all shards make, each with its share.

    asked with                                               answered with
    forwards    states [n, T, hidden]                        its part of the sum that follows, alike
    backwards   states and gradient by the sum,              its part of the gradient by the states
                [2, n, T, hidden]
    """

    number: Annotated[int, Meta(ge=0, le=2**53)]
    """In the round, counted up."""
    part: PartOfBlock
    backwards: bool = False
    last: bool = False
    """Of a step: a shard says with its answer what the squares of all its gradients add up to."""
