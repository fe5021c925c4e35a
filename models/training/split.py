"""Training one model whose ends are on the devices and whose trunk is elsewhere (split federated learning, U-shaped:
Thapa et al., SplitFed, 2022; embedding, encoder and task module as the parts).

    device k                                trunk
    x = embedding(batch)         -- x -->   h = blocks with factors (x)
    L = loss(task module(h), y)  <-- h --
    dL/dh, dL/d(task module)     ---->      factors' gradients by the chain rule

Texts, ids and labels stay on the device. A step of the trunk is that of the sum over all devices of w_k L_k, w_k a
device's share of the samples: the same as with all data in one place, to rounding. Gradients are summed in the order of
the devices' names, whenever they come.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from models.engine.base import Array
from models.lora.adapter import HEAD, Floats, flat, length_of, named
from models.training.rounds import Diverged, Trained, finite, optimiser_of
from models.training.samples import Batch, Ids, Judged, Judging, Split, batches, drawn
from wire.errors import PeerError
from wire.messages import RoundMeta, TrainingTask

SLACK: Final = 1.01
"""Rounding, above the most that a gradient can be."""


class Misled(PeerError):
    """By `device`, which takes part."""

    def __init__(self, message: str, device: str) -> None:
        super().__init__(message)
        self.device = device


class Ends(Protocol):
    """The parts of a model that a device has: TrainedStage without blocks, TrainedEncoder with a task module alone."""

    factors: dict[str, Tensor]

    def embedded(self, ids: Tensor) -> Tensor: ...

    def loss_at(self, features: Tensor, batch: Batch) -> Tensor: ...

    def judged_at(self, features: Tensor, batch: Batch) -> Judged: ...


class Trunk(Protocol):
    """All blocks, with factors, and the task module's numbers, which are trained here."""

    factors: dict[str, Tensor]

    def take(self, factors: Mapping[str, Array]) -> None: ...

    def train_only(self, parts: tuple[str, ...]) -> None: ...

    def features(self, states: Tensor, lengths: Tensor, remember: bool = True) -> Tensor: ...


class Learner(Trained, Ends, Trunk, Protocol):
    """What can be trained whole or in parts: TrainedStage, TrainedEncoder."""


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
        super().__init__(batches(rows.held_out, task.batch_rows))
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
            rows, count = self._rows.trained, self._task.batch_rows
            self._batch = drawn(rows, count, self._seed, self._number, self._done)
        if self._batch is None:
            return None
        with torch.no_grad():
            states = self._stage.embedded(torch.from_numpy(self._batch.ids)).numpy()
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
        labels = 0 if self._head is None else self._head[0] * self._head[1]
        if len(came) != rows * self._width + labels or not np.isfinite(came).all():
            raise ValueError(f"{len(came)} numbers, features of {rows} rows of {self._width} were due")
        shape = (*batch.targets.shape, self._width)
        features = torch.from_numpy(came[: rows * self._width].reshape(shape))
        if self._head is not None:
            with torch.no_grad():
                self._stage.factors[HEAD].copy_(torch.from_numpy(came[rows * self._width :].reshape(self._head)))
        if self._to_judge is not None:
            self._judge(self._stage.judged_at(features, batch))
            return None
        return self._gradients(features, batch)

    @property
    def loss(self) -> float | None:
        return self._loss / self._done if self._done else None

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
        return np.concatenate([gradient.numpy().reshape(-1) for gradient in found]).astype(np.float32, copy=False)


class _Asked(NamedTuple):
    """What a device waits for the gradients of."""

    states: Tensor
    lengths: Tensor
    features: Tensor
    """With what its gradient needs; without, where memory is short."""


class TrunkRound:
    """The trunk's part: steps of AdamW on the factors, from gradients that all devices in `ends` send."""

    def __init__(
        self,
        stage: Trunk,
        shaped: Mapping[str, tuple[int, int]],
        task: TrainingTask,
        asked: RoundMeta,
        start: Floats,
        ends: Collection[str],
    ) -> None:
        """Raises ValueError for factors of another length."""
        self._stage, self._shaped, self._task, self._parts = stage, shaped, task, asked.parts
        stage.take(named(start, shaped))
        stage.train_only(self._parts)
        self._leaves = {name: factor for name, factor in stage.factors.items() if name[-1] in self._parts}
        self._optimiser = optimiser_of(self._leaves, task)
        self._ends = tuple(sorted(ends))
        self._samples: dict[str, int] = {}
        self._steps = task.steps if asked.train else 0
        self._asked: dict[str, _Asked] = {}
        self._came: dict[str, Floats] = {}
        self._added = 0
        """Devices whose gradients are in those of this step."""
        self.step = 0

    @property
    def over(self) -> bool:
        return self.step >= self._steps

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Whose gradients of this step have not come."""
        return tuple(device for device in self._ends if device not in self._came)

    @property
    def complete(self) -> bool:
        """Whether all has come for a step."""
        return not self.over and not self.waits_for

    def judged(self, device: str, question: Question) -> Floats:
        """Features that no gradient follows. Raises Misled."""
        with torch.no_grad():
            return self._answer(device, self._stage.features(*_tensors(question)))

    @property
    def samples(self) -> int:
        """Of all devices."""
        return sum(self._samples.values())

    def features(self, device: str, question: Question, samples: int) -> Floats | None:
        """What a device that has so many samples waits for; None for what is of another step, or came before. Raises
        Misled for states that the model makes no numbers of."""
        if self.over or question.step != self.step or device in self._asked:
            return None
        states, lengths = _tensors(question)
        if self._task.remember:
            features = self._stage.features(states, lengths)
        else:
            with torch.no_grad():
                features = self._stage.features(states, lengths)
        answer = self._answer(device, features.detach())
        self._asked[device] = _Asked(states, lengths, features)
        self._samples[device] = samples
        return answer

    def take(self, device: str, step: int, came: Floats) -> bool:
        """A device's gradients, of its features and of the task module; False for what is of another step, or came
        before. Raises Misled for what can't be gradients."""
        if step != self.step or device not in self._asked or device in self._came:
            return False
        self._check(device, self._asked[device].features, came)
        self._came[device] = came
        return True

    def advance(self) -> bool:
        """When all is `complete`: add one device's gradients; True if it was the last, and the step was made. One call
        takes as long as one device's batch. Raises Misled for gradients that are too large to be added, Diverged."""
        if self._added == 0:
            self._optimiser.zero_grad(set_to_none=True)
        self._add(self._ends[self._added])
        self._added += 1
        if self._added < len(self._ends):
            return False
        self._make_step()
        return True

    def vector(self) -> Floats:
        """The factors of the parts that were trained; raises Diverged."""
        factors = {name: factor.detach().numpy() for name, factor in self._stage.factors.items()}
        return finite(flat(factors, self._shaped, self._parts))

    def _answer(self, device: str, features: Tensor) -> Floats:
        parts = [features.numpy().reshape(-1)]
        if not np.isfinite(parts[0]).all():
            raise Misled("states that the model makes no numbers of", device)
        if HEAD in self._shaped:
            parts.append(self._stage.factors[HEAD].detach().numpy().reshape(-1))
        return np.concatenate(parts).astype(np.float32, copy=False)

    def _check(self, device: str, features: Tensor, came: Floats) -> None:
        """The gradient of a mean cross entropy by the scores has a length of sqrt(2) at most, for each text; that of
        features and task module follows from it."""
        labels = length_of({HEAD: self._shaped[HEAD]}) if HEAD in self._shaped else 0
        if len(came) != features.numel() + labels:
            raise Misled(f"{len(came)} gradients, {features.numel() + labels} were due", device)
        if not np.isfinite(came).all():
            raise Misled(f"{int((~np.isfinite(came)).sum())} gradients are no numbers", device)
        if not labels:
            return
        head = self._stage.factors[HEAD].detach().numpy()
        of_features, of_head = came[: features.numel()], came[features.numel() :]
        longest = math.sqrt(float((features.detach() ** 2).sum(dim=-1).max()) + 1)
        most = max(math.sqrt(2) * float(np.linalg.norm(head[:, :-1])), 1e-6), math.sqrt(2) * longest
        for found, limit, what in zip((of_features, of_head), most, ("features", "the task module"), strict=True):
            size = float(np.linalg.norm(found.astype(np.float64)))
            if size > SLACK * limit:
                raise Misled(f"gradients of {what} are {size:.3g} long, at most {limit:.3g} is possible", device)

    def _add(self, device: str) -> None:
        asked, came, share = self._asked[device], self._came[device], self._samples[device] / self.samples
        features = asked.features
        if not self._task.remember:
            features = self._stage.features(asked.states, asked.lengths, False)
        size = features.numel()
        features.backward(share * torch.from_numpy(came[:size].reshape(features.shape)))
        head = self._leaves.get(HEAD)
        if head is not None:
            piece = share * torch.from_numpy(came[size:].reshape(head.shape))
            head.grad = piece if head.grad is None else head.grad + piece
        if not all(leaf.grad is None or bool(leaf.grad.isfinite().all()) for leaf in self._leaves.values()):
            raise Misled("gradients that are too large to be added", device)

    def _make_step(self) -> None:
        for leaf in self._leaves.values():
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
        norm = torch.nn.utils.clip_grad_norm_(list(self._leaves.values()), self._task.most_norm)
        if not math.isfinite(float(norm)):
            raise Diverged(f"the gradient is {float(norm)} in step {self.step}", try_="a lower learning_rate")
        self._optimiser.step()
        self._asked, self._came, self._added = {}, {}, 0
        self.step += 1


def _tensors(question: Question) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(question.states), torch.from_numpy(question.lengths)
