"""Gradients by what a low-rank matrix makes, where it is the last before the cut (our reading of the abstract of
Federated Low-Rank Adaptation for Large Language Model Fine-Tuning Over Wireless Networks, GLOBECOM 2024).

The last block of a Llama ends with h = m + W x + s B u, u = A x. Where A [r, ffn] and B [d, r] alone are trained,

    dL/du = s B^T dL/dh             r numbers for each row; dL/dA = sum of (dL/du) x^T, and the trunk has x
    dL/dB = s sum of (dL/dh) u^T    d r numbers for each batch, however many rows it has

are all that the trunk needs of dL/dh, which has d numbers for each row. So

    device k                                     trunk
    x = embedding(batch)             -- x -->    h = blocks(x)
    L = loss(h)                      <-- h, B, u --
    dL/du, dL/dB                     ---->       dL/dA

with B and dL/du in rounds that train A, u and dL/dB in those that train B. B is told in each step if it is trained,
too, else in the first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.lora.adapter import Floats
from models.training.llama import TrainedStage
from models.training.samples import Split
from models.training.split import Ends, EndsRound
from models.training.tensors import given
from models.training.trunk import NOTHING, Asked, Place, Trunk, TrunkRound, add_to, check_numbers
from wire.messages import RoundMeta, TrainingTask


def ends_kind(task: TrainingTask) -> type[EndsRound]:
    """How a device with the ends makes its rounds."""
    return LowRankEnds if task.uplink_grad == "lowrank" else EndsRound


def trunk_kind(task: TrainingTask, place: Place) -> type[TrunkRound]:
    """How a segment of the trunk does."""
    return LowRankTrunk if task.uplink_grad == "lowrank" and place.last else TrunkRound


class LowRankCut:
    """What goes behind features, and back instead of their gradient, in a round that trains these parts."""

    def __init__(self, shaped: Mapping[str, tuple[int, int]], task: TrainingTask, parts: Collection[str]) -> None:
        """Raises ValueError where there are other factors than those of one `down`."""
        if [name.split(".")[2:] for name in shaped] != [["down", "a"], ["down", "b"]]:
            raise ValueError(f"gradients by a low-rank matrix: factors of one down are due, not {', '.join(shaped)}")
        self.a, self.b = shaped
        self.rank, self.width = shaped[self.a][0], shaped[self.b][0]
        self.scale = task.alpha / task.rank
        self.trains_a, self.trains_b = "a" in parts, "b" in parts

    def tells_b(self, step: int) -> bool:
        """Whether B goes behind the features of a step."""
        return self.trains_a and (self.trains_b or step == 0)

    def length_behind(self, rows: int, step: int) -> int:
        """Numbers behind the features of so many rows: B, if it is told, and u, if B is trained."""
        return self.rank * (self.tells_b(step) * self.width + self.trains_b * rows)

    def length_back(self, rows: int) -> int:
        """Numbers that come back: gradients by u, if A is trained, and by B, if that is."""
        return self.rank * (self.trains_a * rows + self.trains_b * self.width)


class LowRankEnds(EndsRound):
    """A device's part."""

    def __init__(
        self,
        stage: Ends,
        shaped: Mapping[str, tuple[int, int]],
        rows: Split,
        task: TrainingTask,
        seed: int,
        asked: RoundMeta,
    ) -> None:
        """Raises ValueError for other factors than those of one `down`."""
        super().__init__(stage, shaped, rows, task, seed, asked)
        self._cut = LowRankCut(shaped, task, asked.parts)
        self._b = torch.zeros(self._cut.width, self._cut.rank)
        self._u = torch.zeros(0, self._cut.rank)

    def _length_behind(self, rows: int) -> int:
        return 0 if self._to_judge is not None else self._cut.length_behind(rows, self._done)

    def _take_behind(self, behind: Floats) -> None:
        if self._to_judge is not None:
            return
        size = self._b.numel() if self._cut.tells_b(self._done) else 0
        if size:
            self._b = given(behind[:size].reshape(self._b.shape)).clone()
        self._u = given(behind[size:].reshape(-1, self._cut.rank))

    def _sent_for(self, found: Sequence[Tensor]) -> Sequence[Tensor]:
        [by_features] = found
        by_rows = self._cut.scale * by_features.reshape(-1, self._cut.width)
        by_u = [by_rows @ self._b] if self._cut.trains_a else []
        by_b = [by_rows.T @ self._u] if self._cut.trains_b else []
        return [*by_u, *by_b]


class LowRankTrunk(TrunkRound):
    """The part of the segment that has the last block."""

    def __init__(self, stage: Trunk, shaped: Mapping[str, tuple[int, int]], *arguments: Any) -> None:
        """As TrunkRound; raises ValueError for other factors than those of one `down`, and for another model."""
        if not isinstance(stage, TrainedStage):
            raise ValueError("gradients by a low-rank matrix are of language models")
        super().__init__(stage, shaped, *arguments)
        self._language_model = stage
        self._cut = LowRankCut(shaped, self._task, self._parts)
        self._rows: dict[str, int] = {}
        """Of each device's batch."""

    def _forwards(self, device: str, states: Tensor, _lengths: Tensor) -> tuple[Asked, Floats]:
        cut, factors = self._cut, self._language_model.factors
        with torch.no_grad():
            features, wide = self._language_model.features_and_wide(states)
            told = [factors[cut.b]] if cut.tells_b(self.step) else []
            told += [wide @ factors[cut.a].T] if cut.trains_b else []
            answer = self._answer(device, torch.cat([one.reshape(-1) for one in (features, *told)]))
        self._rows[device] = features[..., 0].numel()
        if not cut.trains_a:
            return NOTHING, answer
        return (NOTHING._replace(made=wide) if self._task.remember else NOTHING._replace(states=states)), answer

    def _check(self, device: str, _asked: Asked, came: Floats) -> None:
        check_numbers(device, came, self._cut.length_back(self._rows[device]))

    def _add(self, device: str) -> Floats | None:
        cut, asked, rows = self._cut, self._asked[device], self._rows[device]
        came = given(self._share(device) * self._came[device])
        size = rows * cut.rank if cut.trains_a else 0
        if cut.trains_a:
            with torch.no_grad():
                states = asked.states
                wide = asked.made if self._task.remember else self._language_model.features_and_wide(states)[1]
            add_to(self._leaves[cut.a], came[:size].reshape(rows, cut.rank).T @ wide.reshape(rows, -1))
        if cut.trains_b:
            add_to(self._leaves[cut.b], came[size:].reshape(cut.width, cut.rank))
        return self._nothing
