"""Models ready to be handed out: checkpoint, packed modules, tokenizer. Prepared once, off the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from coordinator.background import in_background
from models.build.kit import KitEntry, build_kit
from models.build.pack import Packed, pack
from models.cache import file_digest
from models.catalog import find, resolve
from models.formats.bert import is_bert
from models.formats.checkpoint import Checkpoint, open_checkpoint
from models.items.pack import PackedItems, is_item_file, kit_of_items, pack_items
from models.items.words import WordTokenizer
from models.lora.serving import with_adapters
from models.text import Tokenizer
from wire.errors import EdgelamError, Refused, Unreachable

Progress = Callable[[str], None]

MOST_WITH_ADAPTERS = 4
"""Sets of adapters beside one model that are kept ready; others are found in the cache."""

END_WAIT_S = 1.0
"""For the file that is being packed: a block takes less, and what takes more is left to die with the process."""


def canonical(model: str) -> str:
    """The name under which a model is kept: an alias of the catalog and its name are one model."""
    entry = find(model)
    return entry.name if entry else model


def wire_dtype_of(precision: str) -> str:
    """The dtype of a model's residual stream between blocks."""
    return "f32" if precision == "f32" else "f16"


def is_item_model(model: str) -> bool:
    """Whether items go through a model, rather than prompts and answers; False for one that is not here."""
    entry = find(model)
    if entry is not None:
        return entry.kind != "language"
    try:
        path = Path(model)
        return "\0" not in model and path.exists() and is_item_file(path)
    except OSError:  # too long for a path
        return False


_Key = tuple[str, str, tuple[str, ...]]
"""Model, precision, adapters."""


class ItemSource(NamedTuple):
    """Where an item model comes from, and what turns text into its items, if that is what it takes."""

    path: Path
    words: WordTokenizer | None
    digest: str = ""
    """Of the weights of a sentence encoder."""

    @property
    def folder(self) -> Path:
        """Where the configuration of an encoder is."""
        return self.path if self.path.is_dir() else self.path.parent


class Prepared:
    """One model at one precision."""

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint | ItemSource,
        packed: Packed | PackedItems,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.name = name
        self.checkpoint = checkpoint
        self.packed = packed
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a language model; raise Refused for any other."""
        if self._tokenizer is None:
            raise Refused(f"{self.name} is no language model", try_="edgelam embed, or edgelam infer")
        return self._tokenizer


class Shelf:
    """Prepared models by name, precision and adapters. Two requests for the same one share the work."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._ready: dict[_Key, Prepared] = {}
        self._under_way: dict[_Key, asyncio.Future[Prepared]] = {}
        self._ending = threading.Event()

    def prepared(self) -> list[Prepared]:
        return list(self._ready.values())

    async def prepare(self, model: str, precision: str, progress: Progress, adapters: tuple[str, ...] = ()) -> Prepared:
        """Give the model, packing it first if need be, with adapters beside it; raise what catalog, formats, packer and
        models.lora.serving raise.

        A caller that gives up does not stop the packing: the next one finds it under way, or done.
        """
        key = (model, precision, adapters)
        if key in self._ready:
            self._ready[key] = found = self._ready.pop(key)  # behind those that were asked for longer ago
            return found
        work = self._under_way.get(key)
        if work is None:
            work = in_background(lambda: self._prepare(model, precision, progress, adapters), f"pack {model}")
            self._under_way[key] = work
            work.add_done_callback(lambda done: self._keep(key, done))
        return await asyncio.shield(work)

    def forget(self, model: str) -> None:
        """The files of a model are about to go."""
        for key in [key for key in self._ready if key[0] == model]:
            del self._ready[key]

    async def close(self) -> None:
        """End the packing that is under way; waits END_WAIT_S at most. What was packed is found by the next one."""
        self._ending.set()
        if self._under_way:
            await asyncio.wait(list(self._under_way.values()), timeout=END_WAIT_S)

    def _go_on(self, _done: int, _all: int) -> None:
        """Asked by the packer before each file."""
        if self._ending.is_set():
            raise Unreachable("the coordinator is ending", try_="edgelam up, then run again")

    def _keep(self, key: _Key, done: asyncio.Future[Prepared]) -> None:
        del self._under_way[key]
        if not done.cancelled() and done.exception() is None:
            self._ready[key] = done.result()
            with_others = [kept for kept in self._ready if kept[:2] == key[:2] and kept[2]]
            for kept in with_others[:-MOST_WITH_ADAPTERS]:
                del self._ready[kept]

    def _prepare(self, model: str, precision: str, progress: Progress, adapters: tuple[str, ...]) -> Prepared:
        path = resolve(model, self.cache)
        progress(f"reading {path.name}")
        if is_item_model(model):
            return self._prepare_items(model, path)
        try:
            checkpoint = open_checkpoint(path, self.cache)
            progress(f"packing {model} at {precision}")
            packed = pack(checkpoint, precision, wire_dtype_of(precision), self.cache, self._go_on)
            if adapters:
                packed = with_adapters(packed, adapters, self.cache, self._go_on, checkpoint.digest)
            named = msgspec.structs.replace(packed.graph, model=model)
        except OSError as error:
            raise _unpackable(model, error, self.cache) from None
        packed = msgspec.structs.replace(packed, graph=named)
        return Prepared(model, checkpoint, packed, Tokenizer.from_checkpoint(checkpoint))

    def _prepare_items(self, model: str, path: Path) -> Prepared:
        try:
            packed = pack_items(path, model, self.cache)
            words = WordTokenizer.beside(path)
            source = ItemSource(path, words)
            if words is not None and is_bert(source.folder):
                source = source._replace(digest=file_digest(source.folder / "model.safetensors", self.cache))
        except OSError as error:
            raise _unpackable(model, error, self.cache) from None
        return Prepared(model, source, packed, None)

    def kit_of(self, prepared: Prepared) -> list[KitEntry]:
        packed = prepared.packed
        if isinstance(packed, PackedItems):
            return kit_of_items(packed)
        return build_kit(packed.config, packed.graph.precision, packed.graph.wire_dtype)


def _unpackable(model: str, error: OSError, cache: Path) -> EdgelamError:
    return EdgelamError(f"{model} can't be packed: {error}", try_=f"is there room in {cache}, and may it be written?")
