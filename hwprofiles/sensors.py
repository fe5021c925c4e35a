"""What a board's sensors say, as lines of 'item', 'value': each value with its source or with why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hwprofiles.board import Board
from hwprofiles.plain import clean
from hwprofiles.probe import clocks, jetson, nvidia, power
from hwprofiles.probe.proof import Proof
from hwprofiles.profile import Interface, Snapshot
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.survey import Survey
from wire.units import bytes_text

T = TypeVar("T")


def said(reading: Reading[T] | Absent | Failed, show: Callable[[T], str] = str) -> str:
    """'61.5 C  (thermal_zone0 cpu-thermal)', 'absent: why' or 'FAILED: why'."""
    if isinstance(reading, Reading):
        return clean(f"{show(reading.value)}  ({reading.source})")
    return clean(f"{'absent' if isinstance(reading, Absent) else 'FAILED'}: {reading.because}")


def survey_lines(survey: Survey) -> tuple[tuple[str, str], ...]:
    identity, memory = survey.identity, survey.memory
    shared = ", shared with the GPU" if memory.unified else ""
    return (
        ("board", said(identity.board)),
        ("processor", said(identity.cpu)),
        ("system", f"{said(identity.os)}, {clean(identity.arch)}"),
        ("gpu", said(identity.accelerators, "; ".join)),
        ("modes", said(identity.power_modes, ", ".join)),
        ("cores", clean(f"{survey.cores.usable:g}  ({survey.cores.because})")),
        ("memory", f"{said(memory.total_bytes, bytes_text)}{shared}"),
        ("limit", said(memory.limit_bytes, bytes_text)),
        *((f"engine {clean(name)}", said(found)) for name, found in sorted(survey.engines.items())),
        *((f"net {clean(one.name)}", _interface(one)) for one in identity.interfaces),
    )


def _interface(found: Interface) -> str:
    kind = "wireless" if found.wireless else "wired or virtual"
    return f"{kind}, {said(found.link_bits_per_s, _rate)}"


def _rate(bits_per_s: float) -> str:
    return f"{bits_per_s / 1e6:.0f} Mbit/s negotiated"


def proof_lines(proofs: dict[str, Reading[Proof] | Absent | Failed]) -> tuple[str, ...]:
    """One for each provider or device of each engine."""
    found = []
    for engine, proof in sorted(proofs.items()):
        if not isinstance(proof, Reading):
            found.append(clean(f"{engine}: {said(proof)}"))
            continue
        for way, because in proof.value.ways.items():
            outcome = f"FAILED: {because}" if because else "starts" if engine == "tensorrt" else "right result"
            found.append(clean(f"{engine} {proof.value.version} on {way}: {outcome}"))
    return tuple(found)


def condition_lines(found: Snapshot) -> tuple[tuple[str, str], ...]:
    """What `Board` does not have."""
    return (
        ("kernel", clean(found.kernel)),
        ("quota", said(found.quota_cores, lambda cores: f"{cores:g} cores")),
    )


def lines(board: Board) -> tuple[tuple[str, str], ...]:
    """Everything that was asked, also what is absent: for a bug report that is half of the answer."""
    found = [
        ("known as", said(board.known, lambda known: f"{known.name} [{known.raw}]")),
        ("governor", said(board.governor)),
        ("clock", said(board.clocks, _clocks)),
        ("mode", said(board.power_mode, _mode)),
        ("hottest", said(board.hottest_c, _degrees)),
        *((f"zone {clean(zone.kind)}", said(zone.celsius, _degrees)) for zone in board.zones),
        ("throttled", said(board.throttle)),
        ("supply", said(board.under_voltage, lambda low: "under-voltage" if low else "no under-voltage")),
        ("power", said(board.power, _power)),
        ("energy", said(board.energy_counters, lambda all_of: ", ".join(counter.name for counter in all_of))),
        ("gpu clock", said(board.tegra_gpu, _gpu_clock)),
        ("stats", said(board.tegrastats, lambda stats: "read" if not stats.unknown else _unknown(stats.unknown))),
    ]
    if not isinstance(board.gpus, Reading):
        return (*found, ("nvidia", said(board.gpus)))
    return (*found, *(("nvidia", clean(_gpu(gpu))) for gpu in board.gpus.value))


def _degrees(celsius: float) -> str:
    return f"{celsius:.1f} C"


def _clocks(found: clocks.Clocks) -> str:
    return f"{found.current_hz / 1e6:.0f} MHz of {found.min_hz / 1e6:.0f} to {found.max_hz / 1e6:.0f}"


def _mode(mode: jetson.PowerMode) -> str:
    return mode.name if mode.number is None else f"{mode.name} [{mode.number}]"


def _power(found: power.Power) -> str:
    rails = ", ".join(f"{name} {watts:.2f} W" for name, watts in found.rails_w.items())
    if isinstance(found.total_w, Reading):
        return f"{found.total_w.value:.2f} W: {found.covers} [{rails}]"
    return f"no total: {found.total_w.because} [{rails}]"


def _gpu_clock(gpu: jetson.GpuClock) -> str:
    load = "" if gpu.load is None else f", {gpu.load:.0%} busy"
    return f"{gpu.current_hz / 1e6:.0f} MHz of {gpu.min_hz / 1e6:.0f} to {gpu.max_hz / 1e6:.0f}{load}"


def _unknown(words: tuple[str, ...]) -> str:
    return f"read, but for {len(words)} unknown words: {' '.join(words[:8])}"


def _gpu(gpu: nvidia.Gpu) -> str:
    """Only what it answers: on a Jetson that is little."""
    parts: list[str] = [gpu.name.value if isinstance(gpu.name, Reading) else "GPU of unknown name"]
    if isinstance(gpu.driver, Reading):
        parts.append(f"driver {gpu.driver.value}")
    if isinstance(gpu.memory_bytes, Reading):
        parts.append(bytes_text(gpu.memory_bytes.value))
    if isinstance(gpu.clock_hz, Reading):
        parts.append(f"{gpu.clock_hz.value / 1e6:.0f} MHz")
    if isinstance(gpu.celsius, Reading):
        parts.append(f"{gpu.celsius.value:.0f} C")
    if isinstance(gpu.watts, Reading):
        parts.append(f"{gpu.watts.value:.1f} W")
    if isinstance(gpu.throttle, Reading):
        parts.append(f"slowed by: {gpu.throttle.value}")
    return ", ".join(parts)
