"""Profiles made up for tests: no board ever measured these figures."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from hwprofiles.profile import (
    Conditions,
    Cores,
    Identity,
    Interface,
    LinkMeasurement,
    Memory,
    ModuleMeasurement,
    ModuleTiming,
    Phase,
    Profile,
    Samples,
    Snapshot,
)
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.samples import Ceilings, Coding, Codings, DiskMeasurement, Rate

NO_QUOTA = Absent(because="no control group limits processor time")


def samples(middle_s: float, count: int = 30, spread: float = 0.02, **fields: Any) -> Samples:
    """Steady samples around a median, without drift."""
    values = tuple(middle_s * (1 + spread * ((at * 7) % 11 - 5) / 5) for at in range(count))
    return Samples(samples_s=values, warmup=3, stopped_because="median known to 1.0% (95 %)", **fields)


def timing(
    middle_s: float, phase: Phase = "decode", tokens: int = 1, context: int = 16, stack: int = 1
) -> ModuleTiming:
    return ModuleTiming(phase=phase, tokens=tokens, context=context, stack=stack, samples=samples(middle_s))


def module(kind: Literal["block", "embedding", "head"], *timings: ModuleTiming) -> ModuleMeasurement:
    return ModuleMeasurement(
        key=f"llama/576/{kind}/q4/f32",
        kind=kind,
        engine="onnxruntime 1.31.1 CPUExecutionProvider",
        threads=1,
        timings=timings,
        resident_bytes=24 * 1024 * 1024,
        base_bytes=61 * 1024 * 1024,
    )


def link() -> LinkMeasurement:
    return LinkMeasurement(
        broker="mqtt://10.0.0.5:1883",
        round_trip_payload_bytes=1200,
        round_trip=samples(0.0012),
        goodput_payload_bytes=524288,
        goodput_chunk_bytes=65536,
        goodput=samples(0.0514, count=5),
    )


def ceilings(**changes: Any) -> Ceilings:
    """A board that reads 10 GB/s and multiplies 40 (float) and 80 (4 bit) 10^9 times a second."""
    size = 16 * 2**20
    made = Ceilings(
        threads=1,
        memory=(
            Rate(what="read", amount=size, samples=samples(size / 10e9)),
            Rate(what="copy", amount=2 * size, samples=samples(2 * size / 8e9)),
            Rate(what="add", amount=3 * size, samples=samples(3 * size / 9e9)),
        ),
        array_bytes=size,
        cache_bytes=2 * 2**20,
        products=(
            Rate(what="f32", amount=268435456, samples=samples(268435456 / 40e9)),
            Rate(what="int4", amount=268435456, samples=samples(268435456 / 80e9)),
        ),
        engine="onnxruntime 1.31.1 CPUExecutionProvider",
    )
    return msgspec.structs.replace(made, **changes)


def codings(row_s: float = 2e-5, more_s: float = 1e-7, **changes: Any) -> Codings:
    """Both int8 codecs of float16 rows of 1000: so long for one, and so much longer for each number more."""
    made = Codings(
        width=1000,
        timings=tuple(
            Coding(codec=codec, wire_dtype="f16", rows=rows, samples=samples(row_s + (rows - 1) * 1000 * more_s))
            for codec in ("int8-group", "int8-token")
            for rows in (1, 64)
        ),
    )
    return msgspec.structs.replace(made, **changes)


def disk(**changes: Any) -> DiskMeasurement:
    """An SD card: 20 MB/s to it, 80 from it."""
    made = DiskMeasurement(
        folder="/var/lib/edgelam/artifacts",
        filesystem="ext4",
        chunk_bytes=2 * 2**20,
        write=samples(2 * 2**20 / 20e6, count=8),
        read=samples(2 * 2**20 / 80e6, count=8),
    )
    return msgspec.structs.replace(made, **changes)


def conditions(**changes: Any) -> Conditions:
    held = Conditions(
        software="0.1.0",
        python="3.11.7",
        engine_versions={"onnxruntime": "1.31.1"},
        kernel="6.12.0",
        affinity=(0, 1, 2, 3),
        quota_cores=NO_QUOTA,
        quota_period_s=NO_QUOTA,
        governor=Reading("ondemand", "/sys/devices/system/cpu/cpufreq"),
        clock_hz_before=Reading(1.5e9, "/sys/devices/system/cpu/cpufreq"),
        clock_hz_after=Reading(2.4e9, "/sys/devices/system/cpu/cpufreq"),
        temperature_c_before=Reading(48.0, "thermal_zone0 cpu-thermal"),
        temperature_c_after=Reading(61.5, "thermal_zone0 cpu-thermal"),
        throttle_before=Reading("0x0: none", "vcgencmd get_throttled"),
        throttle_after=Failed("vcgencmd get_throttled: no answer within 2 s"),
        load_before=0.1,
        load_after=0.9,
        allow_spinning=False,
        timer="clock_gettime(CLOCK_MONOTONIC), resolution 1e-09 s",
        measured_at_unix=1_790_000_000.0,
        duration_s=21.5,
    )
    return msgspec.structs.replace(held, **changes)


def snapshot(**changes: Any) -> Snapshot:
    """Today's conditions, equal to those of `conditions` in everything that sets the speed."""
    then = conditions()
    now = Snapshot(
        software=then.software,
        python=then.python,
        engine_versions=then.engine_versions,
        kernel=then.kernel,
        affinity=then.affinity,
        quota_cores=then.quota_cores,
        quota_period_s=then.quota_period_s,
        governor=then.governor,
        clock_hz=then.clock_hz_before,
        temperature_c=Reading(70.0, "thermal_zone0 cpu-thermal"),
        throttle=then.throttle_before,
        load=3.0,
        timer=then.timer,
        at_unix=then.measured_at_unix + 60,
        at_mono_s=1000.0,
    )
    return msgspec.structs.replace(now, **changes)


def profile(**changes: Any) -> Profile:
    block = module(
        "block",
        timing(0.0030, stack=1),
        timing(0.0155, stack=6),
        timing(0.0034, context=256, stack=1),
        timing(0.0179, context=256, stack=6),
        timing(0.0250, phase="prefill", tokens=32, stack=1),
        ModuleTiming(
            phase="prefill",
            tokens=32,
            context=16,
            stack=6,
            samples=Samples(
                samples_s=tuple(0.14 + 0.004 * at for at in range(15)),
                warmup=10,
                stopped_because="time budget of 2 s is over",
                valid=False,
                invalid_because="drift: the last third took 1.27 times as long as the first",
            ),
        ),
    )
    made = Profile(
        source="live",
        emulation="",
        identity=Identity(
            device="pi5",
            board=Reading("Raspberry Pi 5 Model B Rev 1.0", "/proc/device-tree/model"),
            cpu=Reading("Cortex-A76 (0x41/0xd0b)", "/proc/cpuinfo"),
            arch="aarch64",
            os=Reading("Debian GNU/Linux 13 (trixie)", "/etc/os-release"),
            accelerators=Absent("no NVIDIA driver"),
            interfaces=(
                Interface(
                    name="eth0",
                    addresses=("10.0.0.7",),
                    wireless=False,
                    link_bits_per_s=Reading(1e9, "/sys/class/net/eth0/speed"),
                ),
            ),
        ),
        memory=Memory(
            total_bytes=Reading(8 * 1024**3, "/proc/meminfo"),
            available_bytes=Reading(7 * 1024**3, "/proc/meminfo"),
            limit_bytes=Absent("no control group limits memory"),
            usable_bytes=7 * 1024**3,
            unified=False,
        ),
        cores=Cores(online=4, allowed=4, usable=4.0, because="4 allowed of 4 online"),
        conditions=conditions(),
        engines={"onnxruntime": Reading("1.31.1", "/opt/edgelam"), "torch": Absent("torch is not installed")},
        modules=(block, module("embedding", timing(0.00002, context=0)), module("head", timing(0.008, context=0))),
        link=link(),
    )
    return msgspec.structs.replace(made, **changes)
