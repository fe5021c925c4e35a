"""A model as a graph of modules: the one description that planner, runtime and trainer share.

A module is the smallest placeable unit: the embedding, one transformer block, the head. The graph is directed and
acyclic; edges carry the shape of what crosses them, per token. Bytes are those of a packed model (at one precision).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from wire.errors import Refused

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
    tensor: str = ""
    """Names what crosses where modules are no chain: edges with the same name and source carry the same bytes, once."""


class Items(Struct, frozen=True, kw_only=True):
    """Of a model that takes items and keeps nothing: "per token" means per item of so many `rows` in its graph."""

    rows: int
    input_bytes: int
    output_bytes: int


class Graph(Struct, frozen=True, kw_only=True):
    """`modules` stand in topological order; for the Llama family the edges are a chain. Cut i lies before module i."""

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
    items: Items | None = None
    """None: a language model."""

    def module(self, name: str) -> Module:
        for module in self.modules:
            if module.name == name:
                return module
        raise KeyError(name)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, files that modules share counted once only if the modules say so by digest."""
        return sum(module.weight_bytes for module in self.modules)

    def live_at(self, cut: int) -> tuple[Edge, ...]:
        """What crosses a cut: each tensor that a module before it makes and one behind it needs, once, however many
        need it; a skip is live over all cuts between its ends. In the order of the modules that make them."""
        places = {module.name: place for place, module in enumerate(self.modules)}
        live: dict[tuple[str, str], Edge] = {}
        for edge in sorted(self.edges, key=lambda edge: (places[edge.source], edge.tensor)):
            if places[edge.source] < cut <= places[edge.target]:
                live.setdefault((edge.source, edge.tensor), edge)
        return tuple(live.values())

    def live_bytes(self) -> tuple[int, ...]:
        """Bytes of all that crosses each cut 0 .. len(modules), without headers; nothing crosses the first and last.

        Raises Refused if the modules do not stand in topological order, or an edge names none of them.
        """
        places = {module.name: place for place, module in enumerate(self.modules)}
        for edge in self.edges:
            if not places.get(edge.source, len(places)) < places.get(edge.target, -1):
                raise Refused(f"{self.model}: {edge.source} -> {edge.target} is no edge from a module to a later one")
        cuts = range(len(self.modules) + 1)
        return tuple(sum(edge.bytes_per_token for edge in self.live_at(cut)) for cut in cuts)
