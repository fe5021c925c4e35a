"""NVIDIA GPUs by NVML. The library is loaded only where a driver is, so that other boards pay nothing for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from hwprofiles.probe import files
from hwprofiles.reading import Absent, Failed, Reading

T = TypeVar("T")

DRIVER_TRACES: Final = ("proc/driver/nvidia/version", "dev/nvidiactl")


class Gpu(NamedTuple):
    """One GPU; on a Jetson NVML answers only some of it."""

    name: Reading[str] | Absent | Failed
    memory_bytes: Reading[int] | Absent | Failed


def gpus(root: Path, nvml: Any = None) -> Reading[tuple[Gpu, ...]] | Absent | Failed:
    """All GPUs that NVML lists. `nvml` is the pynvml module, loaded here if not given.

    A recorded tree has no NVML: Absent.
    """
    if not any(files.exists(root, trace) for trace in DRIVER_TRACES):
        return Absent("no NVIDIA driver")
    if nvml is None:
        if root != Path("/"):
            return Absent("NVML can't be replayed")
        nvml = importlib.import_module("pynvml")  # 6 MB that only boards with a driver should carry
    try:
        nvml.nvmlInit()
    except nvml.NVMLError_LibraryNotFound:
        return Absent("no NVML library")
    except nvml.NVMLError as error:
        return Failed(f"NVML: {error}")
    try:
        count = nvml.nvmlDeviceGetCount()
        return Reading(tuple(_gpu(nvml, number) for number in range(count)), "NVML")
    except nvml.NVMLError as error:
        return Failed(f"NVML: {error}")
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, number: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(number)
    return Gpu(
        name=_field(nvml, lambda: _as_text(nvml.nvmlDeviceGetName(handle))),
        memory_bytes=_field(nvml, lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total)),
    )


def _field(nvml: Any, ask: Callable[[], T]) -> Reading[T] | Absent | Failed:
    """One answer of NVML; a field that this GPU does not have is absent, and the others still count."""
    try:
        return Reading(ask(), "NVML")
    except nvml.NVMLError_NotSupported:
        return Absent("NVML: not supported by this GPU")
    except nvml.NVMLError as error:
        return Failed(f"NVML: {error}")


def _as_text(name: str | bytes) -> str:
    """Older bindings give bytes."""
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name
