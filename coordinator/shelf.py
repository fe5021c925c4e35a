"""Models ready to be handed out: checkpoint, packed modules, tokenizer. Prepared once, off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from coordinator.background import in_background
from models.build.kit import KitEntry, build_kit
from models.build.pack import Packed, pack
from models.catalog import find, resolve
from models.formats.checkpoint import Checkpoint, open_checkpoint
from models.text import Tokenizer
from wire.errors import EdgelamError, Unreachable

Progress = Callable[[str], None]

END_WAIT_S = 1.0
"""For the file that is being packed: a block takes less, and what takes more is left to die with the process."""


def canonical(model: str) -> str:
    """The name under which a model is kept: an alias of the catalog and its name are one model."""
    entry = find(model)
    return entry.name if entry else model


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
        self._under_way: dict[tuple[str, str], asyncio.Future[Prepared]] = {}
        self._ending = threading.Event()

    def prepared(self) -> list[Prepared]:
        return list(self._ready.values())

    async def prepare(self, model: str, precision: str, progress: Progress) -> Prepared:
        """Give the model, packing it first if need be; raise what catalog, formats and packer raise.

        A caller that gives up does not stop the packing: the next one finds it under way, or done.
        """
        key = (model, precision)
        if key in self._ready:
            return self._ready[key]
        work = self._under_way.get(key)
        if work is None:
            work = in_background(lambda: self._prepare(model, precision, progress), f"pack {model}")
            self._under_way[key] = work
            work.add_done_callback(lambda done: self._keep(key, done))
        return await asyncio.shield(work)

    async def close(self) -> None:
        """End the packing that is under way; waits END_WAIT_S at most. What was packed is found by the next one."""
        self._ending.set()
        if self._under_way:
            await asyncio.wait(list(self._under_way.values()), timeout=END_WAIT_S)

    def _go_on(self, _done: int, _all: int) -> None:
        """Asked by the packer before each file."""
        if self._ending.is_set():
            raise Unreachable("the coordinator is ending", try_="edgelam up, then run again")

    def _keep(self, key: tuple[str, str], done: asyncio.Future[Prepared]) -> None:
        del self._under_way[key]
        if not done.cancelled() and done.exception() is None:
            self._ready[key] = done.result()

    def _prepare(self, model: str, precision: str, progress: Progress) -> Prepared:
        path = resolve(model, self.cache)
        progress(f"reading {path.name}")
        try:
            checkpoint = open_checkpoint(path, self.cache)
            progress(f"packing {model} at {precision}")
            wire_dtype = "f32" if precision == "f32" else "f16"
            packed = pack(checkpoint, precision, wire_dtype, self.cache, self._go_on)
            named = msgspec.structs.replace(packed.graph, model=model)
        except OSError as error:
            raise EdgelamError(
                f"{model} can't be packed: {error}", try_=f"is there room in {self.cache}, and may it be written?"
            ) from None
        packed = msgspec.structs.replace(packed, graph=named)
        return Prepared(model, checkpoint, packed, Tokenizer.from_checkpoint(checkpoint))

    def kit_of(self, prepared: Prepared) -> list[KitEntry]:
        graph = prepared.packed.graph
        return build_kit(prepared.packed.config, graph.precision, graph.wire_dtype)
