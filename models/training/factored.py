"""What models that are trained with factors share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from models.engine.base import Array
from models.lora.adapter import is_part


class Factored:
    """A model with `factors` by name (models.lora.adapter), all else frozen."""

    factors: dict[str, Tensor]

    def take(self, factors: Mapping[str, Array]) -> None:
        """Go on with these factors, of the same names and shapes."""
        with torch.no_grad():
            for name, factor in self.factors.items():
                factor.copy_(torch.from_numpy(np.array(factors[name], np.float32)))

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
        return torch.from_numpy(np.asarray(values))
