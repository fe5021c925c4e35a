"""Texts as items of a sentence encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coordinator.items.live import Item
from coordinator.openai.errors import BadParameter
from coordinator.shelf import ItemSource, Prepared
from models.items.manifest import bundle
from models.items.pack import PackedItems
from wire.errors import Refused


def text_items(prepared: Prepared, packed: PackedItems, texts: Sequence[str]) -> list[Item]:
    """Token ids of each text; raise Refused for another model, BadParameter for a text that is too long."""
    source = prepared.checkpoint
    words = source.words if isinstance(source, ItemSource) else None
    if words is None or len(packed.config.inputs) != 1 or len(packed.config.outputs) != 1:
        raise Refused(f"{prepared.name} turns no text into vectors", try_="a sentence encoder: edgelam model list")
    [port] = packed.config.inputs
    items = []
    for index, text in enumerate(texts):
        ids = words.encode(text)
        if not 1 <= len(ids) <= packed.config.most_rows:
            raise BadParameter(
                f"text {index} has {len(ids)} tokens, {prepared.name} takes 1 to {packed.config.most_rows}",
                param="input",
                code="context_length_exceeded",
                try_="shorter texts: cut long ones into parts",
            )
        items.append(Item(bundle([port], len(ids), {port.name: np.array(ids, np.int64)}), len(ids)))
    return items
