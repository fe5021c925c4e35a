"""Measuring: warm up, take samples until they agree, say why it stopped and whether the result may be believed.

This knows no model and no engine: whoever calls passes the thing that runs, and each step gives its own seconds (an
emulated board gives stretched ones). `estimate` turns times of shallow and deep stacks into the cost of one block and
the cost of one step; it is what the planner reads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from math import inf, isfinite, sqrt
from pathlib import Path
from time import perf_counter
from typing import Final, Literal, NamedTuple

import msgspec
from msgspec import Struct

from hwprofiles import stats
from hwprofiles.profile import ModuleMeasurement, ModuleTiming, Phase, Samples

Kind = Literal["block", "embedding", "head"]
Step = Callable[[], float]
"""Runs once and gives the seconds it took."""
Clock = Callable[[], float]
"""Monotonic seconds."""

DECODE_CONTEXTS: Final = (16, 256)
"""KV rows at which blocks are timed: a short and a long chat turn; the planner interpolates between them."""
BATCHES: Final = (2, 8)
"""Requests whose rows make one step, at the shorter context. A second row costs more than a third: kernels take
another way from two rows on, and from there to eight a step grows evenly (1.4, 1.9, 3.2 times one row with 2, 4, 8)."""
PREFILL_TOKENS: Final = (32, 128)
"""Rows at once in prefill: a chunk as it travels, and one large enough to show the asymptotic cost per row."""
STACKS: Final = (1, 6)
"""Depths at which blocks are timed: two suffice to separate block from step; 6 keeps the difference above noise."""
CONTRADICTION_RATIO: Final = 1.1
"""A step behind few rows that takes so many times as long as one behind many (intervals, not medians) was disturbed."""
SPREAD_RATIO: Final = 2.0
"""p90 over median above which a run is two populations (a quota, a neighbour), not one time with noise."""


class StopRule(Struct, frozen=True, kw_only=True):
    """When to stop sampling. Defaults suit steps of 0.1 ms to 1 s."""

    target: float = 0.05
    """Relative 95 % half-width of the median that is good enough."""
    min_samples: int = 12
    """Before `target` is asked for: the fewest among which drift can be seen."""
    max_samples: int = 200
    least_samples: int = 6
    """Taken even when the time budget is over: the fewest that give an interval of the median."""
    time_budget_s: float = 2.0
    give_up_s: float = 60.0
    """Stop here whatever was reached; with fewer than `least_samples` the run is invalid."""
    warmup_min: int = 2
    warmup_max: int = 10
    warmup_ratio: float = 1.1
    """Warm-up is over when the largest of the last three is at most so much times the smallest."""


def sample(step: Step, rule: StopRule, clock: Clock = perf_counter) -> Samples:
    """Warm up, then sample `step` until its median is known to `rule.target` without drift, or a budget is over.

    `step` gives seconds >= 0 (else ValueError); what it raises passes through. Budgets count time by `clock`.
    """
    warmup = _warm_up(step, rule, clock)
    started_s = clock()
    taken: list[float] = []
    while True:
        taken.append(_seconds(step))
        because = _why_stop(taken, clock() - started_s, rule)
        if because:
            break
    invalid = why_invalid(taken, rule)
    return Samples(
        samples_s=tuple(taken), warmup=warmup, stopped_because=because, valid=not invalid, invalid_because=invalid
    )


def _seconds(step: Step) -> float:
    seconds = step()
    if not (isfinite(seconds) and seconds >= 0):
        raise ValueError(f"a step took {seconds} s")
    return seconds


def _warm_up(step: Step, rule: StopRule, clock: Clock) -> int:
    """Run and drop steps until three in a row agree, or enough of them or of the time budget is spent; how many."""
    started_s = clock()
    dropped: list[float] = []
    while len(dropped) < rule.warmup_max:
        if len(dropped) >= rule.warmup_min and clock() - started_s > rule.time_budget_s / 2:
            break
        last = dropped[-3:]
        if len(dropped) >= max(3, rule.warmup_min) and max(last) <= rule.warmup_ratio * min(last):
            break
        dropped.append(_seconds(step))
    return len(dropped)


def _why_stop(taken: list[float], elapsed_s: float, rule: StopRule) -> str:
    """Say why sampling ends here; '' if it goes on."""
    count = len(taken)
    if count >= rule.min_samples and (count == rule.min_samples or count % 4 == 0):  # not at each: it costs time
        width = stats.relative_half_width(taken)
        moved = stats.drift(taken)
        if width is not None and width <= rule.target and not (moved and moved.found):
            return f"median known to {width:.1%} (95 %)"
    if count >= rule.max_samples:
        return f"{count} samples taken"
    if elapsed_s >= rule.time_budget_s and count >= rule.least_samples:
        return f"time budget of {rule.time_budget_s:g} s is over"
    if elapsed_s >= rule.give_up_s:
        return f"gave up after {rule.give_up_s:g} s"
    return ""


def why_invalid(taken: list[float], rule: StopRule) -> str:
    """Say why the run can't be believed; '' if it can. Drift and spread are judged only where samples suffice."""
    if len(taken) < rule.least_samples:
        return f"{len(taken)} samples, at least {rule.least_samples} are needed"
    moved = stats.drift(taken)
    if moved and moved.found:
        return f"drift: the last third took {moved.ratio:.2f} times as long as the first"
    middle, high = stats.median(taken), stats.percentile(taken, 0.9)
    if high is not None and high > SPREAD_RATIO * middle:
        return f"spread: p90 is {high / middle:.1f} times the median" if middle else "spread: the median is 0"
    return ""


class Point(NamedTuple):
    """What is timed: `tokens` rows at once with `context` rows in the KV cache before them. In prefill they are rows of
    one request, in decode one row of each of so many."""

    phase: Phase
    tokens: int
    context: int


class MeasurePlan(Struct, frozen=True, kw_only=True):
    """Each point is timed at each stack depth, shallow and deep in turn, so that slow changes of the board hit both."""

    points: tuple[Point, ...]
    stacks: tuple[int, ...]
    rule: StopRule = StopRule()
    retries: int = 1
    """How often a point whose run is invalid is measured again."""
    rounds: int = 1
    """Over all points. Of several runs of a point the quickest that is valid counts: what it takes when nobody
    disturbs."""


def plan_for(kind: Kind, stacks: tuple[int, ...] = (1,), rule: StopRule | None = None) -> MeasurePlan:
    """The default plan for a kind of module: decode 1 token, prefill 32 and 128, at two contexts if it has a KV cache;
    and a token of each of several requests. (Rows of an embedding are looked up one by one, whoever asks.)

    `stacks`: the depths that are offered; raise ValueError if there is none.
    """
    if not stacks or min(stacks) < 1:
        raise ValueError(f"no usable stack depth in {stacks}")
    contexts = DECODE_CONTEXTS if kind == "block" else (0,)
    points = [Point("decode", 1, context) for context in contexts]
    if kind != "embedding":
        points += [Point("decode", batch, contexts[0]) for batch in BATCHES]
    points += [Point("prefill", tokens, context) for tokens in PREFILL_TOKENS for context in contexts]
    return MeasurePlan(points=tuple(points), stacks=tuple(sorted(set(stacks))), rule=rule or StopRule())


Run = Callable[[Phase, int, int, int], Step]
"""(phase, tokens, context, stack) -> a step that can be repeated: it starts from the same context each time."""


def measure_module(
    key: str,
    kind: Kind,
    engine_name: str,
    threads: int,
    run: Run,
    plan: MeasurePlan,
    *,
    base_bytes: int,
    clock: Clock = perf_counter,
    held_bytes: Callable[[], int] | None = None,
) -> ModuleMeasurement:
    """Time one module at every point and depth of `plan`. What `run` and its steps raise passes through.

    `run` may load a stack when it is first asked for it; growth of the process's resident memory from just before the
    deepest stack is first asked for until it has made its first steps is reported as `resident_bytes`: what it holds,
    and nothing that larger steps need for a moment; that of the shallowest of several as `shallow_bytes`. `base_bytes`:
    resident memory of this process before any module was loaded, with an engine that has been started. `held_bytes`
    says what is resident behind the first steps, or was while they were made.
    """
    held_bytes = held_bytes or resident_bytes
    deepest, shallowest = max(plan.stacks), min(plan.stacks)
    taken: dict[tuple[Point, int], Samples] = {}
    grown: dict[int, int] = {}
    for point in plan.points:
        for stack in plan.stacks:
            before_bytes = resident_bytes()
            step = run(point.phase, point.tokens, point.context, stack)
            taken[point, stack] = _sampled_with_retries(step, plan, clock)
            if stack not in grown:
                grown[stack] = max(1, held_bytes() - before_bytes)  # 0 is what was not measured
    for _ in range(plan.rounds - 1):
        for point, stack in taken:
            step = run(point.phase, point.tokens, point.context, stack)
            taken[point, stack] = _quicker(taken[point, stack], _sampled_with_retries(step, plan, clock))
    _settle_depths(taken, run, plan, clock)
    _settle_contradictions(taken, run, plan, clock)
    timings = [
        ModuleTiming(phase=point.phase, tokens=point.tokens, context=point.context, stack=stack, samples=samples)
        for (point, stack), samples in taken.items()
    ]
    return ModuleMeasurement(
        key=key,
        kind=kind,
        engine=engine_name,
        threads=threads,
        timings=tuple(timings),
        resident_bytes=grown.get(deepest, 0),
        shallow_bytes=grown.get(shallowest, 0) if shallowest < deepest else 0,
        base_bytes=base_bytes,
    )


def contradict(shorter: Samples, longer: Samples) -> bool:
    """Did a step behind fewer rows take longer than one behind more, beyond chance and CONTRADICTION_RATIO?"""
    few, many = stats.median_interval(shorter.samples_s), stats.median_interval(longer.samples_s)
    return few is not None and many is not None and few[0] > many[1] * CONTRADICTION_RATIO


def _settle_depths(taken: dict[tuple[Point, int], Samples], run: Run, plan: MeasurePlan, clock: Clock) -> None:
    """More modules are more work: where the deepest stack took no longer than the shallowest, the board did something
    else meanwhile, and both are measured again. Who insists has no usable figures (`estimate`)."""
    shallow, deep = min(plan.stacks), max(plan.stacks)
    for point in plan.points if shallow < deep else ():
        for _ in range(plan.retries):
            few, many = taken[point, shallow].samples_s, taken[point, deep].samples_s
            if not few or not many or stats.median(few) <= stats.median(many):
                break
            for stack in (shallow, deep):
                taken[point, stack] = sample(run(point.phase, point.tokens, point.context, stack), plan.rule, clock)


def _settle_contradictions(taken: dict[tuple[Point, int], Samples], run: Run, plan: MeasurePlan, clock: Clock) -> None:
    """More rows in the cache are never less work: what says otherwise is measured again, then invalid if it insists."""
    for (point, stack), other in [(a, b) for a in taken for b in taken if _same_but_longer(a, b)]:
        longer = taken[other]
        for _ in range(plan.retries):
            if not contradict(taken[point, stack], longer):
                break
            taken[point, stack] = sample(run(point.phase, point.tokens, point.context, stack), plan.rule, clock)
        samples = taken[point, stack]
        if samples.valid and contradict(samples, longer):
            because = f"took longer behind {point.context} rows than behind {other[0].context}: the board was busy"
            taken[point, stack] = msgspec.structs.replace(samples, valid=False, invalid_because=because)


def _same_but_longer(one: tuple[Point, int], other: tuple[Point, int]) -> bool:
    (point, stack), (more, its_stack) = one, other
    return stack == its_stack and point[:2] == more[:2] and point.context < more.context


def _sampled_with_retries(step: Step, plan: MeasurePlan, clock: Clock) -> Samples:
    samples = sample(step, plan.rule, clock)
    for _ in range(plan.retries):
        if samples.valid:
            break
        samples = sample(step, plan.rule, clock)
    return samples


def _quicker(one: Samples, other: Samples) -> Samples:
    """What is valid rather than what is not; else what took less."""
    return min(one, other, key=lambda run: (not run.valid, stats.median(run.samples_s or (inf,))))


def resident_bytes() -> int:
    """Resident memory of this process, as the kernel counts it."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> None:
    """From now on `peak_bytes` tells of what comes."""
    with contextlib.suppress(OSError):  # older kernels, and containers that keep it from their processes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The most resident memory of this process, since `forget_peak` if the kernel lets it forget."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resident_bytes()


class StepEstimate(Struct, frozen=True, kw_only=True):
    """Cost at one point: a step through k modules takes about overhead_s + k * block_s. Intervals hold at 95 %."""

    phase: Phase
    tokens: int
    context: int
    block_s: float
    block_low_s: float
    block_high_s: float
    overhead_s: float
    overhead_high_s: float
    valid: bool
    because: str
    """How it was derived; for an invalid one, why it must not be used."""


class ModuleEstimate(Struct, frozen=True, kw_only=True):
    key: str
    kind: Kind
    engine: str
    threads: int
    steps: tuple[StepEstimate, ...]

    def at(self, phase: Phase, tokens: int) -> tuple[StepEstimate, ...]:
        """The valid estimates of one phase and number of rows, by rising context; empty if there is none."""
        found = [step for step in self.steps if step.valid and step.phase == phase and step.tokens == tokens]
        return tuple(sorted(found, key=lambda step: step.context))


def estimate(measurement: ModuleMeasurement) -> ModuleEstimate:
    """Separate the cost of a block from the cost of a step, at each point that was timed.

    With depths a < b: block_s = (t_b - t_a) / (b - a) and overhead_s = max(0, t_a - a * block_s), from medians. With
    one depth a: block_s = t_a / a and overhead 0, and `because` says so. Works on whatever a peer sent: points that
    give no positive cost are invalid, with the reason.
    """
    by_point: dict[Point, list[ModuleTiming]] = {}
    for timing in measurement.timings:
        by_point.setdefault(Point(timing.phase, timing.tokens, timing.context), []).append(timing)
    return ModuleEstimate(
        key=measurement.key,
        kind=measurement.kind,
        engine=measurement.engine,
        threads=measurement.threads,
        steps=tuple(_step_estimate(point, timings) for point, timings in by_point.items()),
    )


class _Depth(NamedTuple):
    stack: int
    middle_s: float
    half_s: float


def _step_estimate(point: Point, timings: list[ModuleTiming]) -> StepEstimate:
    usable = sorted((t for t in timings if t.samples.samples_s and t.stack >= 1), key=lambda t: t.stack)
    if not usable:
        return _no_estimate(point, "no samples")
    shallow, deep = _depth(usable[0]), _depth(usable[-1])
    if shallow.stack == deep.stack:
        block_s, half_s = shallow.middle_s / shallow.stack, shallow.half_s / shallow.stack
        overhead_s = overhead_half_s = 0.0
        because = f"one depth of {shallow.stack}: the cost of a step is counted into the module"
    else:
        between = deep.stack - shallow.stack
        block_s = (deep.middle_s - shallow.middle_s) / between
        half_s = sqrt(deep.half_s**2 + shallow.half_s**2) / between  # independent runs: variances add
        overhead_s = max(0.0, shallow.middle_s - shallow.stack * block_s)
        overhead_half_s = sqrt(shallow.half_s**2 + (shallow.stack * half_s) ** 2)
        because = f"depths {shallow.stack} and {deep.stack}"
    if block_s <= 0:
        return _no_estimate(point, f"{deep.stack} stacked took no longer than {shallow.stack}")
    invalid = [t for t in (usable[0], usable[-1]) if not t.samples.valid]
    if invalid:
        because = f"depth {invalid[0].stack}: {invalid[0].samples.invalid_because or 'marked invalid'}"
    return StepEstimate(
        phase=point.phase,
        tokens=point.tokens,
        context=point.context,
        block_s=block_s,
        block_low_s=max(0.0, block_s - half_s),
        block_high_s=block_s + half_s,
        overhead_s=overhead_s,
        overhead_high_s=overhead_s + overhead_half_s,
        valid=not invalid,
        because=because,
    )


def _depth(timing: ModuleTiming) -> _Depth:
    """Median and half-width of one run; with too few samples for an interval, their whole range."""
    values = timing.samples.samples_s
    low, high = stats.median_interval(values) or (min(values), max(values))
    return _Depth(timing.stack, stats.median(values), (high - low) / 2)


def _no_estimate(point: Point, because: str) -> StepEstimate:
    return StepEstimate(
        phase=point.phase,
        tokens=point.tokens,
        context=point.context,
        block_s=0.0,
        block_low_s=0.0,
        block_high_s=0.0,
        overhead_s=0.0,
        overhead_high_s=0.0,
        valid=False,
        because=because,
    )
