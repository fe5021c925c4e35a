"""Between numpy, which files and the network speak, and the device on which this process trains.

The device is torch's default one: the processor, or a GPU once `train_on` was called.
"""

from __future__ import annotations

import os
from typing import Any, Final

import torch
from torch import Tensor

from models.engine.base import Array

GPU: Final = "cuda"


def train_on(device: str) -> None:
    """Have all tensors of this thread made there, and the same numbers come of the same round each time."""
    # Of cuBLAS, which reads it when it is first used: without it products may be summed up in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Their gradients are not the same each time; texts are short here.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.set_default_device(device)


def given(values: Array) -> Tensor:
    """On the device; the same memory if that is the processor."""
    return torch.from_numpy(values).to(torch.get_default_device())


def taken(tensor: Tensor) -> Any:
    """An array of a tensor's numbers, without gradients; the same memory if it is on the processor."""
    return tensor.detach().cpu().numpy()
