"""What models that are trained with factors share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from models.engine.base import Array
from models.lora.adapter import is_part
from models.training.tensors import given


class Factored:
    """A model with `factors` by name (models.lora.adapter), all else frozen."""

    factors: dict[str, Tensor]
    held: Mapping[str, Tensor] = MappingProxyType({})
    """Others of the same matrices and scale, of any rank, which are not trained."""

    def hold(self, factors: Mapping[str, Array]) -> None:
        """Go on beside these."""
        self.held = {name: given(np.array(values, np.float32)) for name, values in factors.items()}

    def _added(self, name: str, given: Tensor, made: Tensor, scale: float) -> Tensor:
        """What a matrix makes of `given`, with what factors add to it."""
        for factors in (self.held, self.factors):
            a = factors.get(f"{name}.a")
            if a is not None:
                made = made + scale * ((given @ a.T) @ factors[f"{name}.b"].T)
        return made

    def take(self, factors: Mapping[str, Array]) -> None:
        """Go on with these factors, of the same names and shapes."""
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(given(np.array(factors[name], np.float32)))

    def train_only(self, parts: tuple[str, ...]) -> None:
        """Of 'a', 'b' and 'c' (the task module), or of modules by their names, those that get gradients."""
        for name, factor in self.factors.items():
            factor.requires_grad_(is_part(name, parts))


def trained(factor: Array) -> Tensor:
    """A factor's own copy, with gradients."""
    return torch.tensor(np.asarray(factor, np.float32), requires_grad=True)


def mapped(values: Array) -> Tensor:
    """Weights that may be mapped from a file and that nobody writes to: torch warns of that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return given(np.asarray(values))
