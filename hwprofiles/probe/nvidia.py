"""NVIDIA GPUs by NVML. The library is loaded only where a driver is, so that other boards pay nothing for it.

Each field is a value, absent or failed by itself: on a Jetson NVML answers only a few, and kernel files the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

T = TypeVar("T")

DRIVER_TRACES: Final = ("proc/driver/nvidia/version", "dev/nvidiactl")

RECORDED: Final = "nvml.json"
"""What NVML answered, in a recorded tree."""

SLOWED_BY: Final = (
    (0x4, "power limit"),
    (0x8, "hardware slowdown"),
    (0x20, "thermal limit"),
    (0x40, "hardware thermal slowdown"),
    (0x80, "hardware power brake"),
)
"""Bits of NVML's reasons for a lower clock that slow a working GPU; idling and clocks set by the user are none."""

_CLOCK_GRAPHICS, _CLOCK_MEMORY = 0, 2
_SENSOR_GPU = 0


class Gpu(Struct, frozen=True, kw_only=True):
    """One GPU; on a Jetson NVML answers only some of it."""

    name: Reading[str] | Absent | Failed
    memory_bytes: Reading[int] | Absent | Failed
    memory_free_bytes: Reading[int] | Absent | Failed
    load: Reading[float] | Absent | Failed
    """Share of time in which any kernel ran, 0 to 1."""
    clock_hz: Reading[float] | Absent | Failed
    max_clock_hz: Reading[float] | Absent | Failed
    memory_clock_hz: Reading[float] | Absent | Failed
    celsius: Reading[float] | Absent | Failed
    watts: Reading[float] | Absent | Failed
    limit_w: Reading[float] | Absent | Failed
    energy_j: Reading[float] | Absent | Failed
    """Since the driver was loaded."""
    throttle: Reading[str] | Absent | Failed
    driver: Reading[str] | Absent | Failed


def gpus(root: Path, nvml: Any = None) -> Reading[tuple[Gpu, ...]] | Absent | Failed:
    """All GPUs that NVML lists. `nvml` is the pynvml module, loaded here if not given.

    Of a recorded tree, what NVML answered when it was recorded.
    """
    if not any(files.exists(root, trace) for trace in DRIVER_TRACES):
        return Absent("no NVIDIA driver")
    if nvml is None and root != Path("/"):
        return _recorded(root)
    library = opened(nvml)
    if not isinstance(library, Reading):
        return library
    nvml = library.value
    try:
        count = nvml.nvmlDeviceGetCount()
        return Reading(tuple(_gpu(nvml, number) for number in range(count)), "NVML")
    except nvml.NVMLError as error:
        return Failed(f"NVML: {error}")
    finally:
        nvml.nvmlShutdown()


def opened(nvml: Any = None) -> Reading[Any] | Absent | Failed:
    """The pynvml module with NVML open; whoever asked calls its nvmlShutdown when done. NVML counts: it may be open
    several times at once, and only the first costs anything."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")  # 6 MB that only boards with a driver should carry
        except ImportError:
            return Absent("a driver, but no nvidia-ml-py to ask it")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError_LibraryNotFound:
        return Absent("no NVML library")
    except nvml.NVMLError as error:
        return Failed(f"NVML: {error}")
    return Reading(nvml, "NVML")


def watts(nvml: Any) -> Reading[float] | Absent | Failed:
    """Power of all GPUs together, of an open NVML; nothing else is asked. One that does not answer leaves no sum."""
    try:
        count = nvml.nvmlDeviceGetCount()
        if count == 0:
            return Absent("NVML lists no GPU")
        handles = [nvml.nvmlDeviceGetHandleByIndex(number) for number in range(count)]
        return Reading(sum(_thousandth(nvml.nvmlDeviceGetPowerUsage(handle)) for handle in handles), "NVML")
    except nvml.NVMLError_NotSupported:
        return Absent("NVML: not supported by this GPU")
    except nvml.NVMLError as error:
        return Failed(f"NVML: {error}")


def _recorded(root: Path) -> Reading[tuple[Gpu, ...]] | Absent | Failed:
    said = files.text(root, RECORDED)
    if not isinstance(said, Reading):
        return Absent("NVML was not recorded") if isinstance(said, Absent) else said
    try:
        return msgspec.json.decode(said.value, type=Reading[tuple[Gpu, ...]] | Absent | Failed)
    except (msgspec.DecodeError, RecursionError) as error:
        return Failed(f"{RECORDED}: {error}")


def _gpu(nvml: Any, number: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(number)

    def field(name: str, use: Callable[[Any], T], *arguments: int) -> Reading[T] | Absent | Failed:
        """One answer of NVML; a field that this GPU or this library does not have is absent, the others still count."""
        ask = getattr(nvml, name, None)
        if ask is None:
            return Absent(f"NVML: this library has no {name}")
        try:
            return Reading(use(ask(handle, *arguments)), "NVML")
        except nvml.NVMLError_NotSupported:
            return Absent("NVML: not supported by this GPU")
        except nvml.NVMLError as error:
            return Failed(f"NVML: {error}")

    try:
        driver: Reading[str] | Absent | Failed = Reading(_as_text(nvml.nvmlSystemGetDriverVersion()), "NVML")
    except nvml.NVMLError as error:
        driver = Failed(f"NVML: {error}")
    return Gpu(
        name=field("nvmlDeviceGetName", _as_text),
        memory_bytes=field("nvmlDeviceGetMemoryInfo", lambda info: int(info.total)),
        memory_free_bytes=field("nvmlDeviceGetMemoryInfo", lambda info: int(info.free)),
        load=field("nvmlDeviceGetUtilizationRates", lambda rates: rates.gpu / 100),
        clock_hz=field("nvmlDeviceGetClockInfo", _hertz, _CLOCK_GRAPHICS),
        max_clock_hz=field("nvmlDeviceGetMaxClockInfo", _hertz, _CLOCK_GRAPHICS),
        memory_clock_hz=field("nvmlDeviceGetClockInfo", _hertz, _CLOCK_MEMORY),
        celsius=field("nvmlDeviceGetTemperature", float, _SENSOR_GPU),
        watts=field("nvmlDeviceGetPowerUsage", _thousandth),
        limit_w=field("nvmlDeviceGetEnforcedPowerLimit", _thousandth),
        energy_j=field("nvmlDeviceGetTotalEnergyConsumption", _thousandth),
        throttle=field("nvmlDeviceGetCurrentClocksThrottleReasons", slowed),
        driver=driver,
    )


def slowed(reasons: int) -> str:
    """0x24 -> 'power limit now, thermal limit now'; 'none' if nothing slows the GPU down."""
    return ", ".join(f"{name} now" for bit, name in SLOWED_BY if reasons & bit) or "none"


def _hertz(megahertz: int) -> float:
    return megahertz * 1e6


def _thousandth(value: int) -> float:
    """Milliwatts to watts, millijoules to joules."""
    return value / 1e3


def _as_text(name: str | bytes) -> str:
    """Older bindings give bytes."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name
