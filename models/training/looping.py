"""Steps of a model of which one block stands at every depth: the hub's round, which says what shards are to multiply,
and a shard's. What they do is in models.training.looped.

A hub lets one batch at a time through all depths. Devices' gradients are added in the order of their names, shards'
parts in the order of shards, and squares of gradients the hub's first: nothing depends on when something came.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.engine.base import Array
from models.lora.adapter import HEAD, Floats, flat, named
from models.training.factored import Factored
from models.training.looped import SUMMED, Hub, Shard
from models.training.rounds import finite, optimiser_of
from models.training.split import Misled, Question
from models.training.tensors import given, taken
from models.training.trunk import check_gradients, shorten, squared
from wire.messages import RoundMeta, TrainingTask
from wire.shares import PartOfBlock

Shapes = Mapping[str, tuple[int, int]]


class Wanted(NamedTuple):
    """Of all shards: `values` [n, T, hidden], or [2, n, T, hidden] backwards, states and gradient."""

    device: str
    """Whose batch it is of."""
    judged: bool
    lengths: Floats
    part: PartOfBlock
    backwards: bool
    last: bool
    """Of the step."""
    values: Floats


class Leaves:
    """Factors of one device with their optimiser, in a round."""

    def __init__(self, stage: Factored, shaped: Shapes, task: TrainingTask, asked: RoundMeta, start: Floats) -> None:
        """Raises ValueError for factors of another length."""
        self._stage, self._shaped, self._task, self._parts = stage, shaped, task, asked.parts
        stage.take(named(start, shaped))
        stage.train_only(asked.parts)
        self._leaves = {name: factor for name, factor in stage.factors.items() if name[-1] in asked.parts}
        self._optimiser = optimiser_of(self._leaves, task)
        self._forget()

    def square(self) -> float:
        """What the squares of all gradients add up to."""
        return squared(self._leaves)

    def step(self, square: float, number: int) -> None:
        """With a whole gradient of these squares; raises Diverged."""
        shorten(self._leaves, square, self._task, number)
        self._optimiser.step()
        self._forget()

    def vector(self) -> Floats:
        """Raises Diverged."""
        factors = {name: taken(factor) for name, factor in self._stage.factors.items()}
        return finite(flat(factors, self._shaped, self._parts))

    def _forget(self) -> None:
        for leaf in self._leaves.values():
            leaf.grad = None


class _Way(NamedTuple):
    """Of a batch through all depths: what went in, and all sums before they were normed, two of each depth."""

    device: str
    judged: bool
    states: Tensor
    lengths: Tensor
    sums: list[Tensor]


class _Back(NamedTuple):
    way: _Way
    at: int
    """Of its sums."""
    gradient: Tensor
    """By that sum."""


class HubRound:
    """A hub's part: all that devices in `ends` and shards are answered and asked."""

    def __init__(
        self,
        stage: Hub,
        shaped: Shapes,
        task: TrainingTask,
        asked: RoundMeta,
        start: Floats,
        ends: Collection[str],
        loops: int,
    ) -> None:
        """`shaped`, `start`: of the hub's own factors. Raises ValueError for factors of another length."""
        self._stage, self._loops = stage, loops
        self._leaves = Leaves(stage, shaped, task, asked, start)
        self._ends = tuple(sorted(ends))
        self._samples: dict[str, int] = {}
        self._steps = task.steps if asked.train else 0
        self._ways: dict[str, tuple[_Way, Tensor]] = {}
        """Devices that were given features in this step."""
        self._came: dict[str, Floats] = {}
        self._added = 0
        self._forwards: _Way | None = None
        self._backwards: _Back | None = None
        self.step = 0

    @property
    def over(self) -> bool:
        return self.step >= self._steps

    @property
    def busy(self) -> bool:
        """Whether shards are asked something."""
        return self._forwards is not None or self._backwards is not None

    @property
    def samples(self) -> int:
        """Of all devices."""
        return sum(self._samples.values())

    @property
    def without_states(self) -> tuple[str, ...]:
        """Whose batch of this step has not come through."""
        return tuple(device for device in self._ends if not self._came_through(device))

    @property
    def without_gradients(self) -> tuple[str, ...]:
        """Who was given features in this step, and has sent no gradients."""
        return tuple(device for device in self._ways if device not in self._came)

    @property
    def addable(self) -> bool:
        """Whether the next device's gradients are there, and what they weigh beside the others' is known."""
        if self.over or self.added or self.busy:
            return False
        return self._ends[self._added] in self._came and len(self._samples) == len(self._ends)

    @property
    def added(self) -> bool:
        """Whether all gradients of this step are: it wants to be made."""
        return not self.over and self._added == len(self._ends)

    def begin(self, device: str, question: Question, samples: int) -> bool:
        """Let a batch through, of a device with so many samples; False for what is of another step, or came before."""
        assert not self.busy
        if not question.judged:
            if self.over or question.step != self.step or self._came_through(device):
                return False
            self._samples[device] = samples
        states, lengths = given(question.states), given(question.lengths)
        self._forwards = _Way(device, question.judged, states, lengths, [])
        return True

    def take(self, device: str, step: int, came: Floats) -> bool:
        """The gradients by a device's features; False for what is of another step, or came before. Raises Misled for
        what can't be gradients."""
        if step != self.step or device not in self._ways or device in self._came:
            return False
        check_gradients(device, self._ways[device][1], came, self._stage.factors[HEAD])
        self._came[device] = came
        return True

    def begin_back(self) -> None:
        """Add the gradients of the next device, which are `addable`."""
        device = self._ends[self._added]
        (way, features), came = self._ways[device], given(self._came[device])
        share = self._samples[device] / self.samples
        size, head = features.numel(), self._stage.factors[HEAD]
        if head.requires_grad:
            piece = share * came[size:].reshape(head.shape)
            head.grad = piece if head.grad is None else head.grad + piece
        last = self._normed(way, len(way.sums) - 1).requires_grad_(True)
        self._stage.means(last, way.lengths).backward(share * came[:size].reshape(features.shape))
        assert last.grad is not None
        self._back(way, len(way.sums) - 1, last.grad)

    @property
    def wanted(self) -> Wanted:
        """What shards are asked, while it is `busy`."""
        if self._forwards is not None:
            way, at = self._forwards, len(self._forwards.sums)
            values = self._normed(way, at - 1)
        else:
            assert self._backwards is not None
            way, at = self._backwards.way, self._backwards.at
            values = torch.stack([self._normed(way, at - 1), self._backwards.gradient])
        back = self._forwards is None
        last = back and at == 0 and self._added == len(self._ends) - 1
        return Wanted(way.device, way.judged, taken(way.lengths), SUMMED[at % 2], back, last, taken(values))

    def answered(self, parts: Sequence[Floats]) -> Floats | None:
        """Take what all shards answered, in their order. Gives the features of a batch that is through, the task module
        behind them [m]. Raises Misled for a batch that the model makes no numbers of, and that is dropped."""
        tensors = [given(part) for part in parts]
        if self._forwards is not None:
            with torch.no_grad():
                return self._forward(self._forwards, tensors)
        assert self._backwards is not None
        way, at, gradient = self._backwards
        for part in tensors:
            gradient = gradient + part
        self._backwards = None
        if at:
            self._back(way, at - 1, gradient)
        else:
            self._added += 1
            del self._ways[way.device]
        return None

    def square(self, of_shards: Sequence[float]) -> float:
        """The square of the whole gradient, when it is `added`."""
        return sum(of_shards, self._leaves.square())

    def make_step(self, square: float) -> None:
        """Raises Diverged."""
        assert self.added
        self._leaves.step(square, self.step)
        self._came, self._added = {}, 0
        self._ways = {}
        self.step += 1

    def vector(self) -> Floats:
        """The hub's factors of the parts that were trained; raises Diverged."""
        return self._leaves.vector()

    def _came_through(self, device: str) -> bool:
        return device in self._ways or device in self._came

    def _forward(self, way: _Way, parts: Sequence[Tensor]) -> Floats | None:
        at = len(way.sums)
        way.sums.append(self._stage.added(SUMMED[at % 2], parts, self._normed(way, at - 1)))
        if at + 1 < 2 * self._loops:
            return None
        self._forwards = None
        features = self._stage.means(self._normed(way, at), way.lengths)
        found: Floats = taken(features)
        if not np.isfinite(found).all():
            raise Misled("states that the model makes no numbers of", way.device)
        if not way.judged:
            self._ways[way.device] = way, features
        return np.concatenate([found.reshape(-1), taken(self._stage.factors[HEAD]).reshape(-1)])

    def _back(self, way: _Way, at: int, gradient: Tensor) -> None:
        self._backwards = _Back(way, at, self._stage.backwards(SUMMED[at % 2], way.sums[at], gradient))

    def _normed(self, way: _Way, at: int) -> Tensor:
        """What came of a sum; before the first, what went in."""
        with torch.no_grad():
            return way.states if at < 0 else self._stage.normed(SUMMED[at % 2], way.sums[at])


class ShardRound:
    """A shard's part."""

    def __init__(self, stage: Shard, shaped: Shapes, task: TrainingTask, asked: RoundMeta, start: Floats) -> None:
        """Raises ValueError for factors of another length."""
        self._stage = stage
        self._leaves = Leaves(stage, shaped, task, asked, start)
        self._steps = task.steps if asked.train else 0
        self.step = 0

    @property
    def over(self) -> bool:
        return self.step >= self._steps

    def answer(self, part: PartOfBlock, backwards: bool, values: Floats, lengths: Array) -> Floats:
        """What of a sum is its part, or of a gradient (models.training.looping.Wanted)."""
        tensor, of_texts = given(values), given(lengths)
        if backwards:
            found: Floats = taken(self._stage.backwards(part, tensor[0], tensor[1], of_texts))
            return found
        with torch.no_grad():
            made: Floats = taken(self._stage.made(part, tensor, of_texts))
        return made

    def square(self) -> float:
        return self._leaves.square()

    def make_step(self, square: float) -> None:
        """With a whole gradient of these squares; raises Diverged."""
        self._leaves.step(square, self.step)
        self.step += 1

    def vector(self) -> Floats:
        return self._leaves.vector()
