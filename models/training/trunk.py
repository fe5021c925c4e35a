"""The blocks of a model whose ends are elsewhere, all or a segment of them, in the steps that all make together.

    device k          segment 0            segment 1 (the last)
    x      -- x -->   h = blocks (x)
                      -- h -->             f = blocks (h)
           <-- f ------------------------
    dL/df  --------------------------->    factors' gradients, dL/dh
                      <-- dL/dh --
                      factors' gradients
                      -- their length -->  (all segments shorten the whole gradient by the same, and make the step)

A step is that of the sum over all devices of w_k L_k, w_k a device's share of the samples: the same as with all data in
one place, to rounding. Gradients are added in the order of the devices' names, whenever they come, and squares of
gradients from the last factor to the first: where the blocks are cut changes no bit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from models.engine.base import Array
from models.lora.adapter import HEAD, Floats, flat, named
from models.training.rounds import Diverged, Trained, finite, optimiser_of
from models.training.split import Ends, Misled, Question
from models.training.tensors import given, taken
from wire.messages import RoundMeta, TrainingTask

SLACK: Final = 1.01
"""Rounding, above the most that a gradient can be."""


class Trunk(Protocol):
    """Blocks with factors, and the task module's numbers, which are trained with the last of them."""

    factors: dict[str, Tensor]

    def take(self, factors: Mapping[str, Array]) -> None: ...

    def train_only(self, parts: tuple[str, ...]) -> None: ...

    def run(self, states: Tensor, lengths: Tensor, remember: bool = True, /) -> Tensor: ...

    def features(self, states: Tensor, lengths: Tensor, remember: bool = True) -> Tensor: ...


class Learner(Trained, Ends, Trunk, Protocol):
    """What can be trained whole or in parts: TrainedStage, TrainedEncoder."""


class Place(NamedTuple):
    """Of a segment among those that have the blocks."""

    first: bool = True
    last: bool = True


class Backwards(NamedTuple):
    """`gradient` of the loss by what `device` sent, as it goes on to the segment before: empty where that has no use
    for it; None from the first."""

    device: str
    gradient: Floats | None


class Asked(NamedTuple):
    """What a device waits for the gradients of."""

    states: Tensor
    lengths: Tensor
    made: Tensor
    """Of these, with what its gradient needs; without, where memory is short."""


NOTHING: Final = Asked(torch.zeros(0), torch.zeros(0), torch.zeros(0))
"""Where nothing is trained: what is kept until the others are done with the step."""


class TrunkRound:
    """A segment's part: steps of AdamW on its factors, from gradients of all devices in `ends`."""

    def __init__(
        self,
        stage: Trunk,
        shaped: Mapping[str, tuple[int, int]],
        task: TrainingTask,
        asked: RoundMeta,
        start: Floats,
        ends: Collection[str],
        place: Place = Place(),  # noqa: B008
    ) -> None:
        """`shaped`, `start`: of the segment's own factors. Raises ValueError for factors of another length."""
        self._stage, self._shaped, self._task, self._parts = stage, shaped, task, asked.parts
        stage.take(named(start, shaped))
        stage.train_only(self._parts)
        self._leaves = {name: factor for name, factor in stage.factors.items() if name[-1] in self._parts}
        self._optimiser = optimiser_of(self._leaves, task) if self._leaves else None
        self._ends = tuple(sorted(ends))
        self._place = place
        self._frozen = task.last_only and not place.last
        """Nothing here is trained, nor before."""
        self._goes_back = not task.last_only and not place.first
        """Whether those before need a gradient."""
        self._samples: dict[str, int] = {}
        self._steps = task.steps if asked.train else 0
        self._asked: dict[str, Asked] = {}
        self._came: dict[str, Floats] = {}
        self._added = 0
        """Devices whose gradients are in those of this step."""
        self.step = 0

    @property
    def over(self) -> bool:
        return self.step >= self._steps

    @property
    def without_states(self) -> tuple[str, ...]:
        """Whose states of this step have not come."""
        return tuple(device for device in self._ends if device not in self._asked)

    @property
    def waits_for(self) -> tuple[str, ...]:
        """Whose gradients of this step have not come."""
        return tuple(device for device in self._ends if device not in self._came)

    @property
    def addable(self) -> bool:
        """Whether the next device's gradients are there, and what they weigh beside the others' is known."""
        if self.over or self.added:
            return False
        return self._ends[self._added] in self._came and len(self._samples) == len(self._ends)

    @property
    def added(self) -> bool:
        """Whether all gradients of this step are: it wants to be made."""
        return not self.over and self._added == len(self._ends)

    @property
    def samples(self) -> int:
        """Of all devices."""
        return sum(self._samples.values())

    def judged(self, device: str, question: Question) -> Floats:
        """What no gradient follows: features, or the states that go on. Raises Misled."""
        with torch.no_grad():
            return self._answer(device, self._run(*_tensors(question), True))

    def forwards(self, device: str, question: Question, samples: int) -> Floats | None:
        """Features for a device that has so many samples, the task module behind them if there is one [m], or the
        states that go on [n, T, hidden]; None for what is of another step, or came before. Raises Misled for states
        that the model makes no numbers of."""
        if self.over or question.step != self.step or device in self._asked:
            return None
        self._asked[device], answer = self._forwards(device, *_tensors(question))
        self._samples[device] = samples
        return answer

    def take(self, device: str, step: int, came: Floats) -> bool:
        """The gradients by what was made of a device's states; False for what is of another step, or came before.
        Raises Misled for what can't be gradients."""
        if step != self.step or device not in self._asked or device in self._came:
            return False
        self._check(device, self._asked[device], came)
        self._came[device] = came
        return True

    def backwards(self) -> Backwards:
        """Add the gradients of the next device, which are `addable`. Raises Misled for those that are too large."""
        if self._added == 0:
            for leaf in self._leaves.values():
                leaf.grad = None
        device = self._ends[self._added]
        found = self._add(device)
        if not all(leaf.grad is None or bool(leaf.grad.isfinite().all()) for leaf in self._leaves.values()):
            del self._came[device]  # else they would be added again
            raise Misled("gradients that are too large to be added", device)
        self._added += 1
        return Backwards(device, found)

    def square(self, behind: float) -> float:
        """The sum of the squares of the step's gradients, of this segment and those behind it, whose sum is given."""
        return squared(self._leaves, behind)

    def make_step(self, square: float) -> None:
        """With all gradients, whose squares add up to `square` over all segments. Raises Diverged."""
        assert self.added
        shorten(self._leaves, square, self._task, self.step)
        if self._optimiser is not None:
            self._optimiser.step()
        self._asked, self._came, self._added = {}, {}, 0
        self.step += 1

    def vector(self) -> Floats:
        """The factors of the parts that were trained; raises Diverged."""
        factors = {name: taken(factor) for name, factor in self._stage.factors.items()}
        return finite(flat(factors, self._shaped, self._parts))

    def _forwards(self, device: str, states: Tensor, lengths: Tensor) -> tuple[Asked, Floats]:
        """What a device's gradient needs, and what is made of its states."""
        if self._task.remember and not self._frozen:
            made = self._run(states.requires_grad_(self._goes_back), lengths, True)
        else:
            with torch.no_grad():
                made = self._run(states, lengths, True)
        answer = self._answer(device, made.detach())
        return NOTHING if self._frozen else Asked(states, lengths, made), answer

    def _run(self, states: Tensor, lengths: Tensor, remember: bool) -> Tensor:
        run = self._stage.features if self._place.last else self._stage.run
        return run(states, lengths, remember)

    def _answer(self, device: str, made: Tensor) -> Floats:
        found: Floats = taken(made)
        if not np.isfinite(found).all():
            raise Misled("states that the model makes no numbers of", device)
        if not self._place.last:
            return np.ascontiguousarray(found, np.float32)
        parts = [found.reshape(-1)]
        if HEAD in self._shaped:
            parts.append(taken(self._stage.factors[HEAD]).reshape(-1))
        return np.concatenate(parts).astype(np.float32, copy=False)

    def _check(self, device: str, asked: Asked, came: Floats) -> None:
        check_gradients(device, asked.made, came, self._stage.factors[HEAD] if HEAD in self._shaped else None)

    def _add(self, device: str) -> Floats | None:
        """Gives the gradient by the states. The last segment weighs what came; so it is weighed when it goes on."""
        if self._frozen:
            return self._nothing
        asked, came = self._asked[device], self._came[device]
        share = self._share(device) if self._place.last else 1.0
        states, made = asked.states, asked.made
        if not self._task.remember:
            states = states.requires_grad_(self._goes_back)
            made = self._run(states, asked.lengths, False)
        size = made.numel()
        made.backward(share * given(came[:size].reshape(made.shape)))
        head = self._leaves.get(HEAD)
        if head is not None:
            add_to(head, share * given(came[size:].reshape(head.shape)))
        if not self._goes_back:
            return self._nothing
        assert states.grad is not None
        found: Floats = taken(states.grad)
        return found

    def _share(self, device: str) -> float:
        """What a device's gradients weigh."""
        return self._samples[device] / self.samples

    @property
    def _nothing(self) -> Floats | None:
        """What goes on to the segment before, if there is one, where it needs no gradient."""
        return None if self._place.first else np.zeros(0, np.float32)


def check_numbers(device: str, came: Floats, due: int) -> None:
    """Raise Misled unless so many finite ones came."""
    if len(came) != due:
        raise Misled(f"{len(came)} gradients, {due} were due", device)
    if not np.isfinite(came).all():
        raise Misled(f"{int((~np.isfinite(came)).sum())} gradients are no numbers", device)


def add_to(leaf: Tensor, piece: Tensor) -> None:
    """Of its gradient."""
    leaf.grad = piece if leaf.grad is None else leaf.grad + piece


def _tensors(question: Question) -> tuple[Tensor, Tensor]:
    return given(question.states), given(question.lengths)


def squared(leaves: Mapping[str, Tensor], behind: float = 0.0) -> float:
    """The squares of gradients, added to those `behind` from the last to the first, in float64."""
    for leaf in reversed(list(leaves.values())):
        behind += float((leaf.grad.double() ** 2).sum()) if leaf.grad is not None else 0.0
    return behind


def shorten(leaves: Mapping[str, Tensor], square: float, task: TrainingTask, step: int) -> None:
    """Shorten gradients as the whole gradient is shortened, whose squares add up to `square`; raises Diverged. Those
    that have none get one of zeros."""
    norm = math.sqrt(square) if math.isfinite(square) and square >= 0 else math.nan
    if not math.isfinite(norm):
        raise Diverged(f"the gradient is {norm} in step {step}", try_="a lower learning_rate")
    shortened = min(1.0, task.most_norm / (norm + 1e-6))
    for leaf in leaves.values():
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.mul_(shortened)


def check_gradients(device: str, made: Tensor, came: Floats, module: Tensor | None) -> None:
    """Of what was made for a device, and of the task module behind it, if there is one. The gradient of a mean cross
    entropy by the scores has a length of sqrt(2) at most, for each text; that of features and task module follows from
    it. Raises Misled."""
    check_numbers(device, came, made.numel() + (0 if module is None else module.numel()))
    if module is None:
        return
    head = taken(module)
    of_features, of_head = came[: made.numel()], came[made.numel() :]
    longest = math.sqrt(float((made.detach() ** 2).sum(dim=-1).max()) + 1)
    most = max(math.sqrt(2) * float(np.linalg.norm(head[:, :-1])), 1e-6), math.sqrt(2) * longest
    for found, limit, what in zip((of_features, of_head), most, ("features", "the task module"), strict=True):
        size = float(np.linalg.norm(found.astype(np.float64)))
        if size > SLACK * limit:
            raise Misled(f"gradients of {what} are {size:.3g} long, at most {limit:.3g} is possible", device)
