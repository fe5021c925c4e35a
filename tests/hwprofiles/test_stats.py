"""Statistics say nothing where samples are too few, and the truth where they are not."""

from __future__ import annotations

import random
import statistics
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwprofiles import stats

times = st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=80)


@given(times)
def test_median_agrees_with_the_standard_library(values: list[float]) -> None:
    assert stats.median(values) == pytest.approx(statistics.median(values))


def test_median_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        stats.median([])


@pytest.mark.parametrize(("share", "least"), [(0.5, 5), (0.9, 29), (0.95, 59), (0.99, 299), (0.1, 29)])
def test_percentile_is_given_from_the_fewest_samples_that_allow_it(share: float, least: int) -> None:
    assert stats.percentile([1.0] * (least - 1), share) is None
    assert stats.percentile([1.0] * least, share) == 1.0


def test_percentile_is_a_sample_at_its_rank() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert stats.percentile(values, 0.9) == 90.0
    assert stats.percentile(values, 0.95) == 95.0


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -1.0])
def test_percentile_of_no_share_is_an_error(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        stats.percentile([1.0] * 100, share)


@given(st.lists(st.floats(1e-6, 1e3), min_size=29, max_size=120))
def test_percentiles_rise_with_their_share(values: list[float]) -> None:
    low, middle, high = (stats.percentile(values, share) for share in (0.1, 0.5, 0.9))
    assert low is not None and middle is not None and high is not None
    assert min(values) <= low <= middle <= high <= max(values)


@given(times, st.floats(0.1, 10))
def test_deviation_and_median_scale_with_the_values(values: list[float], factor: float) -> None:
    scaled = [value * factor for value in values]
    assert stats.median(scaled) == pytest.approx(stats.median(values) * factor)
    assert stats.deviation(scaled) == pytest.approx(stats.deviation(values) * factor, abs=1e-9)


def test_interval_of_the_median_needs_six_samples() -> None:
    assert stats.median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert stats.median_interval([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]) == (1.0, 6.0)


@pytest.mark.parametrize("count", [6, 9, 12])
def test_interval_misses_the_median_in_at_most_five_percent_of_all_outcomes(count: int) -> None:
    """Exhaustive: each sample lies below or above the true median 0 with equal chance."""
    missed = 0
    for signs in product((-1.0, 1.0), repeat=count):
        low, high = stats.median_interval([sign * (at + 1) for at, sign in enumerate(signs)]) or (0.0, 0.0)
        missed += not low < 0 < high
    assert 0 < missed / 2**count <= 0.05


@given(st.lists(st.floats(1e-6, 1e3), min_size=6, max_size=120))
def test_interval_encloses_the_sample_median(values: list[float]) -> None:
    interval = stats.median_interval(values)
    assert interval is not None and interval[0] <= stats.median(values) <= interval[1]
    width = stats.relative_half_width(values)
    assert width is not None and width >= 0


def test_relative_half_width_of_equal_samples_is_zero_and_of_zeros_unknown() -> None:
    assert stats.relative_half_width([2.0] * 6) == 0
    assert stats.relative_half_width([0.0] * 6) is None
    assert stats.relative_half_width([]) is None


def test_slowing_board_is_drift() -> None:
    found = stats.drift([1.0 + 0.05 * at for at in range(15)])
    assert found is not None and found.found and found.ratio > 1.3


def test_board_that_warms_up_is_drift_too() -> None:
    found = stats.drift([2.0 - 0.05 * at for at in range(15)])
    assert found is not None and found.found and found.ratio < 0.8


def test_small_steady_change_is_no_drift() -> None:
    found = stats.drift([1.0 + 0.002 * at for at in range(30)])
    assert found is not None and not found.found and found.score > 3


def test_single_outliers_are_no_drift() -> None:
    values = [1.0] * 30
    values[-1] = values[-4] = 9.0
    found = stats.drift(values)
    assert found is not None and not found.found


def test_drift_is_not_judged_on_too_few_samples() -> None:
    assert stats.drift([1.0] * 11) is None
    assert stats.drift([0.0] * 20) is None


def test_noise_without_drift_is_seldom_called_drift() -> None:
    draw = random.Random(4)
    found = [stats.drift([draw.uniform(0.7, 1.3) for _ in range(30)]) for _ in range(400)]
    assert sum(one is not None and one.found for one in found) <= 16  # 2 % by chance, 4 % allowed


def test_outliers_are_the_far_ones_and_order_does_not_matter() -> None:
    values = [1.0, 1.01, 0.99, 1.02, 5.0, 0.98, 1.0]
    assert stats.outliers(values) == (4,)
    assert stats.outliers([1.0] * 9 + [2.0]) == ()
    assert stats.outliers([]) == ()


@given(times)
def test_outliers_are_never_the_majority(values: list[float]) -> None:
    assert len(stats.outliers(values)) <= len(values) / 2
