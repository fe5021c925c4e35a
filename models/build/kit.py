"""What a device measures itself on: each kind of module as a graph, blocks stacked to two depths.

Times at two depths separate the cost of a block from the cost of a step. The weights are made on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

from msgspec import Struct

from models.build.keys import profile_key
from models.build.layout import checked_precision, checked_wire_dtype
from models.build.stage import build_stage_graph
from models.build.standard import build_standard_graph
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
    standard: dict[int, bytes] = {}
    """The same in standard operators; nothing else than onnxruntime measures a module that has none."""
    hidden: int
    vocabulary: int
    wire_dtype: WireDtype
    runs: Literal["tokens", "items"] = "tokens"


def build_kit(config: LlamaConfig, precision: str, wire_dtype: str) -> list[KitEntry]:
    """Give block, embedding and head of a model, under the keys that its graph's modules bear."""
    packed_as, wire = checked_precision(precision), checked_wire_dtype(wire_dtype)

    def graphs(build: Callable[..., bytes], kind: ModuleKind) -> dict[int, bytes]:
        depths = sorted({min(stack, config.blocks) for stack in STACKS}) if kind == "block" else [1]
        return {
            depth: build(
                config, packed_as, wire, first_block=0, end_block=depth if kind == "block" else 0,
                embedding=kind == "embedding", head=kind == "head",
            )
            for depth in depths
        }  # fmt: skip

    kinds: tuple[ModuleKind, ...] = ("block", "embedding", "head")
    return [
        KitEntry(
            key=profile_key(config, kind, packed_as, wire),
            kind=kind,
            graphs=graphs(build_stage_graph, kind),
            standard=graphs(build_standard_graph, kind),
            hidden=config.hidden,
            vocabulary=config.vocabulary,
            wire_dtype=wire,
        )
        for kind in kinds
    ]
