"""Which label a text has: an encoder with a trained adapter, served as a model of its own (models.lora.merged)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from coordinator.adapters import AdapterShelf
from coordinator.deployments import deployment_name
from coordinator.operations import Operations
from coordinator.service import Coordinator
from coordinator.shelf import ItemSource, Shelf
from models.lora.merged import forget, merged, merged_at
from wire.errors import EdgelamError, Refused, UsageError

Say = Callable[[str], None]


class Labels:
    """What is asked for stays until it is answered, however many rounds end meanwhile."""

    def __init__(self, coordinator: Coordinator, operations: Operations, adapters: AdapterShelf, shelf: Shelf) -> None:
        self._coordinator = coordinator
        self._operations = operations
        self._adapters = adapters
        self._shelf = shelf
        self._cache = shelf.cache
        self._in_use: Counter[Path] = Counter()

    @asynccontextmanager
    async def model_with(self, model: str, adapter: str, say: Say) -> AsyncIterator[str]:
        """The model that an encoder and an adapter make: of a job by its name, or of a folder. Raises UsageError,
        Refused, CorruptData; EdgelamError where the cache can't be written."""
        folder = await self._made(model, adapter, say)
        self._in_use[folder] += 1
        try:
            await self._remove_earlier()
            yield str(folder)
        finally:
            self._in_use[folder] -= 1
            self._in_use += Counter()  # without those that nobody uses

    async def _made(self, model: str, adapter: str, say: Say) -> Path:
        found = await self._adapters.find(adapter)
        prepared = await self._operations.preparing.prepare(model, "f32", say)
        source = prepared.checkpoint
        if not isinstance(source, ItemSource) or not source.digest:
            raise Refused(
                f"{prepared.name} is no sentence encoder", try_="edgelam run takes adapters of language models"
            )
        try:
            return await asyncio.to_thread(
                merged, found, deployment_name(prepared.name), source.folder, source.digest, self._cache
            )
        except OSError as error:
            raise EdgelamError(
                f"{model} with adapter {adapter} can't be written: {error}", try_=f"is there room in {self._cache}?"
            ) from None

    async def _remove_earlier(self) -> None:
        """What was made and deployed of adapters in whose places later ones came."""
        for adapter in sorted(self._adapters.superseded):
            for folder in merged_at(adapter, self._cache):
                if self._in_use[folder]:
                    continue
                for record in self._coordinator.records():
                    if record.request.model == str(folder):
                        with suppress(UsageError):  # somebody else has removed it meanwhile
                            await self._operations.remove(record.name)
                self._shelf.forget(str(folder))
                await asyncio.to_thread(forget, folder, self._cache)
