"""Power, temperature and clocks over time, while something else is measured.

    with Sampler() as sampler:
        run_the_work()
    trace = sampler.trace()
    trace.energy()      # joules, and what they are of

At most ten samples a second: a board whose power is asked of a program pays for each one, so throughput is best taken
in a run without sampling. Times are monotonic.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal

from msgspec import Struct

from hwprofiles.probe import clocks, jetson, nvidia, power, rapl, thermal
from hwprofiles.probe.commands import Runner, runner_for
from hwprofiles.reading import Absent, Failed, Reading
from wire.errors import UsageError

MIN_INTERVAL_S: Final = 0.1
"""Ten a second: one report of a Raspberry Pi saw decoding six times slower at fifty."""

MAX_INTERVAL_S: Final = 60.0
"""Counters wrap around within quarter of an hour at the earliest: twice between two samples must not happen."""

MAX_SAMPLES: Final = 4096
"""With more, every other one is dropped and the interval doubled: hours fit, and a trace stays below 400 KB."""

GAP_INTERVALS: Final = 3.0
"""Samples further apart than so many intervals have a gap between them that no energy is counted for."""

LEAST_COVERED: Final = 0.9
"""A smaller share of the time with known power gives no energy."""

RAPL_COVERS: Final = "processor packages by RAPL, not the board's input"
NVML_COVERS: Final = "GPU boards by NVML, not the computer's input"

Meter = Literal["rails", "counters", "gpu", "none"]
"""Where power comes from: sensors on the board, the processor's counters, the GPU's own meter."""


class Sample(Struct, frozen=True, kw_only=True):
    """None: not known at that moment."""

    at_mono_s: float
    watts: float | None = None
    counted_j: float | None = None
    """Joules since the sampler began, where a counter and not a power is read."""
    celsius: float | None = None
    clock_hz: float | None = None
    gpu_clock_hz: float | None = None
    gpu_load: float | None = None


class Energy(Struct, frozen=True, kw_only=True):
    joules: Reading[float] | Absent | Failed
    covers: str
    """What it is of: 'module input VDD_IN, on-board sensor'."""
    covered: float
    """Share of the time between the first sample and the last with known power."""
    duration_s: float


class Trace(Struct, frozen=True, kw_only=True):
    samples: tuple[Sample, ...]
    interval_s: float
    covers: str
    power: Reading[str] | Absent | Failed
    """Which meter was read, or why there is none."""
    failed: tuple[str, ...] = ()
    """Reasons of readings that failed on the way, each once."""

    def between(self, start_mono_s: float, end_mono_s: float) -> Trace:
        """The part of the trace within a time, for one measurement of several."""
        kept = tuple(one for one in self.samples if start_mono_s <= one.at_mono_s <= end_mono_s)
        return Trace(samples=kept, interval_s=self.interval_s, covers=self.covers, power=self.power, failed=self.failed)

    def energy(self) -> Energy:
        """Joules from the first sample to the last: by the counter, or power integrated by trapezoids over pairs of
        samples without a gap between them. Absent where nothing measures power, failed where too little was seen."""
        duration_s = self.samples[-1].at_mono_s - self.samples[0].at_mono_s if len(self.samples) > 1 else 0.0
        if not isinstance(self.power, Reading):
            return Energy(joules=self.power, covers="", covered=0.0, duration_s=duration_s)
        joules, known_s = 0.0, 0.0
        for first, second in zip(self.samples, self.samples[1:], strict=False):
            step_s = second.at_mono_s - first.at_mono_s
            if first.counted_j is not None and second.counted_j is not None:
                joules += second.counted_j - first.counted_j
            elif first.watts is not None and second.watts is not None and step_s <= GAP_INTERVALS * self.interval_s:
                joules += (first.watts + second.watts) / 2 * step_s
            else:
                continue
            known_s += step_s
        covered = known_s / duration_s if duration_s > 0 else 0.0
        found: Reading[float] | Failed = Reading(joules, self.power.value)
        if covered < LEAST_COVERED:
            found = Failed(
                f"power known for {covered:.0%} of {duration_s:.3g} s, at least {LEAST_COVERED:.0%} are needed"
            )
        return Energy(joules=found, covers=self.covers, covered=covered, duration_s=duration_s)


class Sampler:
    """Samples in a thread of its own between `start` and `stop`; `sample` takes one at once, for those with a loop."""

    def __init__(
        self,
        interval_s: float = 0.2,
        root: Path = Path("/"),
        run: Runner | None = None,
        clock: Callable[[], float] = time.monotonic,
        gpu: bool = True,
    ) -> None:
        """`gpu`: whether the meter of a GPU will do where there is no other; it knows nothing of the processor."""
        if not MIN_INTERVAL_S <= interval_s <= MAX_INTERVAL_S:
            raise UsageError(f"sampling every {interval_s:g} s: it must be {MIN_INTERVAL_S:g} to {MAX_INTERVAL_S:g} s")
        self._root, self._run, self._clock = root, run or runner_for(root), clock
        self._interval_s = interval_s
        self._samples: list[Sample] = []
        self._failed: dict[str, None] = {}
        self._counters: tuple[rapl.Counter, ...] | None = None
        self._counted_j = 0.0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._nvml: Any = None
        self._tegra = isinstance(jetson.gpu(root), Reading)
        self._meter, self._power, self._covers = _meter(root, self._run, gpu)

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Take the first sample now and others in the background."""
        if self._thread is not None:
            raise RuntimeError("this sampler was started before")
        if self._meter == "gpu" and self._root == Path("/"):  # opened once: a sample would take as long to open it
            library = nvidia.opened()
            self._nvml = library.value if isinstance(library, Reading) else None
        self.sample()
        self._thread = threading.Thread(target=self._loop, name="sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end; the trace stays."""
        if self._thread is None or self._stopping.is_set():
            return
        self._stopping.set()
        self._thread.join()
        self.sample()
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml = None

    def _loop(self) -> None:
        due_s = self._clock()
        while True:
            now_s = self._clock()
            due_s = max(due_s + self._interval_s, now_s)  # late samples are dropped, not caught up with
            if self._stopping.wait(due_s - now_s):
                return
            self.sample()

    def sample(self) -> Sample:
        """Take one sample now."""
        watts, counted_j = self._measured()
        heat, frequency = thermal.hottest(self._root), clocks.clocks(self._root)
        gpu = jetson.gpu(self._root) if self._tegra else None
        taken = Sample(
            at_mono_s=self._clock(),
            watts=watts,
            counted_j=counted_j,
            celsius=heat.value if isinstance(heat, Reading) else None,
            clock_hz=frequency.value.current_hz if isinstance(frequency, Reading) else None,
            gpu_clock_hz=gpu.value.current_hz if isinstance(gpu, Reading) else None,
            gpu_load=gpu.value.load if isinstance(gpu, Reading) else None,
        )
        for reading in (heat, frequency, gpu):
            if isinstance(reading, Failed):
                self._note(reading)
        with self._lock:
            self._samples.append(taken)
            if len(self._samples) > MAX_SAMPLES:
                self._samples = self._samples[::2]
                self._interval_s *= 2
        return taken

    def trace(self) -> Trace:
        """What was sampled until now."""
        with self._lock:
            return Trace(
                samples=tuple(self._samples),
                interval_s=self._interval_s,
                covers=self._covers,
                power=self._power,
                failed=tuple(self._failed),
            )

    def _note(self, failure: Failed) -> None:
        if len(self._failed) < 16:
            self._failed[failure.because] = None

    def _measured(self) -> tuple[float | None, float | None]:
        """Watts now, or joules since the start."""
        if self._meter == "counters":
            return None, self._counted()
        if self._meter == "none":
            return None, None
        found = _gpu_watts(self._root, self._nvml) if self._meter == "gpu" else _rail_watts(self._root, self._run)
        if isinstance(found, Failed):
            self._note(found)
        return (found.value if isinstance(found, Reading) else None), None

    def _counted(self) -> float | None:
        found = rapl.counters(self._root)
        if not isinstance(found, Reading):
            if isinstance(found, Failed):
                self._note(found)
            return None
        if self._counters is not None:
            try:
                self._counted_j += rapl.used_j(self._counters, found.value)
            except ValueError:
                self._note(Failed("energy counters are of other packages than before"))
                return None
        self._counters = found.value
        return self._counted_j


def _meter(root: Path, run: Runner, with_gpu: bool) -> tuple[Meter, Reading[str] | Absent | Failed, str]:
    """Choose what to read once; the first of rails, counters and GPU that answers."""
    rails = power.power(root, run)
    if isinstance(rails, Reading) and isinstance(rails.value.total_w, Reading):
        return "rails", Reading(f"on-board sensor, {rails.source}", rails.source), rails.value.covers
    counters = rapl.counters(root)
    if isinstance(counters, Reading):
        return "counters", Reading("energy counters (RAPL)", counters.source), RAPL_COVERS
    gpu = _gpu_watts(root) if with_gpu else Absent("the meter of a GPU knows nothing of the processor")
    if isinstance(gpu, Reading):
        return "gpu", Reading("NVML", gpu.source), NVML_COVERS
    reasons: list[Reading[float] | Absent | Failed] = [gpu]
    if isinstance(rails, Reading):
        reasons.insert(0, rails.value.total_w)
    for found in (rails, counters, *reasons):
        if isinstance(found, Failed):
            return "none", found, ""
    unknown = [one for one in reasons if isinstance(one, Absent)]
    return "none", unknown[0] if len(unknown) > 1 else Absent("nothing on this board measures power"), ""


def _rail_watts(root: Path, run: Runner) -> Reading[float] | Absent | Failed:
    found = power.power(root, run)
    return found.value.total_w if isinstance(found, Reading) else found


def _gpu_watts(root: Path, nvml: Any = None) -> Reading[float] | Absent | Failed:
    """All GPUs together, by an NVML that is open if one is given; one GPU that does not answer leaves no sum."""
    if nvml is not None:
        return nvidia.watts(nvml)
    found = nvidia.gpus(root)
    if not isinstance(found, Reading):
        return found
    total = 0.0
    for gpu in found.value:
        if not isinstance(gpu.watts, Reading):
            return gpu.watts
        total += gpu.watts.value
    return Reading(total, "NVML") if found.value else Absent("NVML lists no GPU")
