"""When a set of devices can have answered, and which share of a medium each must have for that. Pure.

A device's answer takes an offset (computing, what it is sent, what the server does) and the time in which its bytes
cross its share of the medium. At the optimum all that take part end together and no share is left over: a finish time
tau is possible if the shares that it wants add up to one at most, and they shrink as tau grows.

    Own       every device has a link of its own
    Shared    one channel (Wi-Fi): a device's rate is its share of the rate that it has alone
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

STEPS: Final = 42
"""Of a bisection that begins within a factor of two: to 2e-13 of the time."""


class Offer(NamedTuple):
    """What a device would bring to a round, and what it takes."""

    device: str
    offset_s: float
    sent_bytes: float
    rate: float
    """Bytes/s alone on the medium."""
    weight: float = 1.0
    """Its share of the data."""


class Medium(Protocol):
    def due(self, offers: Sequence[Offer], taus: Doubles) -> Doubles:
        """[devices, taus]: the share that each must have to end at tau; infinite where none is enough."""


class Own:
    """A device has the whole of its own link."""

    def due(self, offers: Sequence[Offer], taus: Doubles) -> Doubles:
        ends = np.array([offer.offset_s + offer.sent_bytes / offer.rate for offer in offers])
        found: Doubles = np.where(taus[None, :] >= ends[:, None], 0.0, np.inf)
        return found


class Shared:
    """S / (R (tau - o))."""

    def due(self, offers: Sequence[Offer], taus: Doubles) -> Doubles:
        left = taus[None, :] - np.array([offer.offset_s for offer in offers])[:, None]
        alone = np.array([offer.sent_bytes / offer.rate for offer in offers])[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            found: Doubles = np.where(left > 0, alone / left, np.inf)
        return found


class Split(NamedTuple):
    """Of a medium among devices: all have answered at `tau_s`."""

    tau_s: float
    shares: dict[str, float]


def split(offers: Sequence[Offer], medium: Medium) -> Split:
    """The earliest end of a round with all of these, and the shares for it."""
    tau_s = float(_earliest(offers, medium, lambda due: due.sum(axis=0))[0])
    due = medium.due(offers, np.array([tau_s]))[:, 0]
    return Split(tau_s, {offer.device: float(share) for offer, share in zip(offers, due, strict=True)})


def split_equally(offers: Sequence[Offer], medium: Medium) -> Split:
    """All of these with the same share each, whoever ends when: the slowest says when the round is over."""
    share = 1 / len(offers)
    ends = [float(_earliest([offer], medium, lambda due: due[0] / share)[0]) for offer in offers]
    return Split(max(ends), {offer.device: share for offer in offers})


def frontier(offers: Sequence[Offer], medium: Medium) -> list[tuple[float, tuple[int, ...]]]:
    """For each number m of devices the earliest end of a round with m of them, and which they are: those whose m shares
    are smallest at that time. [m - 1] -> (seconds, numbers of offers)."""

    def smallest(due: Doubles) -> Doubles:
        """[m, taus], of which each row has its own tau."""
        found: Doubles = np.cumsum(np.sort(due, axis=0), axis=0)
        return found

    taus = _earliest(offers, medium, lambda due: np.diagonal(smallest(due)), rows=len(offers))
    due = medium.due(offers, taus)
    found = []
    for m, tau_s in enumerate(taus, start=1):
        # Alike shares: the first by number, so that the same offers give the same set.
        numbers = np.argsort(due[:, m - 1], kind="stable")[:m]
        found.append((float(tau_s), tuple(sorted(int(number) for number in numbers))))
    return found


def ends_of(offers: Sequence[Offer], medium: Medium, members: npt.NDArray[np.bool_]) -> Doubles:
    """[sets] the earliest end of a round with each of these sets, given as rows of [sets, devices]."""
    return _earliest(offers, medium, lambda due: _sums_each(due, members), rows=len(members))


def _sums_each(due: Doubles, members: npt.NDArray[np.bool_]) -> Doubles:
    """[sets]: row i's sum in column i."""
    found: Doubles = np.where(members.T, due, 0.0).sum(axis=0)
    return found


def _earliest(offers: Sequence[Offer], medium: Medium, wanted: Callable[[Doubles], Doubles], rows: int = 1) -> Doubles:
    """[rows] the least tau of each row at which `wanted(due)`, of shares that are due at the rows' taus, is one at
    most: it falls with tau."""
    low = np.zeros(rows)  # until `high` has been doubled
    high = np.full(rows, max(1e-3, *(offer.offset_s for offer in offers)))
    for _ in range(2000):
        beyond = wanted(medium.due(offers, high)) > 1
        if not beyond.any():
            break
        low, high = np.where(beyond, high, low), np.where(beyond, 2 * high, high)
    else:
        raise ValueError("there is no time in which these devices could answer")
    for _ in range(STEPS + 12 * int(not low.all())):
        middle = (low + high) / 2
        beyond = wanted(medium.due(offers, middle)) > 1
        low, high = np.where(beyond, middle, low), np.where(beyond, high, middle)
    return high
