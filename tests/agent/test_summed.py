"""A board gives shares for one sum of a round alone, and remembers it beyond its worker's life."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.workers.summed import MOST_JOBS, Sums
from models.secure.session import TellsTooMuch
from wire.errors import CorruptData


def test_the_same_sum_again_is_no_other_and_a_later_round_is(tmp_path: Path) -> None:
    Sums(tmp_path).enter("tune-n/7", 2, ("a", "b", "c"))
    Sums(tmp_path).enter("tune-n/7", 2, ("a", "b", "c"))
    Sums(tmp_path).enter("tune-n/7", 3, ("a", "b", "d"))
    Sums(tmp_path).enter("tune-n/8", 0, ("a", "b", "d"))


@pytest.mark.parametrize(("number", "survivors"), [(2, ("a", "b", "c", "d")), (2, ("a", "b")), (1, ("a", "b", "c"))])
def test_another_sum_of_a_round_is_refused_and_changes_nothing(
    number: int, survivors: tuple[str, ...], tmp_path: Path
) -> None:
    Sums(tmp_path).enter("tune-n/7", 2, ("a", "b", "c"))
    before = (tmp_path / "sums").read_bytes()
    with pytest.raises(TellsTooMuch, match="would tell of single boards"):
        Sums(tmp_path).enter("tune-n/7", number, survivors)
    assert (tmp_path / "sums").read_bytes() == before


def test_a_damaged_book_gives_nothing(tmp_path: Path) -> None:
    (tmp_path / "sums").write_bytes(b"{")
    with pytest.raises(CorruptData, match="can't be read"):
        Sums(tmp_path).enter("tune-n/7", 0, ("a", "b", "c"))


def test_the_oldest_job_is_forgotten_first(tmp_path: Path) -> None:
    sums = Sums(tmp_path)
    for number in range(MOST_JOBS + 1):
        sums.enter(f"tune-n/{number}", 5, ("a", "b", "c"))
    sums.enter("tune-n/0", 1, ("a", "b", "d"))
    with pytest.raises(TellsTooMuch):
        sums.enter("tune-n/2", 1, ("a", "b", "d"))
