"""Which label a text has: an encoder with a trained adapter, served as a model of its own (models.lora.merged)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coordinator.adapters import AdapterShelf
from coordinator.deployments import deployment_name
from coordinator.operations import Operations
from coordinator.service import Coordinator
from coordinator.shelf import ItemSource, Shelf
from models.lora.merged import forget, merged, merged_at
from wire.errors import EdgelamError, Refused

Say = Callable[[str], None]


class Labels:
    """`in_use(deployment)` says whether something is on its way there."""

    def __init__(
        self, coordinator: Coordinator, operations: Operations, adapters: AdapterShelf, shelf: Shelf,
        in_use: Callable[[str], bool],
    ) -> None:  # fmt: skip
        self._coordinator = coordinator
        self._in_use = in_use
        self._operations = operations
        self._adapters = adapters
        self._shelf = shelf
        self._cache = shelf.cache

    async def model_with(self, model: str, adapter: str, say: Say) -> str:
        """The model that an encoder and an adapter make: of a job by its name, or of a folder. Raises UsageError,
        Refused, CorruptData; EdgelamError where the cache can't be written."""
        found = await self._adapters.find(adapter)
        prepared = await self._operations.preparing.prepare(model, "f32", say)
        source = prepared.checkpoint
        if not isinstance(source, ItemSource) or not source.digest:
            raise Refused(
                f"{prepared.name} is no sentence encoder", try_="edgelam run takes adapters of language models"
            )
        try:
            folder = await asyncio.to_thread(
                merged, found, deployment_name(prepared.name), source.folder, source.digest, self._cache
            )
        except OSError as error:
            raise EdgelamError(
                f"{model} with adapter {adapter} can't be written: {error}", try_=f"is there room in {self._cache}?"
            ) from None
        await self._remove_earlier()
        return str(folder)

    async def _remove_earlier(self) -> None:
        """What was made and deployed of adapters in whose places later ones came."""
        for adapter in sorted(self._adapters.superseded):
            for folder in merged_at(adapter, self._cache):
                records = [record for record in self._coordinator.records() if record.request.model == str(folder)]
                if not any(self._in_use(record.name) for record in records):
                    for record in records:
                        await self._operations.remove(record.name)
                    self._shelf.forget(str(folder))
                    await asyncio.to_thread(forget, folder, self._cache)
