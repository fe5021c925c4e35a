"""A task module in torch: on an encoder that is trained with it (models.training.encoder), or alone, on features that
never change.

It is one matrix [labels, hidden + 1], the last column its bias, and is trained whole.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from models.engine.base import Array
from models.lora.adapter import HEAD
from models.training.factored import Factored, mapped, trained
from models.training.samples import IGNORED, Batch, Judged
from models.training.tensors import given


class TaskModule(Factored):
    """A model whose `factors` have one."""

    def scores(self, features: Tensor) -> Tensor:
        """[n, hidden] -> [n, labels]."""
        head = self.factors[HEAD]
        return functional.linear(features, head[:, :-1], head[:, -1])

    def loss_at(self, features: Tensor, batch: Batch) -> Tensor:
        """Mean cross entropy over those samples of a batch with these features that have a label."""
        return functional.cross_entropy(self.scores(features), given(batch.targets), ignore_index=IGNORED)

    def judged_at(self, features: Tensor, batch: Batch) -> Judged:
        """The same without gradients, and of how many samples the label has the highest score."""
        with torch.no_grad():
            targets = given(batch.targets)
            right = (self.scores(features).argmax(dim=1) == targets) & (targets != IGNORED)
            return Judged(float(self.loss_at(features, batch)), batch.counted, int(right.sum()))


class TrainedHead(TaskModule):
    """Over a table of `features` [n, hidden]: the ids of a batch are numbers of its rows."""

    def __init__(self, features: Array, head: Array) -> None:
        self._table = mapped(features)
        self.factors = {HEAD: trained(head)}

    def loss_of(self, batch: Batch, remember: bool = True) -> Tensor:  # noqa: ARG002 there are no blocks
        return self.loss_at(self._features(batch), batch)

    def judged(self, batch: Batch) -> Judged:
        return self.judged_at(self._features(batch), batch)

    def _features(self, batch: Batch) -> Tensor:
        return self._table[given(batch.ids[:, 0])]
