"""A board that runs stages is measured in their pauses, and whoever waits for it does not wait for ever."""

from __future__ import annotations

from agent.workers.polite import PATIENCE_S, Polite


class Machine:
    """A clock that sleeping moves, and what others take of the processor from when until when."""

    def __init__(self, busy_until_s: float) -> None:
        self.now_s = 0.0
        self.busy_until_s = busy_until_s

    def restart(self) -> None:
        pass

    def share(self) -> float:
        return 0.9 if self.now_s <= self.busy_until_s else 0.1

    def polite(self, active: bool = True) -> Polite:
        return Polite(active, self, lambda: self.now_s, self.sleep)  # type: ignore[arg-type]

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def test_it_waits_until_the_others_are_done() -> None:
    machine = Machine(busy_until_s=3.0)
    machine.polite()()
    assert 3.0 < machine.now_s < 3.6


def test_it_waits_so_long_in_all_and_not_each_time() -> None:
    machine = Machine(busy_until_s=1e9)
    polite = machine.polite()
    for _ in range(20):
        polite()
    assert PATIENCE_S <= machine.now_s < PATIENCE_S + 0.5


def test_without_stages_nobody_waits() -> None:
    machine = Machine(busy_until_s=1e9)
    machine.polite(active=False)()
    assert machine.now_s == 0
