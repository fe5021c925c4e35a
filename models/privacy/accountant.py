"""What releases with Gaussian noise cost, as Renyi differential privacy (Mironov, 2017), and as (epsilon, delta).

A release adds noise of standard deviation z * sensitivity to each element of a sum, z being its noise multiplier. If
each sample takes part by chance, with probability q (Poisson sampling), it costs less. Costs of releases add up at each
order. Two data sets are neighbours where one sample of one is an empty one in the other (their number is known), or
where one board's data are others; whoever gives z says which sensitivity he took.

Here epsilon is never below the exact value: orders are finitely many, and between integers the next integer's cost
stands for that of a sampled release, which grows with the order.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]

ORDERS: Final[tuple[float, ...]] = (*(round(1.1 + 0.1 * step, 1) for step in range(99)), *map(float, range(11, 512)))
"""1.1 to 10.9 in tenths, then integers up to 511."""

NOTHING: Final[Doubles] = np.zeros(len(ORDERS))
MOST_NOISE: Final = 1e6
"""A multiplier beyond which nothing is left of what was to be told."""

_ORDERS: Final[Doubles] = np.array(ORDERS)
_LOG_FACTORIAL: Final[Doubles] = np.array([math.lgamma(number + 1.0) for number in range(int(ORDERS[-1]) + 1)])


def cost(noise: float, share: float = 1.0) -> Doubles:
    """[orders] of one release with noise multiplier `noise`, of which each sample is with probability `share`: never
    more than if all took part."""
    if noise <= 0 or not 0 < share <= 1:
        raise ValueError(f"noise {noise}, share {share}")
    if share == 1.0:
        whole: Doubles = _ORDERS / (2 * noise * noise)
        return whole
    return np.minimum(_sampled(noise, share), _ORDERS / (2 * noise * noise))


@lru_cache(maxsize=4096)
def _sampled(noise: float, share: float) -> Doubles:
    """Mironov, Talwar and Zhang, Renyi differential privacy of the sampled Gaussian mechanism, 2019, section 3.3:
    1 / (a - 1) log sum_j C(a, j) (1 - q)^(a - j) q^j exp((j^2 - j) / (2 z^2)), for integers a."""
    by_order = {order: _sampled_at(order, noise, share) for order in range(2, int(ORDERS[-1]) + 1)}
    return np.array([by_order[max(2, math.ceil(order))] for order in ORDERS])


def _sampled_at(order: int, noise: float, share: float) -> float:
    j = np.arange(order + 1)
    terms = (
        _LOG_FACTORIAL[order] - _LOG_FACTORIAL[j] - _LOG_FACTORIAL[order - j]
        + (order - j) * math.log1p(-share) + j * math.log(share)
        + (j * j - j) / (2 * noise * noise)
    )  # fmt: skip
    top = float(terms.max())
    return (top + math.log(float(np.exp(terms - top).sum()))) / (order - 1)


def epsilon(spent: Doubles, delta: float) -> float:
    """Of what was spent at each order: the least that any order gives (Canonne, Kamath and Steinke, The discrete
    Gaussian for differential privacy, 2020, proposition 12). Infinite where nothing can be said."""
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta}")
    if not spent.any():
        return 0.0
    found = spent + np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
    return max(0.0, float(found.min()))


def noise_for(most: float, delta: float, releases: int, share: float = 1.0) -> float:
    """The least noise multiplier, to four digits, with which so many releases stay within epsilon `most`. Raises
    ValueError where none up to MOST_NOISE does."""

    def within(noise: float) -> bool:
        return epsilon(releases * cost(noise, share), delta) <= most

    low, high = 0.0, 1.0
    while not within(high):
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ValueError(f"no noise keeps {releases} releases within epsilon {most}")
    while high - low > 2e-5 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    digits = 4 - math.ceil(math.log10(high))
    rounded = math.ceil(high * 10.0**digits) / 10.0**digits
    return rounded if within(rounded) else high
