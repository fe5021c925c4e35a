"""What a device does for a job's privacy: how much noise, how often, and what that costs."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from models.privacy.accountant import Doubles, cost, noise_for
from models.privacy.channel import gain_of, power_for
from wire.messages import Privacy, TrainingTask


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
