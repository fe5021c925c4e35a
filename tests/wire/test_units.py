"""Figures as people read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wire.units import bytes_text, seconds_text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 us"), (12e-6, "12 us"), (999.4e-6, "999 us"), (999.6e-6, "1.0 ms"), (0.0123, "12.3 ms"),
        (0.99996, "1.0 s"), (1.0, "1.0 s"), (119.9, "119.9 s"), (119.96, "2.0 min"), (600.0, "10.0 min"),
    ],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@given(st.floats(1e-6, 1e5))
def test_no_figure_is_as_large_as_the_next_unit(seconds: float) -> None:
    found = re.fullmatch(r"([0-9.]+) (us|ms|s|min)", seconds_text(seconds))
    assert found is not None
    assert float(found[1]) < {"us": 1000, "ms": 1000, "s": 120, "min": 1e9}[found[2]]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KB"), (1_048_575, "1.0 MB"), (93 << 20, "93.0 MB")]
)
def test_bytes(count: int, text: str) -> None:
    assert bytes_text(count) == text
