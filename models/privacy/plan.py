"""What a device does for a job's privacy: how much noise, how often, and what that costs."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final, NamedTuple

from models.privacy.accountant import Doubles, cost, noise_for
from models.privacy.channel import gain_of, power_for
from wire.messages import TrainingTask
from wire.privacy import Privacy

OVERFLOW: Final = 1e-18
"""Chance that more samples are drawn for a step than `most_drawn`."""


class Measure(NamedTuple):
    """Of one round on one device."""

    noise: float
    """Multiplier."""
    share: float
    """With which a sample takes part in a step; 1 where the unit is the device."""
    releases: int
    deviation: float
    """Standard deviation of what is added to each element."""

    @property
    def cost(self) -> Doubles:
        return self.releases * cost(self.noise, self.share)

    def cost_again(self, times: int) -> Doubles:
        """Of one step's release more, where the samples that were drawn for it were used `times` times before. So many
        sums of the same samples, with noise of z each, tell as much as one with noise of z / sqrt(times): the moments
        of their likelihood ratio multiply, also where each sum depends on those before it."""
        found = cost(self.noise / math.sqrt(times + 1), self.share)
        return found if times == 0 else found - cost(self.noise / math.sqrt(times), self.share)


def measure_of(task: TrainingTask, samples: int, parts: int, seed: int, round_number: int) -> Measure:
    """For a device of so many samples, in a round that trains so many of A and B; `seed` is the device's. Raises
    ValueError where no noise would do."""
    privacy = task.privacy
    assert privacy is not None
    share = share_of(task, samples)
    releases = task.steps if privacy.unit == "sample" else 1
    noise = _least_noise(privacy.epsilon, privacy.delta, task.rounds * releases, share)
    norm = norm_of(privacy, parts)
    # A sample comes or goes, and with it its own part of the sum; a device's change becomes another one.
    sensitivity = norm if privacy.unit == "sample" else 2 * norm
    channel = privacy.channel
    if channel is not None:
        gain = gain_of(channel.gain, seed, 0, round_number)
        noise = power_for(noise, gain, channel.power, channel.sigma, norm / sensitivity).noise
    return Measure(noise, share, releases, noise * sensitivity)


def norm_of(privacy: Privacy, parts: int) -> float:
    """Most that what is clipped is left with, all parts together."""
    return privacy.clip * math.sqrt(parts) if privacy.by == "per-factor" else privacy.clip


def share_of(task: TrainingTask, samples: int) -> float:
    """With which probability a sample takes part in a step, so that `batch_rows` do on average."""
    assert task.privacy is not None
    return min(1.0, task.batch_rows / samples) if task.privacy.unit == "sample" else 1.0


@lru_cache(maxsize=64)
def _least_noise(epsilon: float, delta: float, releases: int, share: float) -> float:
    return noise_for(epsilon, delta, releases, share)


def most_drawn(batch_rows: int) -> int:
    """Samples that a step has at most where `batch_rows` are drawn on average, each by itself: what is drawn beyond is
    left out, so that messages have a bound. More are drawn with a chance of OVERFLOW at most (Chernoff's bound
    e^-b (e b / c)^c), which is what that adds to delta for each step, times 1 + e^epsilon."""
    most = batch_rows + 1
    while most * (1 + math.log(batch_rows / most)) - batch_rows > math.log(OVERFLOW):
        most += 1
    return most


def step_rows(batch_rows: int, privacy: Privacy | None) -> int:
    """Most samples of a step of a split model."""
    return batch_rows if privacy is None else most_drawn(batch_rows)
