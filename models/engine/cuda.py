"""Memory of an NVIDIA GPU, through the driver's own library: it is there wherever a GPU works, and needs no package.

TensorRT and onnxruntime use the device's primary context; so does this. All that is queued goes through one stream.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, Final

import numpy as np

from models.engine.base import Array, EngineFailed

LIBRARY: Final = "libcuda.so.1"

_NON_BLOCKING: Final = 1
"""CU_STREAM_NON_BLOCKING: it does not wait for the default stream."""
_DEVICE_MEMORY: Final = 2
"""CU_MEMORYTYPE_DEVICE."""
_MULTIPROCESSORS: Final = 16
_MAJOR: Final = 75
_MINOR: Final = 76
"""CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, .._COMPUTE_CAPABILITY_MAJOR and _MINOR."""


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D_v2."""

    _fields_ = (
        *(
            (f"src_{name}", kind)
            for name, kind in (("x", ctypes.c_size_t), ("y", ctypes.c_size_t), ("type", ctypes.c_int))
        ),
        *((f"src_{name}", kind) for name, kind in (("host", ctypes.c_void_p), ("device", ctypes.c_uint64))),
        *((f"src_{name}", kind) for name, kind in (("array", ctypes.c_void_p), ("pitch", ctypes.c_size_t))),
        *(
            (f"dst_{name}", kind)
            for name, kind in (("x", ctypes.c_size_t), ("y", ctypes.c_size_t), ("type", ctypes.c_int))
        ),
        *((f"dst_{name}", kind) for name, kind in (("host", ctypes.c_void_p), ("device", ctypes.c_uint64))),
        *((f"dst_{name}", kind) for name, kind in (("array", ctypes.c_void_p), ("pitch", ctypes.c_size_t))),
        *(("width", ctypes.c_size_t), ("height", ctypes.c_size_t)),
    )


class CudaMemory:
    """See models.engine.device.Memory. `driver` is the loaded library."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._lent: list[Array] = []
        """What copies that are queued read from."""
        self._call("cuInit", 0)
        device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self._stream = stream
        self._device = device
        self._taken: list[int] = []
        # A stage that could not be loaded here is loaded elsewhere, and on a Jetson that needs the same memory.
        weakref.finalize(self, _give_back, driver, self._taken).atexit = False

    @classmethod
    def open(cls) -> CudaMemory:
        """Of the first GPU. Raises EngineFailed if there is none."""
        try:
            return cls(ctypes.CDLL(LIBRARY))
        except (OSError, AttributeError) as error:
            raise EngineFailed(f"no CUDA driver: {error}") from error

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return self._stream.value or 0

    @property
    def device_name(self) -> str:
        """'Orin, compute capability 8.7, 8 multiprocessors': boards that differ in it need engines of their own."""
        name = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", name, 256, self._device)
        major, minor, count = (self._attribute(which) for which in (_MAJOR, _MINOR, _MULTIPROCESSORS))
        said = name.value.decode("utf-8", "replace")
        return f"{said}, compute capability {major}.{minor}, {count} multiprocessors"

    @property
    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def take(self, size_bytes: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        self._taken.append(address.value)
        self.clear(address.value, size_bytes)
        return address.value

    def clear(self, address: int, size_bytes: int) -> None:
        size = ctypes.c_size_t(size_bytes)
        self._call("cuMemsetD8Async", ctypes.c_uint64(address), ctypes.c_ubyte(0), size, self._stream)

    def write(self, address: int, given: Array) -> None:
        # A copy of pageable memory may still be read when the call returns.
        lent = np.array(given, order="C", copy=True)
        self._lent.append(lent)
        host, size = ctypes.c_void_p(lent.ctypes.data), ctypes.c_size_t(lent.nbytes)
        self._call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(address), host, size, self._stream)

    def read(self, address: int, into: Array) -> None:
        host, size = ctypes.c_void_p(into.ctypes.data), ctypes.c_size_t(into.nbytes)
        self._call("cuMemcpyDtoHAsync_v2", host, ctypes.c_uint64(address), size, self._stream)

    def copy_rows(self, to: int, to_pitch: int, given: int, pitch: int, width: int, count: int) -> None:
        copy = _Copy2D(
            src_type=_DEVICE_MEMORY, src_device=given, src_pitch=pitch,
            dst_type=_DEVICE_MEMORY, dst_device=to, dst_pitch=to_pitch,
            width=width, height=count,
        )  # fmt: skip
        self._call("cuMemcpy2DAsync_v2", ctypes.byref(copy), self._stream)

    def wait(self) -> None:
        self._call("cuStreamSynchronize", self._stream)
        self._lent.clear()

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), which, self._device)
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._driver, function)(*arguments)
        if code:
            words = ctypes.c_char_p()
            self._driver.cuGetErrorString(code, ctypes.byref(words))
            said = (words.value or b"").decode("utf-8", "replace")
            raise EngineFailed(f"CUDA: {function}: {said or 'error'} ({code})")


def _give_back(driver: Any, taken: list[int]) -> None:
    """Free memory that nobody computes with any more; cuMemFree waits for what was queued."""
    for address in taken:
        driver.cuMemFree_v2(ctypes.c_uint64(address))
