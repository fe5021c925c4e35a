"""B of a job's factors that never leaves this board, beside the adapter that it is part of: one folder for each job.

    b-7-3.safetensors          as round 3 of epoch 7 made it
    adapter_model.safetensors, adapter_config.json, head.safetensors, provenance.json
                               the factors that the last round began with: everybody's A, and this board's B

What a round begins with is said by the coordinator, which knows whether an update counted: B as it was before the last
round is kept until then, and a round that is done again begins with the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np

from agent.records import write_atomically
from models.formats.safetensors import open_safetensors, to_bytes
from models.lora.adapter import Floats, flat, length_of, named
from wire.errors import CorruptData, EdgelamError

Shapes = Mapping[str, tuple[int, int]]

PART: Final = ("b",)
ADAPTERS: Final = "adapters"
"""In a board's state folder."""


class OwnFactors:
    """Of one job, under one epoch. `files` makes an adapter's of all factors by name."""

    def __init__(
        self, folder: Path, epoch: int, shaped: Shapes, files: Callable[[Mapping[str, Floats]], Mapping[str, bytes]]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._epoch, self._shaped, self._files = folder, epoch, shaped, files

    def after(self, round_number: int) -> dict[str, Floats]:
        """B as a round made it, zeros for -1. Raises CorruptData where that is not here any more."""
        if round_number < 0:
            return named(np.zeros(length_of(self._shaped, PART), np.float32), self._shaped, PART)
        path = self._path(round_number)
        try:
            file = open_safetensors(path)
            vector = np.array(file.view("b"), np.float32)
            if file.metadata.get("sha256") != _digest(vector):
                raise CorruptData("not what was written there")
            return named(vector, self._shaped, PART)
        except (EdgelamError, KeyError, ValueError) as error:
            raise CorruptData(
                f"this board's own factors, as round {round_number} made them, are lost: {path}: {error}",
                try_="begin the job anew",
            ) from None

    def keep(self, round_number: int, began_with: int, factors: Mapping[str, Floats]) -> None:
        """Put on disk what a round made, and forget all but this and what it began with. Raises OSError."""
        vector = flat(factors, self._shaped, PART)
        write_atomically(self._path(round_number), to_bytes({"b": vector}, {"sha256": _digest(vector)}))
        kept = {self._path(round_number), self._path(began_with)}
        for path in sorted(self._folder.glob("b-*.safetensors")):
            if path not in kept:
                path.unlink(missing_ok=True)

    def show(self, factors: Mapping[str, Floats]) -> None:
        """Lay out the adapter that these make, for whoever uses it on this board. Raises OSError."""
        for name, data in self._files(factors).items():
            write_atomically(self._folder / name, data)

    def _path(self, round_number: int) -> Path:
        return self._folder / f"b-{self._epoch}-{round_number}.safetensors"


def _digest(vector: Floats) -> str:
    return hashlib.sha256(vector.astype("<f4", copy=False).tobytes()).hexdigest()
