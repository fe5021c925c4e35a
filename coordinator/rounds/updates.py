"""Whether what a device sent is an update of its round. Pure.

An element can't have moved far: a step of Adam moves each by about the learning rate at most (Kingma and Ba, Adam,
2015, section 2.1), so that what has gone MOST_STEPS times as far as all steps of the round could take it was not made
by them. What is not finite, of another length, round or device is none either.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from coordinator.rounds.job import Job
from models.privacy.accountant import noise_for
from models.privacy.plan import norm_of
from wire.errors import PeerError
from wire.messages import UpdateMeta
from wire.tensors import Dtype, Tensor

Floats = npt.NDArray[np.float32]

MOST_STEPS: Final = 4.0
MOST_DEVIATIONS: Final = 10.0
"""A normal number is farther from its mean once in 10^23 draws."""


def checked(
    meta: UpdateMeta, tensor: Tensor | None, device: str, round_number: int, start: Floats, farthest: float
) -> Floats:
    """The vector of an update that began at `start`, of the parts that were asked for; `farthest` is how far an element
    may have moved. Of no numbers nothing comes. Raises PeerError."""
    if meta.device != device:
        raise PeerError(f"says that it is of {meta.device}")
    if meta.round != round_number:
        raise PeerError(f"is of round {meta.round}, this is {round_number}")
    if meta.samples < 1:
        raise PeerError("is of no samples")
    if tensor is None and not start.size:
        return start
    if tensor is None or tensor.dtype is not Dtype.F32 or tensor.shape != start.shape:
        found = "nothing" if tensor is None else f"{tensor.dtype.name} {list(tensor.shape)}"
        raise PeerError(f"holds {found}, F32 {list(start.shape)} was due")
    vector: Floats = np.array(tensor.array(), np.float32)
    if not np.isfinite(vector).all():
        raise PeerError(f"holds {int((~np.isfinite(vector)).sum())} elements that are no numbers")
    moved = float(np.abs(vector - start).max(initial=0.0))
    if moved > farthest:
        raise PeerError(f"has moved an element by {moved:.3g}, the steps of a round move it by {farthest:.3g} at most")
    return vector


def farthest_of(job: Job) -> float:
    """How far a round may move an element: its steps, and the noise that a private job puts on what they changed."""
    rounds, privacy = job.rounds, job.privacy
    steps = MOST_STEPS * rounds.learning_rate * rounds.steps
    if privacy is None or privacy.unit == "sample":
        return steps  # noise on a gradient makes no step longer
    if privacy.channel is not None:
        return math.inf  # over a bad channel there is as much noise as there is
    norm = norm_of(privacy, 1 if job.on_features else 3 if job.labels else 2)
    noise = noise_for(privacy.epsilon, privacy.delta, rounds.count)
    return steps + MOST_DEVIATIONS * noise * 2 * norm
