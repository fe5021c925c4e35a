"""Where labels are in the space that modalities share: what a frozen sentence encoder makes of their words.

    a = R e (label) / |R e (label)|        e [d]: the encoder's vector; R [width, d]: normal numbers, by the job's seed

A random projection keeps angles as they are, roughly: the better the wider the space is (Johnson and Lindenstrauss,
1984).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from coordinator.items.texts import text_items
from coordinator.shelf import Prepared
from models.items.manifest import views
from models.items.pack import PackedItems
from wire.errors import Refused, UsageError

Floats = npt.NDArray[np.float32]

THREADS: Final = 1
"""As many on every machine: the same bits."""


def anchors_of(prepared: Prepared, labels: Sequence[str], width: int, seed: int) -> Floats:
    """[labels, width], each of length 1. Raises Refused for a model that turns no text into vectors, UsageError for
    labels that it can't tell apart. Takes a second: for a thread."""
    return projected(_vectors(prepared, labels), labels, width, seed)


def projected(vectors: Floats, labels: Sequence[str], width: int, seed: int) -> Floats:
    """[labels, d] -> [labels, width], each of length 1; raises UsageError as `anchors_of`."""
    drawn = np.random.default_rng([seed, 4]).standard_normal((vectors.shape[1], width))
    made = vectors.astype(np.float64) @ drawn
    lengths = np.linalg.norm(made, axis=1, keepdims=True)
    if not np.isfinite(made).all() or not lengths.all():
        raise UsageError("space.anchors: the encoder makes no vectors of these labels", try_="another encoder")
    found: Floats = (made / lengths).astype(np.float32)
    same = [(one, other) for at, one in enumerate(labels) for place, other in enumerate(labels[:at])
            if (found[at] == found[place]).all()]  # fmt: skip
    if same:
        raise UsageError(
            f"space.anchors: {same[0][0]!r} and {same[0][1]!r} are one to the encoder", try_="other labels"
        )
    return found


def _vectors(prepared: Prepared, labels: Sequence[str]) -> Floats:
    """[labels, d]."""
    # Here, since nothing else of the coordinator computes with a model.
    from models.engine.items import ItemStage

    packed = prepared.packed
    if not isinstance(packed, PackedItems):
        raise Refused(f"{prepared.name} turns no text into vectors", try_="a sentence encoder: edgelam model list")
    items = text_items(prepared, packed, labels)
    graph, _ = packed.parts.graph_of(0, len(packed.parts))
    stage = ItemStage.of(graph, packed.files.values(), THREADS, prepared.name)
    [port] = stage.manifest.outputs
    made = [views((port,), item.rows, stage.run(item.data, item.rows))[port.name] for item in items]
    return np.stack([np.asarray(one, np.float32).reshape(-1) for one in made])
