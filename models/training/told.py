"""Which label each window of somebody's readings has, by a trained task module (models.lora.head)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.lora.head import Head
from models.training.data import BadRow
from models.training.features import AT_ONCE, kernels_of
from models.training.kernels import Kernels
from models.training.series import Row, Window, unlabelled


class Told(NamedTuple):
    """`shares` [labels], adding up to 1; of a window from one row to another."""

    first: Row
    last: Row
    shares: npt.NDArray[np.float64]


def told(path: Path, head: Head) -> Iterator[Told | BadRow]:
    """All windows under a path in order, and rows that are none. Raises what models.training.series raises, ValueError
    for a task module of other samples."""
    if head.series is None:
        raise ValueError("a task module that is not of readings")
    kernels, batch = kernels_of(head.series, head.seed), list[Window]()
    for found in unlabelled(path, head.series):
        if isinstance(found, BadRow):
            yield found
            continue
        batch.append(found)
        if len(batch) == AT_ONCE:
            yield from _told(batch, kernels, head)
            batch.clear()
    yield from _told(batch, kernels, head)


def _told(batch: list[Window], kernels: Kernels, head: Head) -> Iterator[Told]:
    if not batch:
        return
    shares = head.shares(kernels.features(np.stack([window.values for window in batch])))
    for window, each in zip(batch, shares, strict=True):
        yield Told(window.first, window.last, each)
