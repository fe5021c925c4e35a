"""What the marks of stages say of hops, and whose link it is that changed."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.hopchange import FASTER_WINDOWS, FIRST_WINDOWS, WINDOWS, HopChange, HopWatch, whose
from coordinator.laps import LEAST_LAPS, Laps
from coordinator.slowlinks import FORGET_S, MOST_TIMES, SlowLinks
from wire.messages import StepMark

STEP_S = 0.005


class Ring:
    """Stages on boards whose clocks differ and drift; `window` makes laps and gives the gaps as reported."""

    def __init__(self, hops_s: Sequence[float], offsets_s: Sequence[float], drift: float = 0.0) -> None:
        self.hops_s = list(hops_s)
        self.offsets_s = list(offsets_s)
        self.drift = drift
        self.now_s = 1000.0
        self.row = 0
        self.laps = Laps(len(hops_s))
        self.random = random.Random(1)

    def clock(self, board: int, at_s: float) -> float:
        return at_s * (1 + board * self.drift) + self.offsets_s[board]

    def lap(self, jitter_s: float = 0.0) -> list[StepMark]:
        self.row += 8
        at_s, spans = self.now_s, []
        for hop_s in self.hops_s:
            spans.append((at_s, at_s + STEP_S))
            at_s += STEP_S + hop_s + self.random.uniform(0, jitter_s)
        self.now_s = at_s
        marks = [
            StepMark(7, self.row, self.clock(board, begin), self.clock(board, end))
            for board, (begin, end) in enumerate(spans)
        ]
        first = marks[0]
        marks[0] = StepMark(7, self.row, first.began_s, first.ended_s, self.clock(0, at_s))
        self.now_s += 0.1
        return marks

    def window(self, jitter_s: float = 0.0) -> tuple[float, ...]:
        for _ in range(200):
            for stage, mark in enumerate(self.lap(jitter_s)):
                gaps = self.laps.saw(stage, [mark], self.now_s)
                if gaps is not None:
                    return gaps
        raise AssertionError("no window")


def run(ring: Ring, watch: HopWatch, windows: int, jitter_s: float = 0.0) -> list[HopChange]:
    return [change for _ in range(windows) if (change := watch.saw(ring.window(jitter_s))) is not None]


HOPS = [0.004, 0.005, 0.003]
APART = [5e4, 0.0, 123.4]


def test_the_gaps_of_a_ring_sum_to_its_hops_whatever_the_clocks_say() -> None:
    gaps = Ring(HOPS, APART).window()
    assert sum(gaps) == pytest.approx(sum(HOPS), abs=1e-6)
    assert gaps[0] - APART[1] + APART[0] == pytest.approx(HOPS[0], abs=1e-6)


def test_reports_may_repeat_marks_come_late_or_lack_some() -> None:
    ring = Ring(HOPS, APART)
    laps = [ring.lap() for _ in range(LEAST_LAPS + 3)]
    joined = Laps(3)
    found = []
    for end in range(1, len(laps) + 1):
        for stage in (2, 0, 1):
            seen = [lap[stage] for number, lap in enumerate(laps[:end]) if stage != 1 or number != 2]
            found.append(joined.saw(stage, seen[-16:], 1000.0 + end))
    windows = [gaps for gaps in found if gaps is not None]
    assert windows and all(sum(gaps) == pytest.approx(sum(HOPS), abs=1e-6) for gaps in windows)


def test_laps_of_several_answers_at_once_say_nothing() -> None:
    ring = Ring(HOPS, APART)
    joined = Laps(3)
    for number in range(20):
        for stage, mark in enumerate(ring.lap()):
            assert joined.saw(stage, [mark], 1000.0 + number, 2) is None
    assert all(joined.saw(stage, [mark], 1030.0) is None for stage, mark in enumerate(ring.lap()))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20), *[st.floats(0, 1e12)] * 3), max_size=40))
def test_marks_that_say_anything_make_no_trouble(marks: list[tuple[int, int, float, float, float]]) -> None:
    laps, watch = Laps(2), HopWatch([0.001, 0.001])
    for number, (stage, row, *times) in enumerate(marks):
        gaps = laps.saw(stage, [StepMark(1, row, *times)], float(number))
        if gaps is not None:
            watch.saw(gaps)


@pytest.mark.parametrize("slow", [0, 1, 2])
@pytest.mark.parametrize("drift", [0.0, 50e-6])
def test_the_board_whose_both_hops_became_slower_is_found_once_and_soon(slow: int, drift: float) -> None:
    ring, watch = Ring(HOPS, APART, drift), HopWatch(HOPS)
    assert run(ring, watch, 30, 0.001) == []
    ring.hops_s[slow - 1] += 0.018
    ring.hops_s[slow] += 0.018
    [change] = run(ring, watch, WINDOWS + 1, 0.001)
    assert change.boards == (slow,) and change.unsure == ()
    assert change.of(slow) == pytest.approx(0.018, abs=0.002)
    assert run(ring, watch, 30, 0.001) == [], "a change is told once"


def test_it_is_seen_to_be_faster_again() -> None:
    ring, watch = Ring(HOPS, APART), HopWatch(HOPS)
    run(ring, watch, 5)
    ring.hops_s = [0.022, 0.023, 0.003]
    assert len(run(ring, watch, WINDOWS + 1)) == 1
    ring.hops_s = HOPS
    [change] = run(ring, watch, FASTER_WINDOWS + 1)
    assert change.boards == (1,) and change.of(1) == pytest.approx(-0.018, abs=1e-4)


def test_of_two_boards_it_can_not_be_told_whose_link_it_is() -> None:
    ring, watch = Ring([0.004, 0.004], [0.0, 9.0]), HopWatch([0.004, 0.004])
    run(ring, watch, 5)
    ring.hops_s = [0.024, 0.022]
    [change] = run(ring, watch, WINDOWS + 1)
    assert change.boards == () and change.unsure == (0, 1)


def test_one_hop_alone_or_all_of_them_leave_it_unsure() -> None:
    assert whose([0.02, 0.0, 0.0]) == HopChange((0.02, 0.0, 0.0), (), (0, 1))
    assert whose([0.02, 0.018, 0.02]).unsure == (0, 1, 2)
    assert whose([0.02, 0.018, 0.02]).boards == ()
    four = whose([0.02, 0.04, 0.02, 0.0])
    assert four.boards == (1, 2) and four.unsure == ()


def test_hops_that_are_slow_from_the_beginning_are_nobodys_for_sure() -> None:
    ring, watch = Ring([0.03, 0.03, 0.004], APART), HopWatch(HOPS)
    [change] = run(ring, watch, FIRST_WINDOWS)
    assert change.unsure == (0, 1, 2)


def test_a_slow_link_at_a_short_hop_and_a_busy_machine_are_no_change() -> None:
    ring, watch = Ring([0.0003] * 3, APART), HopWatch([0.0002] * 3)
    run(ring, watch, 5)
    ring.hops_s = [0.0025] * 3
    assert run(ring, watch, 10) == [], "two milliseconds on any machine"
    busy, watch = Ring(HOPS, APART), HopWatch(HOPS)
    run(busy, watch, 5)
    assert run(busy, watch, 20, jitter_s=0.006) == []


def test_a_change_that_passes_is_none() -> None:
    ring, watch = Ring(HOPS, APART), HopWatch(HOPS)
    run(ring, watch, 5)
    for _ in range(5):
        ring.hops_s = [0.022, 0.023, 0.003]
        assert run(ring, watch, WINDOWS - 1) == []
        ring.hops_s = list(HOPS)
        assert run(ring, watch, 2) == []


# What planners reckon with.


def test_a_link_is_as_many_times_slower_as_its_crossing_became_longer() -> None:
    links = SlowLinks()
    assert links.changed("a", 0.018, 0.002, 0.0, 1e9)
    assert links.times("a") == pytest.approx(10.0) and links.slow == {"a": pytest.approx(10.0)}
    slowed = links.of("a")
    assert slowed is not None and "10.0 times as long as it measured" in slowed.because
    assert links.more_s("a") == links.between_s("a", "b") == pytest.approx(0.018), "on any way, however long"
    assert links.changed("a", -0.018, 0.002, 1.0, 1e9) and links.of("a") is None
    assert not links.changed("b", 0.0005, 0.002, 1.0, 1e9), "a quarter more is as good as measured"
    links.changed("c", 1.0, 1e-9, 1.0, 1e9)
    assert links.times("c") == MOST_TIMES


def test_a_link_that_nobody_uses_is_forgiven_later_each_time_and_one_in_use_is_not() -> None:
    links = SlowLinks()
    links.changed("a", 0.018, 0.002, 0.0, 1e9)
    links.used(["a", "b"], FORGET_S - 1)
    assert links.tick(FORGET_S + 1) == []
    assert links.tick(2 * FORGET_S - 1) == ["a"] and links.of("a") is None
    now_s = 2 * FORGET_S
    links.changed("a", 0.018, 0.002, now_s, 1e9)
    assert links.tick(now_s + FORGET_S) == []
    assert links.tick(now_s + 2 * FORGET_S) == ["a"]


def test_a_link_that_was_measured_anew_is_as_it_measured() -> None:
    links = SlowLinks()
    links.changed("a", 0.018, 0.002, 0.0, 1e9)
    assert links.measured_anew("a") and not links.measured_anew("a") and not links.measured_anew("b")
    assert links.of("a") is None
