"""Shares of a medium: published roots, worked examples, brute force over sets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.rounds.airtime import Offer, Own, Shared, ends_of, frontier, split, split_equally
from tests.rounds.radio import DENSITY, Radio


@pytest.mark.parametrize(
    ("bits", "left_s", "power", "bandwidth"),
    [
        (2e6, 1.0, 3.162278e-11, 125382.974657),
        (2e6, 1.0, 3.162278e-12, 163286.491142),
        (3e6, 2.0, 3.162278e-13, 168911.534411),
        (2e6, 0.5, 1.000000e-13, 796056.637151),
    ],
)
def test_the_bandwidth_for_a_time_is_the_published_root(
    bits: float, left_s: float, power: float, bandwidth: float
) -> None:
    offer = Offer("a", 0.3, bits / 8, power)
    [[found]] = Radio(1.0, DENSITY).due([offer], np.array([0.3 + left_s]))
    assert found == pytest.approx(bandwidth, rel=1e-6)
    rate = found * math.log2(1 + power / (found * DENSITY))
    assert rate * left_s == pytest.approx(bits, rel=1e-9)


def test_no_bandwidth_is_enough_beyond_the_noise() -> None:
    offer = Offer("a", 0.0, 1e6, 1e-16)
    assert Radio(1.0, DENSITY).due([offer], np.array([0.1, 0.0]))[0].tolist() == [math.inf, math.inf]


FOUR = [
    Offer("a", 0.2, 2e6, 10e6), Offer("b", 0.1, 2e6, 5e6), Offer("c", 0.5, 2e6, 20e6), Offer("d", 0.3, 2e6, 8e6),
]  # fmt: skip


@pytest.mark.parametrize(
    ("m", "members", "tau_s", "shares"),
    [
        (1, (0,), 0.4, (1.0,)),
        (2, (0, 2), 0.673205, (0.422650, 0.577350)),
        (3, (0, 2, 3), 0.873820, (0.296815, 0.267508, 0.435677)),
        (4, (0, 1, 2, 3), 1.185167, (0.203011, 0.368607, 0.145950, 0.282432)),
    ],
)
def test_the_worked_example(m: int, members: tuple[int, ...], tau_s: float, shares: tuple[float, ...]) -> None:
    found_s, found = frontier(FOUR, Shared())[m - 1]
    assert found == members and found_s == pytest.approx(tau_s, abs=1e-6)
    made = split([FOUR[number] for number in members], Shared())
    assert made.tau_s == pytest.approx(tau_s, abs=1e-6)
    assert list(made.shares.values()) == pytest.approx(shares, abs=1e-6)
    assert split_equally(FOUR, Shared()).tau_s == pytest.approx(1.7)


@st.composite
def shelves(draw: st.DrawFn, most: int = 8) -> tuple[list[Offer], object]:
    medium = draw(st.sampled_from(("shared", "radio", "own")))
    count = draw(st.integers(1, most))
    power = st.floats(-14, -10).map(lambda exponent: 10**exponent)
    rate = power if medium == "radio" else st.floats(1e4, 1e8)
    offers = [
        Offer(f"d{number}", draw(st.floats(0, 2)), draw(st.floats(1e3, 5e6)), draw(rate), draw(st.floats(0.1, 5)))
        for number in range(count)
    ]
    return offers, {"shared": Shared(), "radio": Radio(1e6, DENSITY), "own": Own()}[medium]


@settings(max_examples=60, deadline=None)
@given(shelves(7))
def test_no_set_of_as_many_is_over_earlier(shelf: tuple[list[Offer], object]) -> None:
    offers, medium = shelf
    for m, (tau_s, members) in enumerate(frontier(offers, medium), start=1):  # type: ignore[arg-type]
        sets = list(itertools.combinations(range(len(offers)), m))
        rows = np.zeros((len(sets), len(offers)), bool)
        for row, one in enumerate(sets):
            rows[row, list(one)] = True
        ends = ends_of(offers, medium, rows)  # type: ignore[arg-type]
        assert tau_s == pytest.approx(ends.min(), rel=1e-9)
        assert split([offers[number] for number in members], medium).tau_s == pytest.approx(tau_s, rel=1e-9)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(shelves())
def test_all_end_together_nothing_is_left_over_and_equal_shares_are_no_better(
    shelf: tuple[list[Offer], object],
) -> None:
    offers, medium = shelf
    made = split(offers, medium)  # type: ignore[arg-type]
    assert made.tau_s <= split_equally(offers, medium).tau_s * (1 + 1e-9)  # type: ignore[arg-type]
    if isinstance(medium, Own):
        assert made.tau_s == pytest.approx(max(one.offset_s + one.sent_bytes / one.rate for one in offers))
        return
    assert sum(made.shares.values()) == pytest.approx(1, abs=1e-6)
    for offer in offers:
        share = made.shares[offer.device]
        if isinstance(medium, Radio):
            band = share * medium.bandwidth_hz
            rate = band * math.log2(1 + offer.rate / (band * DENSITY)) / 8
        else:
            rate = share * offer.rate
        assert offer.offset_s + offer.sent_bytes / rate == pytest.approx(made.tau_s, rel=1e-6)


def test_the_gain_over_equal_shares_is_what_it_was_in_the_literature_s_cell() -> None:
    """2 Mbit per device, 1 MHz, 0.1 W, 100 to 500 m, 128.1 + 37.6 log10(km) dB, Rayleigh, 0.1 to 1.5 s of computing."""
    rng = np.random.default_rng(7)
    gains = []
    for _ in range(60):
        km = rng.uniform(0.1, 0.5, 8)
        power = 0.1 * 10 ** (-(128.1 + 37.6 * np.log10(km)) / 10) * rng.exponential(1.0, 8)
        offers = [
            Offer(str(number), float(rng.uniform(0.1, 1.5)), 2e6 / 8, float(power[number])) for number in range(8)
        ]
        medium = Radio(1e6, DENSITY)
        gains.append(split_equally(offers, medium).tau_s / split(offers, medium).tau_s)
    assert min(gains) >= 1 and np.median(gains) >= 1.15
