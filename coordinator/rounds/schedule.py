"""Who takes part in the next round: drift plus penalty (Neely, Stochastic network optimization, 2010). Pure.

Wanted is as much of the data as possible in each round, with rounds that take `delay_s` in the long run. A queue grows
by what a round took beyond that, and a round's set is the one with the least

    tradeoff * penalty(share of the data that is left out) + queue * seconds - what is owed to those who take part

so nothing need be known of rounds to come. Without the last term slow devices may never take part; with it each is owed
`least_share` of a turn per round, and gets it in the long run. At least one device takes part: with none, and a long
queue, rounds would stand still.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from coordinator.rounds.airtime import Medium, Offer, Split, ends_of, frontier, split, split_equally

Doubles = npt.NDArray[np.float64]
Penalty = Literal["quadratic", "linear"]

ALL_SETS_UP_TO: Final = 8
"""Devices: beyond that not all sets are tried."""
TRADEOFF_PER_DELAY: Final = 30.0
"""What `tradeoff` is left out as, times the delay: more lets rounds get longer for a while, less takes fewer along."""
GRID: Final = 64
"""Finish times at which sets by value are made."""


class Knobs(Struct, frozen=True, kw_only=True):
    delay_s: float
    tradeoff: float
    penalty: Penalty = "quadratic"
    least_share: float = 0.0
    """Of rounds that each device is owed; 0: nothing is owed to anybody."""


class Queues(Struct, frozen=True, kw_only=True):
    """What rounds have left behind."""

    late_s: float = 0.0
    owed: dict[str, float] = {}


class Choice(NamedTuple):
    devices: tuple[str, ...]
    split: Split


def choose(
    offers: Sequence[Offer], medium: Medium, knobs: Knobs, queues: Queues, equally: bool = False, each_s: float = 0.0
) -> Choice:
    """The best set of these, and how the medium is divided among it; `equally` divides it by number. A round takes
    `each_s` longer for each device in it, beside what the slowest takes."""
    if each_s and len(offers) > ALL_SETS_UP_TO:
        members = _of_value(offers, knobs, queues)
    else:
        members = _candidates(offers, medium, knobs, queues)
    ends = np.array([_split(offers, medium, row, equally).tau_s for row in members]) if equally else ends_of(
        offers, medium, members
    )  # fmt: skip
    costs = cost_of(offers, members, ends + each_s * members.sum(axis=1), knobs, queues)
    best = members[int(np.argmin(costs))]
    found = _split(offers, medium, best, equally)
    return Choice(tuple(sorted(found.shares)), found)


def cost_of(
    offers: Sequence[Offer], members: npt.NDArray[np.bool_], ends: Doubles, knobs: Knobs, queues: Queues
) -> Doubles:
    """[sets] of rows of [sets, devices] that are over at `ends`."""
    weights = np.array([offer.weight for offer in offers])
    left_out = 1 - members @ (weights / weights.sum())
    penalty = left_out**2 if knobs.penalty == "quadratic" else left_out
    found: Doubles = knobs.tradeoff * penalty + queues.late_s * ends - members @ _owed(offers, queues)
    return found


def after(queues: Queues, knobs: Knobs, there: Collection[str], chosen: Collection[str], took_s: float) -> Queues:
    """When a round is over that these took part in, of those that were there. Devices that come and go are owed only
    for rounds in which they were there."""
    owed = dict(queues.owed)
    for device in there:
        owed[device] = max(0.0, owed.get(device, 0.0) + knobs.least_share - (device in chosen))
    return Queues(late_s=max(0.0, queues.late_s + took_s - knobs.delay_s), owed=owed)


def fastest(offers: Sequence[Offer], count: int) -> tuple[str, ...]:
    """Those that would have answered first with the medium to themselves."""
    by_time = sorted(offers, key=lambda offer: (offer.offset_s + offer.sent_bytes / offer.rate, offer.device))
    return tuple(sorted(offer.device for offer in by_time[:count]))


def divide(offers: Sequence[Offer], medium: Medium, equally: bool) -> Split:
    return split_equally(offers, medium) if equally else split(offers, medium)


def _split(offers: Sequence[Offer], medium: Medium, row: npt.NDArray[np.bool_], equally: bool) -> Split:
    return divide([offer for offer, taken in zip(offers, row, strict=True) if taken], medium, equally)


def _candidates(offers: Sequence[Offer], medium: Medium, knobs: Knobs, queues: Queues) -> npt.NDArray[np.bool_]:
    """[sets, devices] that may be best: all of few devices; of many, for each number of devices the one that is over
    first, and those that bring most for their share of the medium (greedy, as for a knapsack)."""
    count = len(offers)
    if count <= ALL_SETS_UP_TO:
        numbers = np.arange(1, 2**count)
        found: npt.NDArray[np.bool_] = (numbers[:, None] >> np.arange(count)) & 1 == 1
        return found
    by_number = frontier(offers, medium)
    rows = {members for _, members in by_number}
    weights = np.array([offer.weight for offer in offers])
    value = knobs.tradeoff * weights / weights.sum() + _owed(offers, queues)
    alike = bool(np.ptp(value) == 0)  # then no set of as many is better than the one that is over first
    due = medium.due(offers, np.linspace(by_number[0][0], by_number[-1][0], 0 if alike else GRID))
    for column in range(due.shape[1]):
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = np.where(np.isfinite(due[:, column]), value / np.maximum(due[:, column], 1e-12), -1.0)
        taken: list[int] = []
        used = 0.0
        for number in np.argsort(-worth, kind="stable"):
            if used + due[number, column] <= 1 + 1e-12:
                used += due[number, column]
                taken.append(int(number))
        if taken:
            rows.add(tuple(sorted(taken)))
    made = np.zeros((len(rows), count), bool)
    for row, members in enumerate(sorted(rows)):
        made[row, list(members)] = True
    return made


def _of_value(offers: Sequence[Offer], knobs: Knobs, queues: Queues) -> npt.NDArray[np.bool_]:
    """[sets, devices] of many devices that share nothing but what each adds: of those that are over by the time at
    which one of them is, so many as bring most, for each number. One is the best where the penalty is linear, or where
    nothing is owed."""
    weights, offset_s = (
        np.array(values) for values in zip(*((one.weight, one.offset_s) for one in offers), strict=True)
    )
    by_value = np.argsort(-(knobs.tradeoff * weights / weights.sum() + _owed(offers, queues)), kind="stable")
    rows: list[npt.NDArray[np.bool_]] = []
    for end_s in np.unique(offset_s):
        taken = by_value[offset_s[by_value] <= end_s]
        made = np.zeros((len(taken), len(offers)), bool)
        for number, device in enumerate(taken):
            made[number:, device] = True
        rows.append(made)
    return np.concatenate(rows)


def _owed(offers: Sequence[Offer], queues: Queues) -> Doubles:
    return np.array([queues.owed.get(offer.device, 0.0) for offer in offers])
