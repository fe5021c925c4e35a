"""Memory that an engine hands to onnxruntime: mapped weights, tables of rotary positions."""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.engine.base import EngineFailed
from models.engine.manifest import WeightInfo
from models.families.config import LlamaConfig
from models.formats.safetensors import SafetensorsFile, open_safetensors

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]

_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {"f32": np.dtype(np.float32), "u8": np.dtype(np.uint8)}

ALIGNMENT_BYTES: Final = 64
"""A cache line, and the widest vector register."""

_POOL: Final = 1 << 20
"""Random numbers that synthetic weights repeat: making all of them anew would take longer than the measurement."""

_SYNTHETIC_SCALE: Final = np.float32(1e-4)
"""With this, products of 8 bit codes stay below 1 up to 16,384 columns and far above denormals."""

_SYNTHETIC_SIZE: Final = np.float32(0.02)
"""Standard deviation of float weights: that with which such models are initialised."""


class Weights:
    """The tensors of a stage by name, as views of mapped files."""

    def __init__(self, tensors: dict[str, Array], maps: list[mmap.mmap]) -> None:
        self.tensors = tensors
        self._maps = maps

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def forget_pages(self) -> None:
        """Give the pages read so far back to the kernel: an engine that has packed a tensor anew doesn't need them.

        What is read again later is mapped in again.
        """
        for pages in self._maps:
            pages.madvise(mmap.MADV_DONTNEED)


def map_weights(weights: Sequence[WeightInfo], paths: Iterable[Path]) -> Weights:
    """Map the files and give the tensors that a stage wants, checked for dtype and shape.

    Files may hold more than the stage needs. Raises EngineFailed naming what is missing or differs, and what
    `open_safetensors` raises for damaged files.
    """
    holders: dict[str, SafetensorsFile] = {}
    files = [open_safetensors(path) for path in paths]
    for file in files:
        holders.update(dict.fromkeys(file.tensors, file))
    tensors: dict[str, Array] = {}
    for info in weights:
        if info.name not in holders:
            raise EngineFailed(f"no file holds the tensor {info.name!r} of the stage")
        tensor = holders[info.name].view(info.name)
        if tensor.dtype != _DTYPES[info.dtype] or tensor.shape != info.shape:
            raise EngineFailed(
                f"{holders[info.name].path}: tensor {info.name!r} is {tensor.dtype} {list(tensor.shape)}, "
                f"the stage needs {info.dtype} {list(info.shape)}"
            )
        tensors[info.name] = tensor
    return Weights(tensors, [file.pages for file in files])


def make_weights(wanted: Sequence[WeightInfo], folder: Path, seed: int) -> Weights:
    """Make weights of the wanted shapes, for measuring: sane sizes, so that nothing overflows or is denormal.

    They lie in a nameless file in `folder`, mapped like real ones, so that memory is what it would be with those.
    Raises OSError when there is no room.
    """
    if not wanted:
        return Weights({}, [])
    generator = np.random.default_rng(seed)
    with tempfile.TemporaryFile(dir=folder) as stream:
        for info in wanted:
            stream.write(_made(info, generator).tobytes())
            stream.write(bytes(-stream.tell() % ALIGNMENT_BYTES))
        stream.flush()
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    tensors: dict[str, Array] = {}
    start = 0
    for info in wanted:
        dtype = _DTYPES[info.dtype]
        tensors[info.name] = np.frombuffer(pages, dtype, info.size_bytes // dtype.itemsize, start).reshape(info.shape)
        start += -(-info.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return Weights(tensors, [pages])


def made_weights(wanted: Sequence[WeightInfo], folder: Path, seed: int) -> Weights:
    """`make_weights`; raises EngineFailed when there is no room."""
    try:
        return make_weights(wanted, folder, seed)
    except OSError as error:
        raise EngineFailed(f"no room for weights to measure with in {folder}: {error.strerror}") from error


def rope_tables(config: LlamaConfig, positions: int) -> tuple[Floats, Floats]:
    """Give cosines and sines, float32 [positions, head_dim / 2], computed in double precision."""
    angles = np.outer(np.arange(positions, dtype=np.float64), np.array(config.rope_frequencies()))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _made(info: WeightInfo, generator: np.random.Generator) -> Array:
    """Norms of 1, small biases, codes over the whole range, scales that keep the size of what passes through."""
    if info.dtype == "u8":
        if info.name.endswith(".zero_points"):
            return np.full(info.shape, 0x88, np.uint8)
        return np.resize(generator.integers(0, 256, _POOL, dtype=np.uint8), info.shape)
    if info.name.endswith("norm"):
        return np.ones(info.shape, np.float32)
    if info.name.endswith(".scales"):
        return np.full(info.shape, _SYNTHETIC_SCALE, np.float32)
    return np.resize(generator.standard_normal(_POOL, np.float32) * _SYNTHETIC_SIZE, info.shape)
