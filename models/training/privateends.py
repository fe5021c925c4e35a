"""A device's part in a round of a split model, of a job that is to know little of its data (models.privacy).

Of the last block's low-rank product B u, u = A x, with A frozen, the device makes the gradient of each sample by B,

    G_i = s sum over its tokens of g_i u_i^T          g_i: of the sample's mean loss, by features

by itself, clips it, adds them up, and puts noise on the sum: one release in each step (Abadi et al., Deep learning with
differential privacy, 2016; A frozen as in Sun et al., Improving LoRA in privacy-preserving federated learning, 2024).
Samples take part by chance, and the sum counts as of so many as do on average. What the trunk makes of it, and so the
adapter, tells no more. The states that a device sends before are not covered: whoever has them, the trunk first of all,
can find out the texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from models.lora.adapter import Floats
from models.privacy.noise import Stream
from models.privacy.plan import Measure, most_drawn
from models.training.lowrank import LowRankEnds
from models.training.private import Guard
from models.training.samples import NOTHING, Batch, Row, Split, batch_of
from models.training.split import Ends
from models.training.tensors import taken
from wire.messages import RoundMeta, TrainingTask

PARTS: Final = ("b",)
"""What alone is trained."""


class Releases(Protocol):
    """Who keeps account of a round's steps."""

    @property
    def measure(self) -> Measure: ...

    def draws(self, step: int, /) -> Stream:
        """Numbers that say who takes part in a step: the same for the same step."""

    def paid(self, step: int, came: Floats, /) -> Stream:
        """Numbers for the noise on what is told of a step, which is made of what `came`; once they are given it is
        entered. Raises what keeps it from being told."""


class PrivateEnds(LowRankEnds):
    """A round that trains B. Of what the model makes of the data no number goes out but the noised sums, and losses on
    what is held out if the job asks for them."""

    def __init__(
        self,
        stage: Ends,
        shaped: Mapping[str, tuple[int, int]],
        rows: Split,
        task: TrainingTask,
        seed: int,
        asked: RoundMeta,
        releases: Releases,
    ) -> None:
        """Raises ValueError for factors of others than one `down`, and for what no noise covers."""
        privacy = task.privacy
        if privacy is None or privacy.unit != "sample" or task.uplink_grad != "lowrank" or asked.parts != PARTS:
            raise ValueError("gradients that no noise covers: in a private job B alone is trained, of one sample each")
        super().__init__(stage, shaped, rows, task, seed, asked)
        self._releases, self._privacy = releases, privacy
        self._shape = {name: shape for name, shape in shaped.items() if name[-1] in PARTS}
        self._taken: Sequence[Row] = ()
        self._came: Floats = np.zeros(0, np.float32)

    @property
    def loss(self) -> None:
        """Of samples that are trained on none is told."""

    def answered(self, came: Floats) -> Floats | None:
        """As EndsRound; raises also what keeps a step from being told."""
        self._came = came
        return super().answered(came)

    def _next_batch(self) -> Batch:
        rows, share = self._rows.trained, self._releases.measure.share
        drawn = self._releases.draws(self._done).sampled(len(rows), share)[: most_drawn(self._task.batch_rows)]
        self._taken = [rows[number] for number in drawn if rows[number].teaches]
        return batch_of(self._taken or [NOTHING])

    def _gradients(self, features: Tensor, batch: Batch) -> Floats:
        measure = self._releases.measure
        guard = Guard(self._privacy, measure, self._releases.paid(self._done, self._came))
        wide = self._u.reshape(*batch.targets.shape, self._cut.rank)
        total = np.zeros(self._cut.width * self._cut.rank, np.float32)
        for number, row in enumerate(self._taken):
            length = len(row.ids)
            own = self._by_b(features[number : number + 1, :length], row, wide[number, :length])
            total += guard.clipped(own, self._shape, PARTS)
        self._done += 1
        return guard.mean(total, len(self._rows.trained))

    def _by_b(self, features: Tensor, row: Row, wide: Tensor) -> Floats:
        """[d r] the gradient of one sample's loss by B, from its features [1, T, d] and u [T, r]."""
        leaf = features.detach().requires_grad_(True)
        [by_features] = torch.autograd.grad(self._stage.loss_at(leaf, batch_of([row])), [leaf])
        by_rows = self._cut.scale * by_features.reshape(-1, self._cut.width)
        found: Floats = taken(by_rows.T @ wide).reshape(-1)
        return found
