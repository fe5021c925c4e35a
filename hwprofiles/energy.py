"""Joules of a step: the board idle, then each kind of step over and over, each with a sampler of its own.

A pass of its own: who asks a program for power disturbs what it measures, and steps that are timed have pauses between
them. Without a sensor there is no figure, and 'unknown' is not zero.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeVar

from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.sampler import Energy, Sampler
from hwprofiles.samples import EnergyMeasurement, EnergyRun, Phase

T = TypeVar("T")

RUN_S: Final = 1.2
"""Of each: at five samples a second, six or seven of them."""
INTERVAL_S: Final = 0.2


class Work(NamedTuple):
    key: str
    phase: Phase
    tokens: int
    context: int
    stack: int
    step: Callable[[], object]


def measure_energy(
    works: Sequence[Work],
    sampler: Callable[[], Sampler],
    run_s: float = RUN_S,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> EnergyMeasurement | Absent | Failed:
    """Take some seconds where something measures power, and none where nothing does."""
    meter = sampler().trace()
    if not isinstance(meter.power, Reading):
        return meter.power
    _, idle = _while(sampler(), partial(sleep, run_s))
    runs = []
    for work in works:
        work.step()  # the first one is another: buffers, clocks
        steps, spent = _while(sampler(), partial(_repeat, work.step, run_s, clock))
        runs.append(
            EnergyRun(
                key=work.key,
                phase=work.phase,
                tokens=work.tokens,
                context=work.context,
                stack=work.stack,
                steps=steps,
                duration_s=spent.duration_s,
                joules=spent.joules,
            )
        )
    return EnergyMeasurement(meter=meter.power.value, covers=meter.covers, idle_w=_idle_watts(idle), runs=tuple(runs))


def _repeat(step: Callable[[], object], run_s: float, clock: Callable[[], float]) -> int:
    """Run for so long; how often."""
    began_s, count = clock(), 0
    while count == 0 or clock() - began_s < run_s:
        step()
        count += 1
    return count


def _while(sampler: Sampler, work: Callable[[], T]) -> tuple[T, Energy]:
    with sampler:
        result = work()
    return result, sampler.trace().energy()


def _idle_watts(idle: Energy) -> Reading[float] | Absent | Failed:
    if not isinstance(idle.joules, Reading):
        return idle.joules
    if idle.duration_s <= 0:
        return Failed("no time passed between two samples")
    return Reading(idle.joules.value / idle.duration_s, idle.joules.source)


def token_j(run: EnergyRun) -> float | None:
    """Joules for each row of a step through the stack, idle included; None where it is not known."""
    if not isinstance(run.joules, Reading):
        return None
    return run.joules.value / run.steps / run.tokens


def token_j_above_idle(run: EnergyRun, idle_w: Reading[float] | Absent | Failed) -> float | None:
    """What the step took beyond what the idle board would have taken meanwhile."""
    if not isinstance(run.joules, Reading) or not isinstance(idle_w, Reading):
        return None
    return max(0.0, run.joules.value - idle_w.value * run.duration_s) / run.steps / run.tokens
