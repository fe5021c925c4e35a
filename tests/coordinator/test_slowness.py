"""A board is called slow when it is, within a stated number of windows, and nothing that scatters makes it flap."""

from __future__ import annotations

import random
from collections.abc import Iterable
from math import log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.promised import Ratio
from coordinator.replanning import CALM_S as GATE_CALM_S
from coordinator.replanning import FIRST_PAUSE_S, LONGEST_PAUSE_S, Gate
from coordinator.slowness import (
    CALM_S,
    DWELL_S,
    FASTER_WINDOWS,
    FORGET_S,
    MOST_TIMES,
    SLOWER,
    SLOWER_WINDOWS,
    WELL,
    Change,
    Slowness,
)

WINDOW_S = 2.0


def exactly(times: float) -> Ratio:
    """A window of steps of single rows."""
    return Ratio(times, times)


class Watched:
    """One board, a window every two seconds of work."""

    def __init__(self) -> None:
        self.judge = Slowness()
        self.now_s = 1000.0
        self.changes: list[Change] = []

    def see(self, *ratios: Ratio | float) -> list[Change]:
        """Windows one after the other; what changed at them."""
        before = len(self.changes)
        for ratio in ratios:
            self.now_s += WINDOW_S
            found = ratio if isinstance(ratio, Ratio) else exactly(ratio)
            change = self.judge.saw("pi4", found, self.now_s, 0.0)
            self.changes += [change] if change is not None else []
            self.changes += self.judge.tick(self.now_s)
        return self.changes[before:]

    def rest(self, seconds: float) -> list[Change]:
        before = len(self.changes)
        for _ in range(int(seconds)):
            self.now_s += 1.0
            self.changes += self.judge.tick(self.now_s)
        return self.changes[before:]

    @property
    def times(self) -> float:
        return self.judge.slow.get("pi4", 1.0)


def kinds(changes: Iterable[Change]) -> list[str]:
    return [change.kind for change in changes]


@settings(max_examples=300)
@given(st.floats(SLOWER, MOST_TIMES), st.lists(st.floats(0.9, 1.2), max_size=30))
def test_a_board_that_became_slow_is_noticed_in_its_third_slow_window_and_not_before(
    times: float, before: list[float]
) -> None:
    board = Watched()
    assert not board.see(*before, *[times] * (SLOWER_WINDOWS - 1))
    [change] = board.see(times)
    assert (change.kind, change.times, change.before) == ("slower", times, 1.0)
    slowed = board.judge.of("pi4")
    assert slowed is not None and slowed.times == times and f"{1 / times:.2f} of its profile" in slowed.because


@settings(max_examples=300)
@given(st.lists(st.floats(0.01, SLOWER, exclude_max=True), max_size=200))
def test_what_stays_below_the_threshold_is_no_slowness(ratios: list[float]) -> None:
    board = Watched()
    assert not board.see(*ratios) and board.judge.of("pi4") is None


@settings(max_examples=300)
@given(st.lists(st.booleans(), max_size=200), st.floats(2, 20))
def test_single_windows_that_wait_for_something_else_are_no_slowness(hiccups: list[bool], times: float) -> None:
    board = Watched()
    rare = [times if hiccup and (number % SLOWER_WINDOWS) else 1.0 for number, hiccup in enumerate(hiccups)]
    assert not board.see(*rare)


@settings(max_examples=300)
@given(st.floats(1.75, 13.0), st.lists(st.floats(0.0, 1.0), max_size=300))
def test_noise_in_a_band_around_a_slow_board_changes_once_and_never_again(low: float, where: list[float]) -> None:
    board = Watched()
    board.see(*[low * (SLOWER * 0.999) ** place for place in where])
    assert len(board.changes) <= 1


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 5, 10, 18, 40, 100]))
def test_a_board_that_comes_and_goes_is_called_slow_ever_more_seldom(seed: int, longest: int) -> None:
    draws = random.Random(seed)
    board = Watched()
    while board.now_s < 1000.0 + 3600.0:
        board.see(*[draws.choice((1.0, 3.0))] * draws.randint(1, longest))
    well_to_slow = sum(change.kind == "slower" and change.before == 1.0 for change in board.changes)
    assert well_to_slow <= 1 + log2(1 + 3600 / DWELL_S)


def test_ten_seconds_slow_and_ten_seconds_well_for_an_hour_is_one_change() -> None:
    board = Watched()
    for _ in range(180):
        board.see(*[3.0] * 5, *[1.0] * 5)
    assert kinds(board.changes) == ["slower"]


def test_a_board_that_comes_and_goes_is_not_well_though_it_seems_less_slow_with_another_share() -> None:
    board = Watched()
    board.see(*[3.8] * 3)
    for _ in range(180):
        board.see(*[2.3] * 5, *[0.7] * 5)
    assert kinds(board.changes) == ["slower", "faster"] and board.times == 2.3


def test_how_slow_is_said_by_the_windows_after_the_change() -> None:
    board = Watched()
    [change] = board.see(1.0, 1.6, 3.3, 3.2)
    assert change.times == 3.3


def test_a_board_is_well_again_after_the_dwell_and_twice_as_long_after_a_relapse() -> None:
    board = Watched()
    board.see(*[3.0] * 3)
    for relapse in range(4):
        began_s = board.now_s
        while not board.see(1.0):
            pass
        assert board.changes[-1].kind == "well" and board.times == 1.0
        dwell_s = board.now_s - began_s - WINDOW_S
        assert dwell_s == pytest.approx(DWELL_S * 2**relapse, abs=WINDOW_S)
        assert kinds(board.see(*[3.0] * 3)) == ["slower"]


def test_a_board_that_was_well_for_long_begins_anew() -> None:
    board = Watched()
    board.see(*[3.0] * 3, *[1.0] * 17, *[3.0] * 3)
    board.see(*[1.0] * 33)
    assert kinds(board.changes) == ["slower", "well", "slower", "well"]
    board.see(*[1.0] * int(CALM_S / WINDOW_S + 1), *[3.0] * 3)
    assert kinds(board.see(*[1.0] * 17)) == ["well"], "the first dwell again"


def test_slower_still_and_less_slow_are_followed() -> None:
    board = Watched()
    board.see(*[2.0] * 3)
    assert not board.see(*[2.9] * 10), "within the band"
    assert [c.times for c in board.see(*[6.0] * 3)] == [6.0]
    assert [(c.kind, c.times) for c in board.see(*[3.0] * 16)] == [("faster", 3.0)]
    assert kinds(board.see(*[1.1] * 16)) == ["well"]


def test_few_windows_over_a_long_time_are_no_dwell() -> None:
    board = Watched()
    board.see(*[3.0] * 3)
    for _ in range(FASTER_WINDOWS - 1):
        board.rest(DWELL_S)
        assert not board.see(1.0)
    board.rest(DWELL_S)
    assert kinds(board.see(1.0)) == ["well"]


def test_one_slow_window_begins_the_dwell_anew() -> None:
    board = Watched()
    board.see(*[3.0] * 3, *[1.0] * 14, 2.5)
    assert not board.see(*[1.0] * 15)
    assert kinds(board.see(1.0)) == ["well"]


def test_steps_of_several_rows_are_slow_only_if_single_rows_would_be_faster() -> None:
    board = Watched()
    # Two rows in a step: it took 1.7 times a single row, which is nothing to wonder at.
    assert not board.see(*[Ratio(0.85, 1.7)] * 50)
    # 3.4 times: one by one the rows would have taken less than that on a board that keeps its profile.
    assert kinds(board.see(*[Ratio(1.7, 3.4)] * 3)) == ["slower"]
    # And what might be either does not make it well; only after a while it gets another chance.
    assert not board.see(*[Ratio(0.85, 1.7)] * 50)
    assert kinds(board.see(*[Ratio(0.85, 1.7)] * 101)) == ["forgotten"]


def test_a_board_of_whose_pace_nothing_is_seen_gets_another_chance_and_then_a_later_one() -> None:
    board = Watched()
    board.see(*[3.0] * 3)
    assert not board.rest(FORGET_S - 1)
    [change] = board.rest(2)
    assert change.kind == "forgotten" and change.waited_s >= FORGET_S and board.times == 1.0
    board.see(*[3.0] * 3)
    assert not board.rest(2 * FORGET_S - 1)
    assert kinds(board.rest(2)) == ["forgotten"]


def test_a_slow_board_that_works_is_not_forgotten() -> None:
    board = Watched()
    board.see(*[3.0] * 3)
    assert not board.see(*[3.0] * int(2 * FORGET_S / WINDOW_S))


def test_a_new_profile_says_what_the_board_is_now() -> None:
    board = Watched()
    assert board.judge.measured_anew("pi4", board.now_s) is None
    board.see(*[3.0] * 3)
    change = board.judge.measured_anew("pi4", board.now_s)
    assert change is not None and change.kind == "well" and board.judge.of("pi4") is None
    board.see(3.0, 3.0)
    assert board.judge.measured_anew("pi4", board.now_s) is None
    assert not board.see(3.0), "windows before the measurement say nothing about the new profile"


def test_boards_do_not_share_their_windows() -> None:
    judge = Slowness()
    for second, name in enumerate(["a", "b"] * 2 + ["b"]):
        change = judge.saw(name, exactly(3.0), 2.0 * second, 0.0)
    assert change is not None and change.device == "b" and set(judge.slow) == {"b"}


def test_a_little_slower_than_its_profile_is_well() -> None:
    board = Watched()
    board.see(*[2.0] * 3, *[WELL] * 17)
    assert kinds(board.changes) == ["slower", "well"]


@settings(max_examples=200)
@given(st.lists(st.floats(0.5, 400.0), min_size=1, max_size=400))
def test_a_deployment_moves_at_most_six_times_in_an_hour_whoever_wishes_it(gaps: list[float]) -> None:
    gate, moves, now_s = Gate(), [], 0.0
    for gap in gaps:
        if gate.open(now_s):
            gate.moved(now_s)
            moves.append(now_s)
        now_s += gap
    for first in moves[:1]:
        assert sum(first <= move < first + 3600 for move in moves) <= 6


def test_the_gate_doubles_its_pause_and_forgets_after_a_calm_time() -> None:
    gate, now_s, pauses = Gate(), 0.0, []
    for _ in range(9):
        began_s = now_s
        while not gate.open(now_s):
            now_s += 1.0
        pauses.append(now_s - began_s)
        gate.moved(now_s)
    assert pauses == [0.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    now_s += GATE_CALM_S
    gate.moved(now_s)
    assert not gate.open(now_s + FIRST_PAUSE_S - 1) and gate.open(now_s + FIRST_PAUSE_S)
