"""Memory in which an engine computes, and what executes a graph there; this machine's own is one of them.

Addresses are plain numbers, as CUDA and onnxruntime take them. Copies are queued in order; `wait` waits for all.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np

from models.engine.base import Array, EngineFailed

ALIGNMENT_BYTES: Final = 256
"""What TensorRT wants of every tensor's address."""


class At(NamedTuple):
    """A tensor: where it is, its shape, and its type as in models.engine.manifest ('i32' besides)."""

    address: int
    shape: tuple[int, ...]
    dtype: str


class Memory(Protocol):
    """All raise EngineFailed."""

    def take(self, size_bytes: int) -> int:
        """Zeroed memory, aligned to ALIGNMENT_BYTES; it is kept as long as the object."""

    def clear(self, address: int, size_bytes: int) -> None: ...

    def write(self, address: int, given: Array) -> None:
        """From the host; `given` may be used again at once."""

    def read(self, address: int, into: Array) -> None:
        """To the host, when all that was queued is done."""

    def copy_rows(self, to: int, to_pitch: int, given: int, pitch: int, width: int, count: int) -> None:
        """`count` pieces of `width` bytes, the next ones so many bytes further on either side."""

    def wait(self) -> None: ...


class Executor(Protocol):
    """A loaded graph of models.build.standard."""

    memory: Memory
    name: str
    """As StageEngine.name."""

    @property
    def held_bytes(self) -> int:
        """Weights, and what the executor needs to compute."""

    def run(self, given: Mapping[str, At], results: Mapping[str, At]) -> None:
        """Queue one execution behind what was queued before; raises EngineFailed."""


class Limits(NamedTuple):
    """The shapes that a stage runs: one request with 1 to `rows` rows, and one row of each of `slots` requests."""

    rows: int
    logits_rows: int
    slots: int
    context: int


class HostMemory:
    """This machine's memory, for executors on its processors."""

    def __init__(self) -> None:
        self._kept: list[Array] = []

    def take(self, size_bytes: int) -> int:
        try:
            memory = np.zeros(size_bytes + ALIGNMENT_BYTES, np.uint8)
        except (MemoryError, ValueError) as error:
            raise EngineFailed(f"no memory for {size_bytes} bytes: {error}") from error
        self._kept.append(memory)
        return -(-memory.ctypes.data // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def clear(self, address: int, size_bytes: int) -> None:
        ctypes.memset(address, 0, size_bytes)

    def write(self, address: int, given: Array) -> None:
        ctypes.memmove(address, np.ascontiguousarray(given).ctypes.data, given.nbytes)

    def read(self, address: int, into: Array) -> None:
        ctypes.memmove(into.ctypes.data, address, into.nbytes)

    def copy_rows(self, to: int, to_pitch: int, given: int, pitch: int, width: int, count: int) -> None:
        for index in range(count):
            ctypes.memmove(to + index * to_pitch, given + index * pitch, width)

    def wait(self) -> None:
        """Nothing is ever queued."""


def size_bytes(shape: Sequence[int], dtype: str) -> int:
    return int(np.prod(shape, dtype=np.int64)) * {"f32": 4, "i32": 4, "f16": 2, "bf16": 2}[dtype]
