"""The shapes in which a graph of standard operators is run, for engines that are built for shapes."""

from __future__ import annotations

from typing import Final, NamedTuple

from models.engine.device import Limits
from models.engine.manifest import StageManifest

USUAL_ROWS: Final = 64
"""Of a prefill chunk: what kernels for several rows are chosen for."""

Shape = tuple[int, ...]


class Range(NamedTuple):
    """Of one input."""

    least: Shape
    usual: Shape
    most: Shape


class Way(NamedTuple):
    """Requests and rows that kernels are chosen for together."""

    requests: int
    least_rows: int
    usual_rows: int
    most_rows: int
    most_logits: int

    def fits(self, requests: int, rows: int, logits: int) -> bool:
        return requests == self.requests and self.least_rows <= rows <= self.most_rows and logits <= self.most_logits


def ways_of(limits: Limits) -> tuple[Way, ...]:
    """One row, several rows, and one row of each request; those that there are."""
    ways = [Way(1, 1, 1, 1, 1)]
    if limits.rows > 1:
        ways.append(Way(1, 2, max(2, min(USUAL_ROWS, limits.rows)), limits.rows, limits.logits_rows))
    if limits.slots > 1:
        ways.append(Way(limits.slots, 1, 1, 1, 1))
    return tuple(ways)


def inputs_of(manifest: StageManifest, limits: Limits, way: Way) -> dict[str, Range]:
    """Least, usual and most of each input of the graph."""
    config, batch = manifest.config, way.requests
    rows = (way.least_rows, way.usual_rows, way.most_rows)
    found = {
        "tokens": Range(*((batch, count) for count in rows)),
        "hidden": Range(*((batch, count, config.hidden) for count in rows)),
    }
    del found["hidden" if manifest.embedding else "tokens"]
    if manifest.blocks:
        half = config.head_dim // 2
        found["position"] = _fixed(batch)
        found["offsets"] = Range(*((count,) for count in rows))
        found["places"] = _fixed(limits.context)
        found["rope.cos"] = found["rope.sin"] = _fixed(limits.context, half)
        kept = _fixed(batch, config.kv_heads, limits.context, config.head_dim)
        found |= {f"kv.{index}.{part}": kept for index in manifest.blocks for part in ("key", "value")}
    if manifest.head:
        found["logits_rows"] = Range((1,), (1,), (way.most_logits,))
    return found


def _fixed(*dims: int) -> Range:
    return Range(dims, dims, dims)
