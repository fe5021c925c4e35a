"""The accountant against published values, against the exact one, and against integrals done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.privacy.accountant import NOTHING, ORDERS, cost, epsilon, noise_for
from models.privacy.plan import OVERFLOW, Measure, most_drawn

DELTA = 1e-5


def exact(mu: float, delta: float) -> float:
    """epsilon of Gaussian releases of that mu = sqrt(sum 1 / z^2) together (Dong, Roth and Su, Gaussian differential
    privacy, 2022, corollary 1), by bisection."""

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    def delta_of(eps: float) -> float:
        return phi(mu / 2 - eps / mu) - math.exp(eps) * phi(-mu / 2 - eps / mu)

    low, high = 0.0, 1.0
    while delta_of(high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize(
    ("noise", "releases", "tight", "least"),
    [
        (1, 1, 4.7285, 4.3772),
        (10, 100, 4.7285, 4.3772),
        (5, 50, 7.0774, 6.5730),
        (20, 100, 2.1657, 1.9931),
        (50, 300, 1.4456, 1.3262),
    ],
)
def test_gaussian_releases_cost_what_is_published(noise: float, releases: int, tight: float, least: float) -> None:
    found = epsilon(releases * cost(noise), DELTA)
    assert found == pytest.approx(tight, abs=1e-3)
    assert exact(math.sqrt(releases) / noise, DELTA) == pytest.approx(least, abs=1e-3)
    assert found >= least


@pytest.mark.parametrize(
    ("share", "noise", "releases", "tight"),
    [(256 / 60000, 1.1, 14062, 2.5970), (0.01, 1, 1000, 2.1078), (0.1, 2, 100, 2.5867)],
)
def test_sampled_releases_cost_what_is_published(share: float, noise: float, releases: int, tight: float) -> None:
    assert epsilon(releases * cost(noise, share), DELTA) == pytest.approx(tight, abs=1e-3)


@pytest.mark.parametrize(
    ("share", "noise", "order", "expected"),
    [
        (0.01, 1, 2, 1.718134e-4),
        (0.01, 1, 8, 8.936439e-4),
        (0.01, 1, 32, 1.124628e1),
        (0.1, 2, 4, 6.003283e-3),
    ],
)
def test_one_sampled_release_at_an_order(share: float, noise: float, order: float, expected: float) -> None:
    assert cost(noise, share)[ORDERS.index(order)] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("share", "noise", "order"), [(0.05, 0.8, 3), (0.3, 1.5, 7), (0.02, 3.0, 20)])
def test_one_sampled_release_is_the_integral_that_defines_it(share: float, noise: float, order: int) -> None:
    """E over N(0, z^2) of (1 - q + q p1 / p0)^order, summed on a fine grid."""
    x = np.linspace(-60 * noise, 60 * noise + order, 2_000_001)
    log_ratio = (2 * x - 1) / (2 * noise**2)
    log_density = -(x**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    values = np.exp(log_density + order * np.logaddexp(math.log1p(-share), math.log(share) + log_ratio))
    integral = float(values.sum() * (x[1] - x[0]))
    assert cost(noise, share)[ORDERS.index(order)] == pytest.approx(math.log(integral) / (order - 1), rel=1e-6)


@pytest.mark.parametrize(
    ("most", "releases", "expected"),
    [
        (8, 100, 6.3767), (2, 100, 21.4911), (1, 100, 40.4513), (0.5, 100, 76.6716), (0.25, 100, 145.6680),
        (8, 300, 11.0448), (2, 300, 37.2237), (1, 300, 70.0637), (0.5, 300, 132.7991), (0.25, 300, 252.3043),
    ],
)  # fmt: skip
def test_the_least_noise_for_a_budget(most: float, releases: int, expected: float) -> None:
    found = noise_for(most, DELTA, releases)
    assert found == pytest.approx(expected, rel=1e-3)
    assert epsilon(releases * cost(found), DELTA) <= most < epsilon(releases * cost(found * 0.995), DELTA)


def test_a_budget_that_no_noise_keeps_is_said() -> None:
    with pytest.raises(ValueError, match="no noise keeps 10 releases within epsilon 1e-07"):
        noise_for(1e-7, DELTA, 10)
    with pytest.raises(ValueError, match="delta"):
        epsilon(cost(1.0), 0.0)
    with pytest.raises(ValueError, match="noise"):
        cost(0.0)
    with pytest.raises(ValueError, match="share"):
        cost(1.0, 1.5)


def test_nothing_told_costs_nothing() -> None:
    assert epsilon(NOTHING, DELTA) == 0.0


NOISE = st.floats(0.3, 300)
SHARE = st.floats(1e-4, 1.0)
COUNT = st.integers(1, 3000)


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 8), COUNT)
def test_never_less_than_the_exact_value(mu: float, count: int) -> None:
    assert epsilon(count * cost(math.sqrt(count) / mu), DELTA) >= exact(mu, DELTA) * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(NOISE, SHARE, COUNT)
def test_more_releases_less_noise_and_more_of_the_samples_cost_more(noise: float, share: float, count: int) -> None:
    found = epsilon(count * cost(noise, share), DELTA)
    assert found <= epsilon((count + 1) * cost(noise, share), DELTA) + 1e-12
    assert found <= epsilon(count * cost(noise * 0.9, share), DELTA) + 1e-12
    assert found <= epsilon(count * cost(noise, min(1.0, share * 1.3)), DELTA) * (1 + 1e-9) + 1e-9
    assert np.all(np.diff(cost(noise, share)) >= -1e-12), "no order costs less than one below it"


@pytest.mark.parametrize(("noise", "share"), [(1.5, 0.2), (3.0, 0.6)])
def test_two_sums_of_the_same_samples_cost_what_an_integral_says(noise: float, share: float) -> None:
    """Of the likelihood ratio to the power of the order, over both sums; the sample is in both, or in neither."""
    axis = np.linspace(-12 * noise, 14 * noise, 1201)
    step = axis[1] - axis[0]
    without = np.exp(-(axis**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    with_it = np.exp(-((axis - 1) ** 2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
    neither = np.outer(without, without)
    both = np.outer(with_it, with_it)
    measure = Measure(noise, share, 1, 1.0)
    found = measure.cost_again(0) + measure.cost_again(1)
    for order in (2, 3, 5):
        ratio = (1 - share) + share * both / neither
        expected = math.log(float((neither * ratio**order).sum() * step**2)) / (order - 1)
        assert found[ORDERS.index(float(order))] == pytest.approx(expected, rel=1e-6)
    assert np.allclose(measure.cost_again(0), cost(noise, share))
    assert (measure.cost_again(1) >= measure.cost_again(0) * (1 - 1e-9)).all(), "no less than drawn anew"
    assert np.allclose(Measure(noise, 1.0, 1, 1.0).cost_again(3), cost(noise)), "where all take part it is all the same"


@pytest.mark.parametrize("rows", [1, 4, 32, 700])
def test_more_than_messages_hold_are_drawn_almost_never(rows: int) -> None:
    """The exact chance, of Poisson numbers, which no sum of chances with that mean exceeds so far out."""
    most = most_drawn(rows)
    terms = [-rows + count * math.log(rows) - math.lgamma(count + 1) for count in range(most + 1, most + 400)]
    assert OVERFLOW * 1e-6 < sum(map(math.exp, terms)) <= OVERFLOW
