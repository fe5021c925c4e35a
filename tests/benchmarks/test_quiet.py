"""What is measured while a host gives the machine to others is measured again, and said to be if it never was quiet."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from benchmarks.quiet import QUIET, TRIALS, Watch, Watched, quieter_half, quietly, stolen_s, watched


class Machine:
    """Passes a second with each look; of each trial the host takes a share of all processors."""

    def __init__(self, *shares: float) -> None:
        self.shares: Iterator[float] = iter(shares)
        self.now_s = self.gone_s = 0.0

    def measure(self) -> float:
        self.now_s += 10.0
        self.gone_s += 10.0 * (os.cpu_count() or 1) * next(self.shares)
        return self.now_s

    def watch(self) -> Watch:
        return Watch(lambda: self.gone_s, lambda: self.now_s)


@pytest.mark.parametrize(
    ("shares", "trial", "lost"),
    [
        ((0.0,), 1, 0.0),
        ((QUIET / 2,), 1, QUIET / 2),
        ((0.1, 0.0), 2, 0.0),
        ((0.1, 0.2, 0.01), 3, 0.01),
        ((0.1,) * (TRIALS - 1) + (0.3,), TRIALS, 0.3),
    ],
)
def test_the_first_quiet_trial_counts_or_the_last(shares: tuple[float, ...], trial: int, lost: float) -> None:
    machine = Machine(*shares)
    found = quietly(machine.measure, machine.watch)
    assert (found.trial, found.value) == (trial, 10.0 * trial) and found.lost_share == pytest.approx(lost)


def test_what_the_kernel_counts_is_read() -> None:
    assert stolen_s() >= 0 and Watch().lost_share() >= 0


def test_the_quieter_half_counts_in_the_order_in_which_it_came() -> None:
    found = [Watched(place, share) for place, share in enumerate((0.3, 0.0, 0.1, 0.2, 0.0))]
    assert [one.value for one in quieter_half(found)] == [1, 2, 4]
    assert [one.value for one in quieter_half(found[:2])] == [1]
    assert quieter_half([]) == []


def test_what_was_measured_is_watched() -> None:
    machine = Machine(0.5)
    assert watched(machine.measure, machine.watch).lost_share == pytest.approx(0.5)
