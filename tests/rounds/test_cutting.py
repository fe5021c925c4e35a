"""Segments of a trunk: all blocks, in order, within memory, and no other way is faster by brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as some

from coordinator.rounds.cutting import Holder, cut, divided, step_s


@given(
    some.lists(some.tuples(some.integers(1, 5), some.floats(0.1, 10)), min_size=1, max_size=4),
    some.integers(1, 9),
)
def test_no_other_division_has_a_faster_slowest_board(boards: list[tuple[int, float]], blocks: int) -> None:
    most, block_s = [one for one, _ in boards], [one for _, one in boards]
    ways = [way for way in itertools.product(*(range(1, n + 1) for n in most)) if sum(way) == blocks]
    found = divided(most, block_s, blocks)
    assert bool(found) == bool(ways)
    if found:
        assert sum(found) == blocks and all(1 <= share <= n for share, n in zip(found, most, strict=True))

        def slowest(way: tuple[int, ...]) -> float:
            return max(share * each for share, each in zip(way, block_s, strict=True))

        assert slowest(found) == pytest.approx(min(map(slowest, ways)))


def holder(name: str, block_s: float | None = 1.0, most: int = 99, hop_s: float | None = 0.0) -> Holder:
    return Holder(name, most, block_s, hop_s)


def test_segments_are_as_long_as_boards_are_fast() -> None:
    found = cut([holder("a", 3.0), holder("b", 1.0), holder("c", 1.5)], 12, ends=8, at_least=2, at_most=9)
    assert [(one.device, one.first_block, one.end_block) for one in found] == [("a", 0, 2), ("b", 2, 8), ("c", 8, 12)]


def test_more_boards_are_of_use_to_many_alone_and_where_the_way_is_short() -> None:
    four = [holder(name) for name in "abcd"]
    assert len(cut(four, 12, ends=8, at_least=1, at_most=9)) == 4
    assert len(cut(four, 12, ends=1, at_least=1, at_most=9)) == 1, "nothing is made side by side"
    assert len(cut(four, 12, ends=1, at_least=2, at_most=9)) == 2
    far = [holder(name, hop_s=100.0) for name in "abcd"]
    assert len(cut(far, 12, ends=8, at_least=1, at_most=9)) == 1


def test_a_board_that_is_far_too_slow_is_left_out() -> None:
    found = cut([holder("slow", 100.0), holder("a"), holder("b")], 12, ends=8, at_least=2, at_most=9)
    assert [one.device for one in found] == ["a", "b"]


def test_memory_decides_first() -> None:
    small = [holder("a", 1.0, most=2), holder("b", 9.0, most=3), holder("c", 9.0, most=3)]
    found = cut(small, 7, ends=1, at_least=1, at_most=9)
    assert [one.blocks for one in found] == [2, 3, 2]
    assert cut(small, 9, ends=1, at_least=1, at_most=9) == ()
    assert cut([], 3, ends=1, at_least=1, at_most=9) == ()
    assert cut(small, 7, ends=1, at_least=1, at_most=2) == ()


def test_who_was_not_measured_counts_as_slow_as_the_slowest() -> None:
    found = cut([holder("new", None), holder("a", 1.0), holder("b", 2.0)], 10, ends=9, at_least=3, at_most=3)
    assert found[1].blocks == 5 and {found[0].blocks, found[2].blocks} == {2, 3}
    assert [one.blocks for one in cut([holder("x", None), holder("y", None)], 10, 4, 2, 2)] == [5, 5]


def test_a_step_is_a_pipeline() -> None:
    """By simulation: each segment takes boards one after the other."""
    compute_s, ends = [1.0, 3.0, 2.0], 5
    done = [0.0] * ends
    for segment in compute_s:
        free = 0.0
        for board in range(ends):
            done[board] = free = max(free, done[board]) + segment
    assert step_s(compute_s, [0.0] * 3, ends) == pytest.approx(done[-1])
