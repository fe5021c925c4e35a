"""Virtual boards are measured in moments in which nobody unseen shares the processor."""

from __future__ import annotations

from dataclasses import dataclass, field

from agent.workers import calm
from agent.workers.calm import Calm
from agent.workers.clock import REAL, Clocks


@dataclass
class Machine:
    """Its probes take 1 ms, or more while it is `shared`."""

    now_s: float = 0.0
    busy_s: float = 0.0
    shared: list[tuple[float, float]] = field(default_factory=list)
    probes: int = 0

    def probe(self) -> None:
        self.probes += 1
        took_s = 0.0017 if any(begin_s <= self.now_s < end_s for begin_s, end_s in self.shared) else 0.001
        self.busy_s += took_s
        self.now_s += took_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def calm(self, active: bool = True) -> Calm:
        return Calm(active, Clocks(lambda: self.now_s, lambda: self.busy_s), self.sleep, self.probe)


def test_a_free_processor_is_not_waited_for() -> None:
    machine = Machine()
    wait = machine.calm()
    wait()
    began_s = machine.now_s
    for _ in range(10):
        wait()
    assert machine.now_s - began_s < 0.03


def test_a_shared_one_is_waited_for_until_it_is_free() -> None:
    machine = Machine()
    wait = machine.calm()
    wait()
    free_s = machine.now_s + 0.08
    machine.shared = [(machine.now_s, free_s)]
    wait()
    assert free_s <= machine.now_s < free_s + 0.02


def test_patience_ends_for_a_step_and_for_a_task() -> None:
    machine = Machine()
    wait = machine.calm()
    wait()
    machine.shared = [(machine.now_s, 1e9)]
    began_s = machine.now_s
    wait()
    assert calm.STEP_PATIENCE_S <= machine.now_s - began_s < calm.STEP_PATIENCE_S + 0.02
    for _ in range(1000):
        wait()
    assert machine.now_s - began_s < calm.PATIENCE_S + calm.STEP_PATIENCE_S


def test_a_real_board_is_measured_as_it_is() -> None:
    machine = Machine()
    machine.calm(active=False)()
    assert machine.probes == 0


def test_the_probe_takes_processor_time_but_little() -> None:
    probe = calm._product()
    probe()
    began_s = REAL.processor_s()
    for _ in range(20):
        probe()
    assert 0 < REAL.processor_s() - began_s < 1.0
