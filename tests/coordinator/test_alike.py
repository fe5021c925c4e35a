"""A board is slow beside the others; what all have in common is nobody's fault."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.alike import FIRST_WINDOWS, RECENT_S, Alike
from coordinator.promised import Ratio
from coordinator.slowness import Slowness

NOBODY: dict[str, float] = {}


def exactly(times: float) -> Ratio:
    return Ratio(times, times)


def seen(alike: Alike, now_s: float, slow: dict[str, float] = NOBODY, **times: float) -> dict[str, float | None]:
    """One round of windows of these boards."""
    found = {}
    for device, ratio in times.items():
        beside = alike.beside("tiny", device, exactly(ratio), slow, now_s)
        found[device] = beside.least if beside is not None else None
    return found


@given(st.floats(1.0, 10.0), st.floats(1.0, 10.0))
def test_what_all_boards_take_longer_is_divided_out_and_what_one_takes_longer_is_not(
    alike_s: float, own: float
) -> None:
    alike = Alike()
    seen(alike, 0.0, a=alike_s, b=alike_s, c=alike_s)
    found = seen(alike, 2.0, a=alike_s, b=alike_s * own, c=alike_s)
    assert found["a"] == pytest.approx(1.0) and found["b"] == pytest.approx(own)
    assert found["c"] is not None and found["c"] <= 1.001


def test_who_is_faster_than_promised_makes_nobody_slow() -> None:
    alike = Alike()
    seen(alike, 0.0, a=0.5, b=1.1)
    assert seen(alike, 2.0, a=0.5, b=1.1)["b"] == pytest.approx(1.1)


def test_a_board_that_is_known_to_be_slow_excuses_nobody() -> None:
    alike = Alike()
    seen(alike, 0.0, a=3.0, b=1.0)
    assert seen(alike, 2.0, a=3.0, b=3.0)["b"] == pytest.approx(1.0)
    assert seen(alike, 4.0, {"a": 3.0}, a=3.0, b=3.0)["b"] == pytest.approx(3.0)


def test_a_board_that_works_alone_is_compared_with_itself_as_it_was_at_first() -> None:
    alike = Alike()
    for window in range(FIRST_WINDOWS):
        assert seen(alike, 2.0 * window, a=1.5) == {"a": None}
    assert seen(alike, 20.0, a=1.5) == {"a": pytest.approx(1.0)}
    assert seen(alike, 22.0, a=4.5) == {"a": pytest.approx(3.0)}
    alike.forget(["a"])
    assert seen(alike, 24.0, a=4.5) == {"a": None}, "it was measured anew"


def test_old_windows_and_other_deployments_say_nothing() -> None:
    alike = Alike()
    seen(alike, 0.0, a=2.0, b=2.0)
    assert seen(alike, RECENT_S + 1, a=2.0) == {"a": None}
    assert alike.beside("other", "b", exactly(2.0), NOBODY, RECENT_S + 1) is None
    alike.keep(["tiny"])
    assert {key[0] for key in alike._last} == {"tiny"}


def test_steps_of_several_rows_say_more_beside_those_of_others() -> None:
    """Four rows take 2.4 times as long as one, on each board; which no profile says."""
    alike = Alike()
    rows = Ratio(0.6, 2.4)
    alike.beside("tiny", "a", rows, NOBODY, 0.0)
    assert alike.beside("tiny", "b", rows, NOBODY, 0.0) == (pytest.approx(0.6), pytest.approx(1.0)), "well for sure"
    slow = alike.beside("tiny", "b", Ratio(1.8, 7.2), NOBODY, 2.0)
    assert slow == (pytest.approx(1.8), pytest.approx(3.0)), "between these"


def test_boards_that_become_slow_one_after_the_other_are_both_found() -> None:
    alike, judge, now_s = Alike(), Slowness(), 0.0
    found = []
    for times in (
        ({"a": 1.3, "b": 1.4, "c": 1.5},) * 20
        + ({"a": 4.0, "b": 1.4, "c": 1.5},) * 5
        + ({"a": 4.0, "b": 4.2, "c": 1.5},) * 5
    ):
        now_s += 2.0
        for device, ratio in times.items():
            beside = alike.beside("tiny", device, exactly(ratio), judge.slow, now_s)
            change = judge.saw(device, beside, now_s, 0.0) if beside is not None else None
            found += [(change.device, round(change.times, 1))] if change is not None else []
    assert [device for device, _ in found] == ["a", "b"]
    assert all(2.5 < times < 3.2 for _, times in found)
