"""A model as a graph of modules: the one description that planner, runtime and trainer share.

A module is the smallest placeable unit: the embedding, one transformer block, the head. The graph is directed and
acyclic; edges carry the shape of what crosses them, per token. Bytes are those of a packed model (at one precision).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

ModuleKind = Literal["embedding", "block", "head"]


class Module(Struct, frozen=True, kw_only=True):
    name: str
    """'embedding', 'block.0' .., 'head'."""
    kind: ModuleKind
    profile_key: str
    """Equal keys cost equal time on one device: family, sizes, precision, wire dtype; see `models.build.keys`."""
    weight_bytes: int
    artifacts: tuple[str, ...]
    """Digests of the files that hold its weights. Modules may share a file (tied embedding and head)."""
    kv_bytes_per_token: int
    macs_per_token: int


class Edge(Struct, frozen=True, kw_only=True):
    source: str
    target: str
    elements_per_token: int
    bytes_per_token: int
    """At the wire dtype, without headers."""


class Graph(Struct, frozen=True, kw_only=True):
    """`modules` stand in topological order; for the Llama family the edges are a chain."""

    model: str
    family: str
    precision: str
    wire_dtype: Literal["f32", "f16", "bf16"]
    hidden: int
    vocabulary: int
    blocks: int
    max_context_tokens: int
    modules: tuple[Module, ...]
    edges: tuple[Edge, ...]

    def module(self, name: str) -> Module:
        for module in self.modules:
            if module.name == name:
                return module
        raise KeyError(name)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, files that modules share counted once only if the modules say so by digest."""
        return sum(module.weight_bytes for module in self.modules)
