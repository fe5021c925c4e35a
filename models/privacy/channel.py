"""An emulated uplink whose own noise is the privacy: how strongly a board may send so that enough of it is left.

The board's message m, of a norm of at most C, arrives as h sqrt(p) m / C + n, n of standard deviation sigma. Scaled
back to m, the noise on it has the standard deviation C sigma / (|h| sqrt(p)), so that the noise multiplier for a
sensitivity D is sigma C / (|h| sqrt(p) D). Over a good channel a board sends weakly enough for the multiplier that its
budget asks for; over a bad one at full power, and spends less (Liu and Simeone, Privacy for free, 2020).

MQTT has no such channel: the noise is made on the board before it publishes. Noise that a receiver adds would not
protect against who owns the receiver.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Sent(NamedTuple):
    power: float
    noise: float
    """Multiplier, at least the one that was asked for."""


def power_for(least_noise: float, gain: float, most_power: float, sigma: float, norm_ratio: float) -> Sent:
    """How to send over a channel of gain |h|. `norm_ratio` is C / D."""
    cap = sigma * norm_ratio / least_noise
    if gain * math.sqrt(most_power) <= cap:
        return Sent(most_power, sigma * norm_ratio / (gain * math.sqrt(most_power)) if gain > 0 else math.inf)
    return Sent((cap / gain) ** 2, least_noise)


def gain_of(mean: float, seed: int, device: int, round_number: int) -> float:
    """|h| of a round: Rayleigh, of that mean. Known to all; secret is what is sent."""
    drawn = np.random.default_rng([seed, device, round_number]).rayleigh(mean / math.sqrt(math.pi / 2))
    return max(float(drawn), 1e-9 * mean)
