"""A net that makes features of pictures on onnxruntime, and is never trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from models.engine.base import EngineFailed
from models.engine.items import ItemStage
from models.items.ends import ends_of
from models.items.manifest import bundle, views

Floats = npt.NDArray[np.float32]


class FrozenNet:
    """`pool`: 'first' or 'mean' of a tensor's rows."""

    def __init__(self, stage: ItemStage, pool: str) -> None:
        """Raises EngineFailed for a stage that takes no picture or gives no vector."""
        self._stage, self._pool = stage, pool
        try:
            (self.height, self.width), self.hidden = ends_of(stage.manifest)
        except ValueError as error:
            raise EngineFailed(str(error)) from error

    @classmethod
    def load(cls, graph: str, weights: Sequence[str], pool: str, threads: int) -> FrozenNet:
        """Of these files. Raises EngineFailed, CorruptData."""
        return cls(ItemStage.load(Path(graph), [Path(path) for path in weights], threads), pool)

    def features(self, picture: Floats) -> Floats:
        """[3, height, width] -> [hidden]. Raises EngineFailed."""
        manifest = self._stage.manifest
        given = bundle(manifest.inputs, 1, {manifest.inputs[0].name: picture[None]})
        port = manifest.outputs[0]
        made = np.asarray(views(manifest.outputs, 1, self._stage.run(given, 1))[port.name], np.float32)[0]
        if made.ndim == 3:
            return np.asarray(made.mean(axis=(1, 2)), np.float32)
        if made.ndim == 2:
            return np.asarray(made[0] if self._pool == "first" else made.mean(axis=0), np.float32)
        return np.asarray(made, np.float32)
