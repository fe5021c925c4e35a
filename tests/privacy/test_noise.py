"""Noise by a key, clipping, and the emulated channel."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.privacy.channel import gain_of, power_for
from models.privacy.noise import Stream, clipped, noised

KEY = bytes(range(32))


def test_the_same_key_and_label_give_the_same_numbers_and_others_others() -> None:
    first = Stream(KEY, "a")
    assert (first.normal(7) == Stream(KEY, "a").normal(7)).all()
    assert not (first.normal(7) == Stream(KEY, "a").normal(7)).any(), "each call goes on"
    assert not (Stream(KEY, "b").normal(7) == Stream(KEY, "a").normal(7)).any()
    assert not (Stream(KEY[::-1], "a").normal(7) == Stream(KEY, "a").normal(7)).any()
    with pytest.raises(ValueError, match="key of 3 bytes"):
        Stream(b"abc", "a")


def test_normal_numbers_are_normal() -> None:
    drawn = np.sort(Stream(KEY, "n").normal(100_001))
    assert abs(drawn.mean()) < 0.01 and drawn.std() == pytest.approx(1, abs=0.01)
    expected = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in drawn])
    gap = np.abs(expected - (np.arange(len(drawn)) + 0.5) / len(drawn)).max()
    assert gap < 1.63 / math.sqrt(len(drawn)), "Kolmogorov and Smirnov's bound at 1 %"


def test_each_takes_part_by_itself_with_its_share() -> None:
    stream = Stream(KEY, "s")
    counts = [len(stream.sampled(200, 0.1)) for _ in range(2000)]
    assert np.mean(counts) == pytest.approx(20, rel=0.02)
    assert np.var(counts) == pytest.approx(18, rel=0.1), "n q (1 - q): drawn by chance, not so many each time"
    assert stream.sampled(5, 1.0) == [0, 1, 2, 3, 4]


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50), st.floats(1e-3, 1e3))
def test_what_is_clipped_is_no_longer_than_it_may_be(values: list[float], most: float) -> None:
    vector = np.array(values, np.float32)
    found = clipped(vector, most)
    assert np.linalg.norm(found.astype(np.float64)) <= most * (1 + 1e-6)
    if np.linalg.norm(vector.astype(np.float64)) <= most:
        assert (found == vector).all()


def test_what_is_no_number_becomes_nothing() -> None:
    assert (clipped(np.array([1, np.nan, 2], np.float32), 1.0) == 0).all()
    assert (clipped(np.array([1, np.inf], np.float32), 1.0) == 0).all()


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    vector = np.linspace(-1, 1, 100_000, dtype=np.float32)
    added = noised(vector, 2.5, Stream(KEY, "d")) - vector
    assert added.std() == pytest.approx(2.5, rel=0.02)


@given(st.floats(1e-6, 1e3), st.floats(0.1, 100), st.floats(1e-3, 10), st.floats(1e-3, 10), st.sampled_from((0.5, 1.0)))
def test_power_never_leaves_less_noise_than_is_due(
    gain: float, least: float, most_power: float, sigma: float, ratio: float
) -> None:
    power, noise = power_for(least, gain, most_power, sigma, ratio)
    assert 0 < power <= most_power and noise >= least
    cap = sigma * ratio / least
    assert (power == most_power) == (gain * math.sqrt(most_power) <= cap * (1 + 1e-12)) or math.isclose(
        gain * math.sqrt(most_power), cap
    )
    assert noise == pytest.approx(sigma * ratio / (gain * math.sqrt(power)), rel=1e-9)


def test_the_worked_example_of_power_control() -> None:
    assert power_for(5.0, 0.1, 1.0, 0.1, 1.0) == pytest.approx((0.04, 5.0))
    assert power_for(5.0, 0.01, 1.0, 0.1, 1.0) == pytest.approx((1.0, 10.0))


def test_gains_are_rayleigh_of_their_mean() -> None:
    gains = [gain_of(2.0, 3, 1, number) for number in range(5000)]
    assert np.mean(gains) == pytest.approx(2.0, rel=0.03)
    assert np.mean(np.square(gains)) == pytest.approx(4.0 * 4 / math.pi, rel=0.05)
    assert gains[7] == gain_of(2.0, 3, 1, 7)
