"""Raw samples, and the parts of a profile that are made of them besides modules and link: ceilings, disk, heat, energy.

All of them cross the network, so numbers and lengths have bounds.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from hwprofiles.reading import Absent, Failed, Reading

Phase = Literal["decode", "prefill"]

Seconds = Annotated[float, Meta(ge=0, le=1e6)]
"""A measured time. 1e6 s (11 days) is longer than anything measured; sums of them can't overflow."""
Count = Annotated[int, Meta(ge=0, le=2**53)]
Text = Annotated[str, Meta(max_length=1024)]
Amount = Annotated[float, Meta(ge=0, le=1e15)]

MAX_SAMPLES: Final = 2048
"""Samples of one run that a reader takes."""
MAX_MOMENTS: Final = 240
"""Moments of a course that are kept: a plot shows no more, and a profile has at most 200 KB."""


class Samples(Struct, frozen=True, kw_only=True):
    """Raw samples in seconds, in the order taken, and why sampling stopped. Percentiles are computed, not stored."""

    samples_s: Annotated[tuple[Seconds, ...], Meta(max_length=MAX_SAMPLES)]
    warmup: Count
    stopped_because: Text
    valid: bool = True
    invalid_because: Text = ""
    taken: Count = 0
    """How many were taken, if only an even selection of them was kept; 0 if all were."""


class Rate(Struct, frozen=True, kw_only=True):
    """Something that takes `amount` bytes, or operations, each time."""

    what: Annotated[str, Meta(max_length=64)]
    """'read', 'copy', 'add': passes over memory; 'f32', 'int4': products of matrices."""
    amount: Annotated[int, Meta(ge=1, le=2**53)]
    samples: Samples


class Ceilings(Struct, frozen=True, kw_only=True, tag="measured"):
    """What memory and arithmetic of the board give at best, with as many threads as the engine has."""

    threads: Count
    memory: Annotated[tuple[Rate, ...], Meta(max_length=8)]
    """Bytes that a pass over arrays reads and writes; the arrays don't fit into the last cache."""
    array_bytes: Count
    cache_bytes: Count
    """Size of the last cache as the kernel tells it; 0 if it does not."""
    products: Annotated[tuple[Rate, ...], Meta(max_length=8)]
    """Operations (a multiplication and an addition are two) of a product of matrices in the engine."""
    engine: Text
    without: Annotated[dict[Text, Text], Meta(max_length=16)] = {}
    """What could not be measured, and why."""


class DiskMeasurement(Struct, frozen=True, kw_only=True, tag="measured"):
    """The disk under the cache folder, with a file that had no name and is gone."""

    folder: Text
    filesystem: Text
    chunk_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    write: Samples
    """Seconds until a chunk is on the disk (fdatasync)."""
    read: Samples
    """Seconds to read a chunk that the kernel was told to forget. Caches of a controller or host are not seen."""


class Coding(Struct, frozen=True, kw_only=True):
    """Seconds to turn rows of hidden states into the form of a codec and back."""

    codec: Annotated[str, Meta(max_length=64)]
    wire_dtype: Annotated[str, Meta(max_length=64)]
    """The model's own form at its cuts."""
    rows: Annotated[int, Meta(ge=1, le=2**20)]
    samples: Samples


class Codings(Struct, frozen=True, kw_only=True, tag="measured"):
    """What the codecs of cuts take on the board, on one thread, in rows of `width` numbers."""

    width: Annotated[int, Meta(ge=1, le=2**20)]
    timings: Annotated[tuple[Coding, ...], Meta(max_length=64)]


class Moment(Struct, frozen=True, array_like=True):
    """None: not known at that moment."""

    at_s: Seconds
    """Since the course began."""
    celsius: Annotated[float, Meta(ge=-300, le=2000)] | None = None
    clock_hz: Amount | None = None
    gpu_clock_hz: Amount | None = None
    watts: Annotated[float, Meta(ge=0, le=1e6)] | None = None


class Course(Struct, frozen=True, kw_only=True, tag="measured"):
    """Temperature, clocks and power over time."""

    interval_s: Seconds
    moments: Annotated[tuple[Moment, ...], Meta(max_length=MAX_MOMENTS)]
    power: Reading[str] | Absent | Failed
    """What was read for it, or why nothing was."""
    covers: Text = ""
    """What the power is of."""
    processor_share: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Share of the processor that everything else on the machine used meanwhile."""


class EnergyRun(Struct, frozen=True, kw_only=True):
    """Steps without a pause, and the energy that they took, idle included."""

    key: Text
    phase: Phase
    tokens: Annotated[int, Meta(ge=1, le=2**20)]
    context: Count
    stack: Annotated[int, Meta(ge=1, le=1024)]
    steps: Annotated[int, Meta(ge=1, le=2**31)]
    duration_s: Seconds
    joules: Reading[float] | Absent | Failed


class EnergyMeasurement(Struct, frozen=True, kw_only=True, tag="measured"):
    """Taken in a pass of its own, since asking for power may cost a process each time."""

    meter: Text
    covers: Text
    idle_w: Reading[float] | Absent | Failed
    runs: Annotated[tuple[EnergyRun, ...], Meta(max_length=16)]


class Window(Struct, frozen=True, array_like=True):
    """A part of a sustained run: so many steps, their median time."""

    end_s: Seconds
    """Since the run began."""
    steps: Annotated[int, Meta(ge=1, le=2**31)]
    step_s: Seconds
    celsius: Annotated[float, Meta(ge=-300, le=2000)] | None = None
    clock_hz: Amount | None = None
    throttled: bool | None = None
    """None: no one could say."""


class Sustained(Struct, frozen=True, kw_only=True, tag="measured"):
    """The same step over and over for minutes: how fast a board is that has become as hot as it gets."""

    key: Text
    engine: Text
    threads: Count
    phase: Phase
    tokens: Annotated[int, Meta(ge=1, le=2**20)]
    context: Count
    stack: Annotated[int, Meta(ge=1, le=1024)]
    asked_s: Seconds
    windows: Annotated[tuple[Window, ...], Meta(max_length=MAX_MOMENTS)]
    measured_at_unix: Annotated[float, Meta(ge=0, le=1e12)]
    throttling: Reading[str] | Absent | Failed
    """As it was at the end; absent: only the speed tells."""
    processor_share: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Share of the processor that everything else on the machine used meanwhile."""
