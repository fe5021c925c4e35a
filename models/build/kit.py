"""What a device measures itself on: each kind of module as a graph, blocks stacked to two depths.

Times at two depths separate the cost of a block from the cost of a step. The weights are made on the device.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from models.build.keys import profile_key
from models.build.layout import checked_precision, checked_wire_dtype
from models.build.stage import build_stage_graph
from models.engine.manifest import WireDtype
from models.families.config import LlamaConfig
from models.graph import ModuleKind

STACKS: Final = (1, 6)
"""Blocks per graph: one alone, and enough that a step's own cost is small beside theirs and all don't fit a cache."""


class KitEntry(Struct, frozen=True, kw_only=True):
    """A module to time; `graphs` by the number of modules stacked. Mirrors wire.messages.KitModule."""

    key: str
    kind: ModuleKind
    graphs: dict[int, bytes]
    hidden: int
    vocabulary: int
    wire_dtype: WireDtype


def build_kit(config: LlamaConfig, precision: str, wire_dtype: str) -> list[KitEntry]:
    """Give block, embedding and head of a model, under the keys that its graph's modules bear."""
    packed_as, wire = checked_precision(precision), checked_wire_dtype(wire_dtype)

    def graph(blocks: int, *, embedding: bool = False, head: bool = False) -> bytes:
        return build_stage_graph(
            config, packed_as, wire, first_block=0, end_block=blocks, embedding=embedding, head=head
        )

    def entry(kind: ModuleKind, graphs: dict[int, bytes]) -> KitEntry:
        key = profile_key(config, kind, packed_as, wire)
        return KitEntry(
            key=key, kind=kind, graphs=graphs, hidden=config.hidden, vocabulary=config.vocabulary, wire_dtype=wire
        )

    stacks = sorted({min(stack, config.blocks) for stack in STACKS})
    return [
        entry("block", {stack: graph(stack) for stack in stacks}),
        entry("embedding", {1: graph(0, embedding=True)}),
        entry("head", {1: graph(0, head=True)}),
    ]
