"""Whether a worker trains on its board's GPU or on the processor. Needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import torch

from models.training.tensors import GPU, train_on
from wire.messages import EngineName

ENGINE: Final[EngineName] = "torch-cuda"
"""By which board settings, and workers that died, speak of it."""
PROOF: Final = 64
"""Rows and columns of what is multiplied to see whether it computes."""


class Computer(NamedTuple):
    """What torch computes on."""

    name: str = "cpu"
    fell_back: str = ""
    """Why it is not the GPU that the board has."""


def choose(allowed: bool, crashed: Mapping[str, str], trying: Callable[[EngineName], None]) -> Computer:
    """The GPU if the board may use it, there is one, and it computes rightly; else the processor. `trying` is told
    before it is tried, since that may end the process: `crashed` says what came of it before."""
    if not allowed or not torch.cuda.is_available():
        return Computer()
    if ENGINE in crashed:
        return Computer(fell_back=f"{ENGINE}: {crashed[ENGINE]}")
    trying(ENGINE)
    try:
        if because := wrong(GPU):
            return Computer(fell_back=f"{ENGINE}: {because}")
        name = torch.cuda.get_device_name()
    except (RuntimeError, AssertionError) as error:
        return Computer(fell_back=f"{ENGINE}: {str(error).partition(chr(10))[0][:300]}")
    train_on(GPU)
    return Computer(name)


def wrong(device: str) -> str:
    """What is wrong with what a device computes, '' if nothing is: a product and its gradient, of whole numbers that
    float32 has exactly. Raises RuntimeError if it computes nothing."""
    numbers = torch.arange(PROOF * PROOF).reshape(PROOF, PROOF) % 17 - 8.0
    leaf = numbers.to(device).requires_grad_(True)
    made = leaf @ leaf.T
    made.sum().backward()
    expected = numbers.double() @ numbers.double().T
    if leaf.grad is None or not torch.equal(made.detach().cpu().double(), expected):
        return "it multiplies wrongly"
    slope = 2 * numbers.double().sum(dim=0).expand(PROOF, PROOF)
    return "" if torch.equal(leaf.grad.cpu().double(), slope) else "its gradients are wrong"
