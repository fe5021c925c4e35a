"""The steps of a round whose device tells no more of its data than a job's budget allows (models.privacy).

unit 'sample': DP-SGD (Abadi et al., Deep learning with differential privacy, 2016). Samples take part by chance, each
one's gradient is clipped by itself, noise goes on their sum, which counts as of so many samples as take part on
average. What AdamW makes of it tells no more.

unit 'device': steps are as always; what they changed all together is clipped, and noise goes on it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models.lora.adapter import Floats, flat, named
from models.privacy.noise import Stream, clipped, noised
from models.privacy.plan import Measure
from models.training.samples import Batch, Row, batch_of
from models.training.tensors import given, taken
from wire.privacy import Privacy

Shapes = Mapping[str, tuple[int, int]]


class Guard:
    """Of one round. `stream` gives the numbers; who has `Measure` has paid for its releases."""

    def __init__(self, privacy: Privacy, measure: Measure, stream: Stream) -> None:
        self.privacy = privacy
        self.measure = measure
        self._stream = stream

    @property
    def by_sample(self) -> bool:
        return self.privacy.unit == "sample"

    def gradient(
        self,
        rows: Sequence[Row],
        loss_of: Callable[[Batch], Any],
        leaves: Mapping[str, Any],
        shaped: Shapes,
        parts: tuple[str, ...],
    ) -> None:
        """Put the noised mean over a drawn batch into the leaves' `grad`."""
        total = np.zeros(sum(leaf.numel() for leaf in leaves.values()), np.float32)
        for number in self._stream.sampled(len(rows), self.measure.share):
            if not rows[number].teaches:
                continue
            for leaf in leaves.values():
                leaf.grad = None
            loss_of(batch_of([rows[number]])).backward()
            own = {name: taken(leaf.grad) for name, leaf in leaves.items()}
            total += self.clipped(flat(own, shaped, parts), shaped, parts)
        mean = self.mean(total, len(rows))
        for name, gradient in named(mean, shaped, parts).items():
            leaves[name].grad = given(gradient.copy())

    def mean(self, total: Floats, rows: int) -> Floats:
        """Of a sum of clipped gradients, noised, as of so many samples as take part on average out of `rows`."""
        found: Floats = noised(total, self.measure.deviation, self._stream) / np.float32(self.measure.share * rows)
        return found

    def changed(self, start: Floats, end: Floats, shaped: Shapes, parts: tuple[str, ...]) -> Floats:
        """`end` with what was changed clipped and noised."""
        return start + noised(self.clipped(end - start, shaped, parts), self.measure.deviation, self._stream)

    def clipped(self, vector: Floats, shaped: Shapes, parts: tuple[str, ...]) -> Floats:
        """As the job says: as a whole, or A and B each."""
        most = self.privacy.clip
        if self.privacy.by == "joint":
            return clipped(vector, most)
        factors = named(vector, shaped, parts)
        found = np.empty_like(vector)
        for part in parts:
            inside = mask_of(shaped, parts, part)
            whole = flat(factors, shaped, (part,))
            found[inside] = clipped(whole, most)
        return found


def mask_of(shaped: Shapes, parts: tuple[str, ...], part: str) -> Any:
    """[n] which elements of a vector of `parts` are of this one."""
    pieces = [np.full(math.prod(shape), name[-1] == part) for name, shape in shaped.items() if name[-1] in parts]
    return np.concatenate(pieces)
