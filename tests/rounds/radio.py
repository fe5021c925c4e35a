"""The medium for which such schedules were published: shared bandwidth with a noise floor, a device's rate is
b log2(1 + p h / (b N0)) (Shannon). Nothing measures p h on a board, so jobs have it not; results for it are known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import lambertw

from coordinator.rounds.airtime import Doubles, Offer

DENSITY = 10**-17.4 / 1000
"""-174 dBm/Hz in W/Hz."""


class Radio:
    """`bandwidth_hz` in all, noise of `density` W/Hz; an offer's rate is its received power p h, in W. The root of
    S / R(b) = tau - o is b = -S ln2 / ((tau - o) (W(-G e^-G) + G)) with G = N0 S ln2 / ((tau - o) p h) and the lower
    branch of Lambert's W (Corless et al., On the Lambert W function, 1996); there is none for G >= 1."""

    def __init__(self, bandwidth_hz: float, density: float) -> None:
        self.bandwidth_hz = bandwidth_hz
        self.density = density

    def due(self, offers: Sequence[Offer], taus: Doubles) -> Doubles:
        left = taus[None, :] - np.array([offer.offset_s for offer in offers])[:, None]
        bits = np.array([8 * offer.sent_bytes for offer in offers])[:, None] * math.log(2)
        power = np.array([offer.rate for offer in offers])[:, None]
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            gamma = np.where(left > 0, self.density * bits / (left * power), np.inf)
            possible = gamma < 1
            inside = np.where(possible, gamma, 0.5)
            root = lambertw(-inside * np.exp(-inside), -1).real
            found: Doubles = np.where(possible, -bits / (left * (root + inside)) / self.bandwidth_hz, np.inf)
        return found
