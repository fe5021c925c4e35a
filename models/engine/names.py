"""The engines there are, and what each needs. Without numpy: the supervisor and the planner ask, too.

    engine            graph       computes on
    tensorrt          standard    an NVIDIA GPU; built on the board (models.engine.tensorrt)
    onnxruntime-cuda  standard    an NVIDIA GPU (models.engine.providers)
    onnxruntime       fused       the processor: what every board has
    torch-cuda        fused       an NVIDIA GPU, plainly written
    torch             fused       the processor, plainly written: the reference

A stage is ordered on one of them. Where it can't be loaded there it is loaded on the next one in FALLBACKS, and whoever
ordered it is told: an answer that comes slowly is better than none, but a silent fallback is a lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from wire.messages import EngineName

PROCESSOR: Final[EngineName] = "onnxruntime"
"""What every board has, and measures itself with first: modules, and the power that it takes meanwhile."""

FALLBACKS: Final[Mapping[EngineName, tuple[EngineName, ...]]] = {
    "tensorrt": ("onnxruntime-cuda", "onnxruntime"),
    "onnxruntime-cuda": ("onnxruntime",),
    "onnxruntime": (),
    "torch-cuda": ("onnxruntime",),
    "torch": ("onnxruntime",),
}
"""Engine -> what is tried after it. onnxruntime on the processor is what every board has."""

STANDARD: Final[frozenset[EngineName]] = frozenset(("tensorrt", "onnxruntime-cuda"))
"""Engines that read a graph of standard operators (models.build.standard)."""

ENGINES: Final[tuple[EngineName, ...]] = tuple(FALLBACKS)
AUTOMATIC: Final[tuple[EngineName, ...]] = ("tensorrt", "onnxruntime-cuda", "onnxruntime")
"""Those that a plan chooses by itself, in the order in which equal figures are decided. The plainly written ones hold
float32 weights and are there to compare with: they are used when asked for."""
