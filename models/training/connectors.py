"""Connectors and a task module in torch: samples of several modalities, mapped into one space, where labels are told.

    z = C_m x + c_m          connector of the sample's modality, [width]
    u = z / rms (z)          RMSNorm without a gain (Zhang and Sennrich, 2019): modalities of any size are alike there
    scores = H u + h         task module, [labels]; of a contrastive objective the cosines of u with labels' anchors

What a module is trained for is an objective of the round (wire.modalities.Objective). All of a batch go into one step:
each module has gradients of its own objective alone, as the others' factors count as constants there. A step is that of
the sum of the objectives' losses, each over the samples that it is about, divided by all of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models.engine.base import Array
from models.training.factored import Factored, mapped, trained
from models.training.samples import IGNORED, Batch, Judged, Row
from models.training.tensors import given
from wire.modalities import CONNECTOR, HEAD, Objective, connector_of, modules_of

LEAST: Final = 1e-6
"""Added to the mean square that is divided by."""


class TrainedConnectors(Factored):
    """Over tables of features [n, features] of the modalities that a device owns, in the order of their names: the ids
    of a row are the place of its modality, and the number of its row in that table."""

    def __init__(
        self,
        tables: Mapping[str, Array],
        factors: Mapping[str, Array],
        anchors: Array | None = None,
        temperature: float = 0.1,
    ) -> None:
        """`factors`: of these modalities' connectors, and of the task module; `anchors` [labels, width], of length 1
        each, for contrastive objectives."""
        self._anchors = None if anchors is None else mapped(anchors)
        self._temperature = temperature
        self.names = tuple(sorted(tables))
        self._tables = [mapped(tables[name]) for name in self.names]
        self.factors = {name: trained(factor) for name, factor in factors.items()}
        self._objectives: tuple[Objective, ...] = ()

    def aim(self, objectives: Sequence[Objective]) -> None:
        """What modules are trained for from now on. Raises ValueError for modules that are not here or have two, or
        for what can't be."""
        modules = modules_of(objectives)
        missing = sorted({module for module in modules if f"{module}.c" not in self.factors})
        if missing:
            raise ValueError(f"no module {', '.join(missing)} here")
        if len(set(modules)) != len(modules):
            raise ValueError("a module with two objectives")
        contrastive = [one for one in objectives if one.objective == "contrastive"]
        if contrastive and self._anchors is None:
            raise ValueError("a contrastive objective without anchors of the labels")
        if HEAD in modules_of(contrastive):
            raise ValueError("a contrastive objective for the task module, which has nothing to do with it")
        self._objectives = tuple(objectives)

    def loss_of(self, batch: Batch, remember: bool = True) -> Tensor:  # noqa: ARG002 there are no blocks
        """The sum of the objectives' losses."""
        losses = [self._loss(one, batch) for one in self._objectives]
        # A connector of whose modality a batch has no sample has a gradient of zeros, rather than none.
        nothing = [0 * self.factors[f"{module}.c"].sum() for module in modules_of(self._objectives)]
        return torch.stack([*losses, *nothing]).sum()

    def judged(self, batch: Batch) -> Judged:
        """By the task module, whatever modules are trained for."""
        with torch.no_grad():
            targets = given(batch.targets)
            counts = targets != IGNORED
            scores = self._scores(self.space(batch, ()), ())
            loss = functional.cross_entropy(scores, targets, ignore_index=IGNORED)
            right = (scores.argmax(dim=1) == targets) & counts
            places = given(batch.ids[:, 0])
            by_modality = {
                name: (int((counts & (places == place)).sum()), int((right & (places == place)).sum()))
                for place, name in enumerate(self.names)
            }
            return Judged(float(loss), batch.counted, int(right.sum()), by_modality)

    def space(self, batch: Batch, modules: Sequence[str]) -> Tensor:
        """[n, width] where the samples of a batch are, with a mean square of 1; gradients go to these modules alone."""
        places = given(batch.ids[:, 0])
        numbers = given(batch.ids[:, 1])
        width = next(len(factor) for name, factor in self.factors.items() if name.startswith(CONNECTOR))
        found = torch.zeros((len(places), width))
        for place, name in enumerate(self.names):
            mine = (places == place).nonzero()[:, 0]
            if len(mine):
                connector = self._factor(connector_of(name), modules)
                made = functional.linear(self._tables[place][numbers[mine]], connector[:, :-1], connector[:, -1])
                found = found.index_copy(0, mine, made)
        return found * torch.rsqrt(found.square().mean(dim=1, keepdim=True) + LEAST)

    def _loss(self, one: Objective, batch: Batch) -> Tensor:
        """Over those samples that its modules have to do with."""
        targets = given(batch.targets)
        if HEAD not in one.modules:
            places = [place for place, name in enumerate(self.names) if connector_of(name) in one.modules]
            others = ~np.isin(batch.ids[:, 0], places)
            targets = targets.masked_fill(given(others), IGNORED)
        points = self.space(batch, one.modules)
        scores = self._cosines(points) if one.objective == "contrastive" else self._scores(points, one.modules)
        return functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum") / max(1, batch.counted)

    def _scores(self, points: Tensor, modules: Sequence[str]) -> Tensor:
        """[n, width] -> [n, labels]."""
        head = self._factor(HEAD, modules)
        return functional.linear(points, head[:, :-1], head[:, -1])

    def _cosines(self, points: Tensor) -> Tensor:
        """[n, width] -> [n, labels], with the anchors, divided by the temperature."""
        assert self._anchors is not None, "see aim"
        units = points / math.sqrt(points.shape[1])  # their mean square is 1
        return units @ self._anchors.T / self._temperature

    def _factor(self, module: str, modules: Sequence[str]) -> Tensor:
        factor = self.factors[f"{module}.c"]
        return factor if module in modules else factor.detach()


def rows_of_modality(place: int, rows: Sequence[Row]) -> list[Row]:
    """Rows of the table of one modality as rows of all."""
    return [row._replace(ids=np.array([place, int(row.ids[0])], np.int64)) for row in rows]
