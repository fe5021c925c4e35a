"""Statistics of timing samples: pure, in plain Python, and silent where there are too few samples to speak.

Everything takes the samples in the order they were taken, in any unit; what has no answer is None, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import ceil, comb, sqrt
from typing import Final, NamedTuple

CHANCE: Final = 0.05
"""Accepted chance that a printed percentile or interval is wrong: 5 %, so intervals hold at 95 %."""

DRIFT_RATIO: Final = 0.10
"""Medians of the first and last third that differ by less are called equal: boards jitter by several percent."""

DRIFT_Z: Final = 2.3
"""Rank-sum z above which first and last third differ by more than chance (2 % two-sided). The largest z that thirds of
four samples can give is 2.31, so drift can be seen from 12 samples on."""

DRIFT_MIN_SAMPLES: Final = 12

OUTLIER_SCORE: Final = 14.826
"""|x - median| / MAD above which a sample is an outlier: ten standard deviations of a normal distribution."""


def median(values: Sequence[float]) -> float:
    """Give the middle value, or the mean of the two middle ones; raise ValueError if there is none."""
    if not values:
        raise ValueError("median of no values")
    ordered = sorted(values)
    half = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[half]
    low, high = ordered[half - 1], ordered[half]
    return low + (high - low) / 2


def percentile(values: Sequence[float], share: float) -> float | None:
    """Give the nearest-rank percentile, `share` in (0, 1); None if share^n > 5 %: then even the largest sample may lie
    below the true percentile. p50 needs 5 samples, p90 29, p95 59, p99 299. Low percentiles mirror high ones."""
    if not 0 < share < 1:
        raise ValueError(f"share {share} is not between 0 and 1")
    if max(share, 1 - share) ** len(values) > CHANCE:
        return None
    return sorted(values)[ceil(share * len(values)) - 1]


def deviation(values: Sequence[float]) -> float:
    """Median absolute deviation from the median (MAD), unscaled, in the unit of the values."""
    middle = median(values)
    return median([abs(value - middle) for value in values])


@lru_cache(maxsize=1024)
def _interval_rank(count: int) -> int:
    """Give k such that the k-th smallest and k-th largest of `count` samples enclose the median at 95 %; 0 if none do.

    Binomial(count, 1/2): the chance that the median lies outside is 2 * P(fewer than k samples below it).
    """
    outside, rank = 0, 0
    while 2 * (outside + comb(count, rank)) <= CHANCE * 2**count:
        outside += comb(count, rank)
        rank += 1
    return rank


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Give the 95 % interval of the median by order statistics (no assumption about the distribution); None below 6
    samples."""
    rank = _interval_rank(len(values))
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[-rank]


def relative_half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % interval of the median, as a share of the median; None below 6 samples or for a median of 0."""
    interval = median_interval(values)
    middle = median(values) if values else 0.0
    if interval is None or middle <= 0:
        return None
    return (interval[1] - interval[0]) / 2 / middle


class Drift(NamedTuple):
    """Comparison of the first and the last third of a run."""

    found: bool
    ratio: float
    """Median of the last third over that of the first: above 1 is slowing down."""
    score: float
    """Rank-sum z: how unlikely the order is by chance."""


def drift(values: Sequence[float]) -> Drift | None:
    """Compare first and last third: drift is a difference that is both large (10 %) and not chance (rank sum).

    None below 12 samples, or if the first third has a median of 0.
    """
    if len(values) < DRIFT_MIN_SAMPLES:
        return None
    third = len(values) // 3
    first, last = values[:third], values[-third:]
    if median(first) <= 0:
        return None
    ratio = median(last) / median(first)
    score = _rank_sum_score(first, last)
    return Drift(abs(ratio - 1) > DRIFT_RATIO and abs(score) > DRIFT_Z, ratio, score)


def _rank_sum_score(first: Sequence[float], last: Sequence[float]) -> float:
    """z of the Mann-Whitney U statistic: positive if `last` tends to be larger; ties count half."""
    wins = 0.0
    for late in last:
        for early in first:
            wins += 1.0 if late > early else 0.5 if late == early else 0.0
    pairs = len(first) * len(last)
    spread = sqrt(pairs * (len(first) + len(last) + 1) / 12)
    return (wins - pairs / 2) / spread


def outliers(values: Sequence[float]) -> tuple[int, ...]:
    """Give the positions of the outliers by modified z-score. With a MAD of 0 (most samples equal, the timer is too
    coarse) nothing can be called an outlier."""
    if not values:
        return ()
    middle, spread = median(values), deviation(values)
    if spread == 0:
        return ()
    return tuple(at for at, value in enumerate(values) if abs(value - middle) / spread > OUTLIER_SCORE)
