"""Training one model whose ends are on the devices and whose trunk is elsewhere (split federated learning, U-shaped:
Thapa et al., SplitFed, 2022; embedding, encoder and task module as the parts): what devices do. models.training.trunk
has the rest.

    device k                                trunk
    x = embedding(batch)         -- x -->   h = blocks with factors (x)
    L = loss(task module(h), y)  <-- h --
    dL/dh, dL/d(task module)     ---->      factors' gradients by the chain rule

Texts, ids and labels stay on the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from models.lora.adapter import HEAD, Floats
from models.training.rounds import Diverged
from models.training.samples import Batch, Ids, Judged, Judging, Split, batches, drawn
from models.training.tensors import given, taken
from wire.errors import PeerError
from wire.messages import RoundMeta, TrainingTask


class Misled(PeerError):
    """By `device`, which takes part; as this shard of a block, or else as one with data."""

    def __init__(self, message: str, device: str, shard: int | None = None) -> None:
        super().__init__(message)
        self.device, self.shard = device, shard


class Ends(Protocol):
    """The parts of a model that a device has: TrainedStage without blocks, TrainedEncoder with a task module alone."""

    factors: dict[str, Tensor]

    def embedded(self, ids: Tensor) -> Tensor: ...

    def loss_at(self, features: Tensor, batch: Batch) -> Tensor: ...

    def judged_at(self, features: Tensor, batch: Batch) -> Judged: ...


class Question(NamedTuple):
    """What the trunk is asked: `states` float32 [n, T, hidden], of which the first `lengths` [n] rows are text."""

    step: int
    judged: bool
    """No gradient will follow."""
    states: Floats
    lengths: Ids


class EndsRound(Judging):
    """A device's part in a round: first what is held out is judged, then so many steps are made."""

    def __init__(
        self,
        stage: Ends,
        shaped: Mapping[str, tuple[int, int]],
        rows: Split,
        task: TrainingTask,
        seed: int,
        asked: RoundMeta,
    ) -> None:
        self._stage, self._rows, self._task = stage, rows, task
        self._head = shaped.get(HEAD)
        self._seed, self._number = seed, asked.round
        tells = task.privacy is None or task.privacy.losses
        super().__init__(batches(rows.held_out, task.batch_rows) if tells else [])
        self._to_train = task.steps if asked.train and rows.trained else 0
        self._done = 0
        self._loss = 0.0
        self._batch: Batch | None = None
        self._width = 0

    def question(self) -> Question | None:
        """The next batch's states; None when all is done."""
        self._batch = self._to_judge
        judged = self._batch is not None
        if not judged and self._done < self._to_train:
            self._batch = self._next_batch()
        if self._batch is None:
            return None
        with torch.no_grad():
            states = taken(self._stage.embedded(given(self._batch.ids)))
        self._width = states.shape[-1]
        step = self._judged if judged else self._done
        return Question(step, judged, np.ascontiguousarray(states, np.float32), self._batch.lengths)

    def answered(self, came: Floats) -> Floats | None:
        """Take features, and the task module behind them if there is one. Gives the gradients of both alike, or None
        where they were asked for to be judged. Raises ValueError for what is of another length or no number, Diverged.
        """
        batch = self._batch
        assert batch is not None
        rows = batch.targets.size
        size = rows * self._width
        if len(came) != size + self._length_behind(rows) or not np.isfinite(came).all():
            raise ValueError(f"{len(came)} numbers, features of {rows} rows of {self._width} were due")
        shape = (*batch.targets.shape, self._width)
        features = given(came[:size].reshape(shape))
        self._take_behind(came[size:])
        if self._to_judge is not None:
            self._judge(self._stage.judged_at(features, batch))
            return None
        return self._gradients(features, batch)

    @property
    def loss(self) -> float | None:
        return self._loss / self._done if self._done else None

    def _next_batch(self) -> Batch:
        """Of the step that is due."""
        return drawn(self._rows.trained, self._task.batch_rows, self._seed, self._number, self._done)

    def _length_behind(self, _rows: int) -> int:
        """Numbers behind the features of so many rows."""
        return 0 if self._head is None else self._head[0] * self._head[1]

    def _take_behind(self, behind: Floats) -> None:
        if self._head is not None:
            with torch.no_grad():
                self._stage.factors[HEAD].copy_(given(behind.reshape(self._head)))

    def _gradients(self, features: Tensor, batch: Batch) -> Floats:
        leaves = [features.requires_grad_(True)]
        if self._head is not None:
            leaves.append(self._stage.factors[HEAD].requires_grad_(True))
        loss = self._stage.loss_at(features, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} in step {self._done}", try_="a lower learning_rate")
        found = torch.autograd.grad(loss, leaves)
        self._loss += value
        self._done += 1
        sent = self._sent_for(found)
        return np.concatenate([taken(gradient).reshape(-1) for gradient in sent]).astype(np.float32, copy=False)

    def _sent_for(self, found: Sequence[Tensor]) -> Sequence[Tensor]:
        """What goes back where these are the gradients by features and task module."""
        return found
