"""Models ready to be handed out: checkpoint, packed modules, tokenizer. Prepared once, off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from models.build.kit import build_kit
from models.build.pack import Packed, pack
from models.catalog import resolve
from models.formats.checkpoint import Checkpoint, open_checkpoint
from models.text import Tokenizer

Progress = Callable[[str], None]


class Prepared:
    """One model at one precision."""

    def __init__(self, name: str, checkpoint: Checkpoint, packed: Packed, tokenizer: Tokenizer) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self.packed = packed
        self.tokenizer = tokenizer


class Shelf:
    """Prepared models by (name, precision). Two requests for the same one share the work."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._ready: dict[tuple[str, str], Prepared] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}

    def prepared(self) -> list[Prepared]:
        return list(self._ready.values())

    async def prepare(self, model: str, precision: str, progress: Progress) -> Prepared:
        """Give the model, packing it first if need be; raise what catalog, formats and packer raise."""
        key = (model, precision)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            if key not in self._ready:
                self._ready[key] = await asyncio.to_thread(self._prepare, model, precision, progress)
        return self._ready[key]

    def _prepare(self, model: str, precision: str, progress: Progress) -> Prepared:
        path = resolve(model, self.cache)
        progress(f"reading {path.name}")
        checkpoint = open_checkpoint(path, self.cache)
        progress(f"packing {model} at {precision}")
        wire_dtype = "f32" if precision == "f32" else "f16"
        packed = pack(checkpoint, precision, wire_dtype, self.cache)
        return Prepared(model, checkpoint, packed, Tokenizer.from_checkpoint(checkpoint))

    def kit_of(self, prepared: Prepared) -> list[object]:
        graph = prepared.packed.graph
        return list(build_kit(prepared.packed.config, graph.precision, graph.wire_dtype))
