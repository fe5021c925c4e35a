"""One device's part in a round: from the factors that it is sent, so many steps on its own rows.

Nothing is remembered between rounds, so who begins a round again comes to the same factors, bit for bit, on the same
number of threads: rows are drawn by seed, round and step, and AdamW begins each round with no moments
(Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019; without decay: the factors begin at nothing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np
import torch

from models.engine.base import Array
from models.lora.adapter import PARTS, Floats, flat, is_part, named
from models.training.private import Guard
from models.training.samples import Batch, Judged, Judging, Split, batches, drawn
from models.training.tensors import taken
from wire.errors import EdgelamError
from wire.messages import RoundMeta, TrainingTask
from wire.modalities import modules_of

BETAS: Final = (0.9, 0.95)
"""The second as language models are tuned with: rounds are short."""


class Diverged(EdgelamError):
    """A loss or a factor is no number."""


def optimiser_of(leaves: Mapping[str, torch.Tensor], task: TrainingTask) -> torch.optim.Optimizer:
    """Of one round: it begins with no moments."""
    return torch.optim.AdamW(list(leaves.values()), lr=task.learning_rate, betas=BETAS, weight_decay=0.0)


def finite(vector: Floats) -> Floats:
    """What came out of a round; raises Diverged."""
    if not np.isfinite(vector).all():
        raise Diverged("a factor is no number after the round", try_="a lower learning_rate")
    return vector


def trained_in(task: TrainingTask, sent: Sequence[str]) -> tuple[str, ...]:
    """Parts that a round trains whose update holds these: the device's own B, too, if it has one."""
    return tuple(part for part in PARTS if part in sent or (part == "b" and task.begins == "own-b"))


class Trained(Protocol):
    """A model with factors: models.training.llama.TrainedStage, models.training.encoder.TrainedEncoder."""

    factors: dict[str, torch.Tensor]

    def take(self, factors: Mapping[str, Array]) -> None: ...

    def hold(self, factors: Mapping[str, Array]) -> None: ...

    def train_only(self, parts: tuple[str, ...]) -> None: ...

    def loss_of(self, batch: Batch, remember: bool = True) -> torch.Tensor: ...

    def judged(self, batch: Batch) -> Judged: ...


class Round(Judging):
    """Of one job on one device. `step` is called until it gives False."""

    def __init__(
        self,
        stage: Trained,
        shaped: Mapping[str, tuple[int, int]],
        rows: Split,
        task: TrainingTask,
        seed: int,
        asked: RoundMeta,
        start: Floats,
        guard: Guard | None = None,
    ) -> None:
        """`seed`: of the device; `guard`: of a private job, for rounds that train. Raises ValueError for factors of
        another length."""
        self._stage, self._shaped, self._rows, self._task = stage, shaped, rows, task
        self._seed, self._number = seed, asked.round
        self._parts: tuple[str, ...] = modules_of(asked.objectives) or asked.parts
        self._trained = modules_of(asked.objectives) or trained_in(task, asked.parts)
        stage.take(named(start, shaped))
        stage.train_only(self._trained)
        self._leaves = {name: factor for name, factor in stage.factors.items() if is_part(name, self._trained)}
        self._optimiser = optimiser_of(self._leaves, task)
        self._guard = guard
        self._start = start
        self._tells = task.privacy is None or task.privacy.losses
        # Private jobs take samples one by one, and have no memory for more.
        one_by_one = task.privacy is not None and task.privacy.unit == "sample"
        self._at_once = 1 if one_by_one else min(task.batch_rows, task.rows_at_once)
        super().__init__(batches(rows.held_out, self._at_once) if self._tells else [])
        self._to_train = task.steps if asked.train and rows.trained else 0
        self._done = 0
        self._loss = 0.0

    def step(self) -> bool:
        """Judge one batch of what is held out, or train on one; False when all is done. Raises Diverged."""
        if self._to_judge is not None:
            self._judge(self._stage.judged(self._to_judge))
        elif self._done < self._to_train:
            self._train()
            self._done += 1
        return self._to_judge is not None or self._done < self._to_train

    @property
    def loss(self) -> float | None:
        return self._loss / self._done if self._done and self._tells and not self._by_sample else None

    def vector(self) -> Floats:
        """The factors of the parts that are sent; raises Diverged."""
        found = flat(self.factors, self._shaped, self._parts)
        if self._guard is None:
            return finite(found)
        if not self._guard.by_sample:
            start = flat(named(self._start, self._shaped), self._shaped, self._parts)
            return self._guard.changed(start, found, self._shaped, self._parts)
        return found

    @property
    def factors(self) -> dict[str, Floats]:
        """All, as they are by now."""
        return {name: taken(factor) for name, factor in self._stage.factors.items()}

    @property
    def _by_sample(self) -> bool:
        return self._guard is not None and self._guard.by_sample

    def _train(self) -> None:
        if self._guard is not None and self._guard.by_sample:
            rows, leaves = self._rows.trained, self._leaves
            self._guard.gradient(rows, self._loss_of, leaves, self._shaped, self._trained)
            self._optimiser.step()
            return
        self._optimiser.zero_grad(set_to_none=True)
        batch = drawn(self._rows.trained, self._task.batch_rows, self._seed, self._number, self._done)
        value = self._accumulate(batch)
        torch.nn.utils.clip_grad_norm_(list(self._leaves.values()), self._task.most_norm)
        if not math.isfinite(value) and self._guard is not None:
            # That it happened would tell something of the data: the round ends here, and what is left is clipped.
            self._done = self._to_train
            return
        if not math.isfinite(value):
            raise Diverged(f"the loss is {value} in step {self._done}", try_="a lower learning_rate")
        self._optimiser.step()
        self._loss += value

    def _accumulate(self, batch: Batch) -> float:
        """Make the gradients of a batch, in as many pieces as memory asks for, and give its loss."""
        if len(batch.ids) <= self._at_once or not batch.counted:
            loss = self._loss_of(batch)
            loss.backward()
            return float(loss.detach())
        value = 0.0
        for piece in batch.pieces(self._at_once):
            loss = self._loss_of(piece) * (piece.counted / batch.counted)
            loss.backward()
            value += float(loss.detach())
        return value

    def _loss_of(self, batch: Batch) -> torch.Tensor:
        return self._stage.loss_of(batch, self._task.remember)
