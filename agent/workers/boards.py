"""What a measuring worker finds of the board itself, beside modules and links: ceilings, disk, codecs, heat and
energy."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from agent.workers.codings import time_codings
from agent.workers.pipe import Measured, MeasureTask
from hwprofiles import ceilings, sustained
from hwprofiles.course import course_of
from hwprofiles.disk import measure_disk
from hwprofiles.measure import Step, StopRule, sample
from hwprofiles.probe import clocks, thermal
from hwprofiles.probe.busy import Others
from hwprofiles.probe.caches import last_cache_bytes
from hwprofiles.probe.commands import Runner, none_while_measuring, runner_for
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.sampler import Sampler
from hwprofiles.samples import Ceilings, Course, DiskMeasurement, Rate, Sustained
from hwprofiles.survey import memory
from models.engine import products
from wire.errors import EdgelamError

MOST_BUDGET_S: Final = 0.3
"""For each of three passes and two products: a second and a half in all."""

ROOT: Final = Path("/")
SUSTAINED_CONTEXT: Final = 16

COURSE_INTERVAL_S: Final = 0.5
"""A sample reads some ten small files, which takes about a millisecond."""


class CourseWatch:
    """Temperature, clocks, power and what others take of the processor, from when it is made until `end`."""

    def __init__(self) -> None:
        self._others = Others(ROOT)
        self._sampler = Sampler(COURSE_INTERVAL_S, run=none_while_measuring, gpu=False)
        self._sampler.start()

    def end(self) -> Course:
        self._sampler.stop()
        return course_of(self._sampler.trace(), self._others.share())


def sustain(
    task: MeasureTask, step: Step, engine: Callable[[], str], stack: int, told: Callable[[float], None]
) -> Sustained:
    """Decode steps of the task's first module for as long as it says."""
    runner = runner_for(ROOT)
    others = Others(ROOT)
    emulated = task.speed < 1.0  # the sensors are those of the machine underneath

    def look() -> sustained.Look:
        return sustained.Look(None, None, None) if emulated else _look(runner)

    windows = sustained.run(step, task.sustained_s, look, told)
    return Sustained(
        key=task.modules[0].module.key,
        engine=engine(),
        threads=task.threads,
        phase="decode",
        tokens=1,
        context=SUSTAINED_CONTEXT,
        stack=stack,
        asked_s=task.sustained_s,
        windows=windows,
        measured_at_unix=time.time(),
        throttling=thermal.throttle(ROOT, runner),
        processor_share=others.share(),
    )


def _look(runner: Runner) -> sustained.Look:
    heat, frequency, throttle = thermal.hottest(ROOT), clocks.clocks(ROOT), thermal.throttle(ROOT, runner)
    return sustained.Look(
        celsius=heat.value if isinstance(heat, Reading) else None,
        clock_hz=frequency.value.current_hz if isinstance(frequency, Reading) else None,
        throttled=thermal.NOW in throttle.value if isinstance(throttle, Reading) else None,
    )


def with_board(task: MeasureTask, found: Measured) -> Measured:
    """What was found, and the board's ceilings and disk, and what codecs take on it."""
    return msgspec.structs.replace(found, ceilings=_ceilings(task), disk=_disk(task), codings=time_codings())


def _ceilings(task: MeasureTask) -> Ceilings | Absent | Failed:
    budget_s = min(MOST_BUDGET_S, task.budget_s)
    without: dict[str, str] = {}
    cache = last_cache_bytes(ROOT)
    cache_bytes = cache.value if isinstance(cache, Reading) else 0
    size = ceilings.array_bytes(cache_bytes, memory(ROOT).usable_bytes)
    passes: tuple[Rate, ...] = ()
    if isinstance(size, Absent):
        without["memory"] = size.because
    else:
        passes = ceilings.memory_rates(size, task.threads, budget_s)
    made, engine = [], ""
    for name in products.NAMES:
        try:
            product = products.Product(name, task.threads)
            engine = product.engine
            made.append(_product(name, product, budget_s))
        except (EdgelamError, ValueError) as error:
            without[f"products of {name} matrices"] = str(error)[:1024]
    if not passes and not made:
        return Failed("; ".join(without.values())[:1024])
    return Ceilings(
        threads=task.threads,
        memory=passes,
        array_bytes=size if isinstance(size, int) else 0,
        cache_bytes=cache_bytes,
        products=tuple(made),
        engine=engine,
        without=without,
    )


def _product(name: str, product: products.Product, budget_s: float) -> Rate:
    def step() -> float:
        began_s = time.perf_counter()
        product.run()
        return time.perf_counter() - began_s

    rule = StopRule(time_budget_s=budget_s, max_samples=60)
    return Rate(what=name, amount=products.OPERATIONS, samples=sample(step, rule))


def _disk(task: MeasureTask) -> DiskMeasurement | Absent | Failed:
    return measure_disk(Path(task.cache_folder)) if task.cache_folder else Absent("the board keeps nothing on a disk")
