"""The course of temperature, clocks and power, as a profile keeps it."""

from __future__ import annotations

from hwprofiles.sampler import Sample, Trace
from hwprofiles.samples import MAX_MOMENTS, Course, Moment


def course_of(trace: Trace, processor_share: float | None) -> Course:
    """The trace since its first sample, evenly thinned to 240 moments; the last one stays."""
    samples = trace.samples
    if len(samples) > MAX_MOMENTS:
        last = len(samples) - 1
        samples = tuple(samples[round(at * last / (MAX_MOMENTS - 1))] for at in range(MAX_MOMENTS))
    began_s = samples[0].at_mono_s if samples else 0.0
    before: Sample | None = None
    moments = []
    for one in samples:
        moments.append(
            Moment(
                at_s=round(one.at_mono_s - began_s, 3),
                celsius=one.celsius,
                clock_hz=one.clock_hz,
                gpu_clock_hz=one.gpu_clock_hz,
                watts=_watts(before, one),
            )
        )
        before = one
    return Course(
        interval_s=trace.interval_s,
        moments=tuple(moments),
        power=trace.power,
        covers=trace.covers[:1024],
        processor_share=processor_share,
    )


def _watts(before: Sample | None, now: Sample) -> float | None:
    """As it was read; where energy is counted, the mean since the moment before."""
    if now.watts is not None or before is None or now.counted_j is None or before.counted_j is None:
        return now.watts
    passed_s = now.at_mono_s - before.at_mono_s
    return max(0.0, (now.counted_j - before.counted_j) / passed_s) if passed_s > 0 else None
