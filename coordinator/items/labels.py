"""Which label a text or a picture has: an encoder with a trained adapter, or a net with a trained task module, served
as a model of its own (models.lora.merged, models.items.pictured)."""

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
from coordinator.shelf import ItemSource, Prepared, Shelf
from models.items.features import features_part, features_tensor
from models.items.pack import PackedItems
from models.items.pictured import pictured
from models.lora.adapter import HEAD_FILE
from models.lora.head import read_head
from models.lora.merged import forget, merged, merged_at
from models.lora.serving import is_alone, kept_at
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
        """The model that another one and an adapter make: of a job by its name, or of a folder. Raises UsageError,
        Refused, CorruptData; EdgelamError where the cache can't be written."""
        made = await self._made(model, adapter, say)
        self._in_use[made] += 1
        try:
            await self._remove_earlier()
            yield str(made)
        finally:
            self._in_use[made] -= 1
            self._in_use += Counter()  # without those that nobody uses

    async def _made(self, model: str, adapter: str, say: Say) -> Path:
        found = await self._adapters.find(adapter)
        prepared = await self._operations.preparing.prepare(model, "f32", say)
        try:
            return await asyncio.to_thread(self._written, found, prepared)
        except OSError as error:
            raise EdgelamError(
                f"{model} with adapter {adapter} can't be written: {error}", try_=f"is there room in {self._cache}?"
            ) from None

    def _written(self, adapter_id: str, prepared: Prepared) -> Path:
        name, source = deployment_name(prepared.name), prepared.checkpoint
        kept = kept_at(adapter_id, self._cache)
        head = read_head(kept / HEAD_FILE) if is_alone(kept) else None
        if head is not None and head.images is not None and isinstance(prepared.packed, PackedItems):
            try:
                part = features_part(prepared.packed, features_tensor(prepared.name, head.images))
            except ValueError as error:
                raise Refused(str(error), try_="the net that the job was trained with") from None
            return pictured(adapter_id, name, part, self._cache)
        if not isinstance(source, ItemSource) or not source.digest:
            raise Refused(
                f"{prepared.name} is no sentence encoder", try_="edgelam run takes adapters of language models"
            )
        return merged(adapter_id, name, source.folder, source.digest, self._cache)

    async def _remove_earlier(self) -> None:
        """What was made and deployed of adapters in whose places later ones came."""
        for adapter in sorted(self._adapters.superseded):
            for made in merged_at(adapter, self._cache):
                if self._in_use[made]:
                    continue
                for record in self._coordinator.records():
                    if record.request.model == str(made):
                        with suppress(UsageError):  # somebody else has removed it meanwhile
                            await self._operations.remove(record.name)
                self._shelf.forget(str(made))
                await asyncio.to_thread(forget, made, self._cache)
