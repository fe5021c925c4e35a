"""Which engines this board measures itself with besides onnxruntime on its processor, and what of it is due. Pure.

Installed is enough to try: whether an engine works is found out by the worker that measures with it, in a process of
its own, after the processor was measured. One that can't be loaded is not tried again until the agent starts anew, or
is asked to measure again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from hwprofiles.profile import Profile
from hwprofiles.reading import Reading
from hwprofiles.survey import Engines
from models.engine.names import PROCESSOR
from wire.messages import EngineName, KitModule

CUDA_LIBRARY: Final = Path("capi", "libonnxruntime_providers_cuda.so")
"""In the folder of an onnxruntime that was built with CUDA."""


class Due(NamedTuple):
    """Modules to measure with an engine."""

    engine: EngineName
    modules: tuple[KitModule, ...]


def others(found: Engines, asked: tuple[EngineName, ...] | None) -> tuple[EngineName, ...]:
    """Engines to measure with besides the processor: those that were asked for, else those for a GPU that are there."""
    if asked is not None:
        return tuple(engine for engine in asked if engine != PROCESSOR)
    offered: list[EngineName] = []
    if isinstance(found.get("tensorrt"), Reading):
        offered.append("tensorrt")
    onnxruntime = found.get("onnxruntime")
    if isinstance(onnxruntime, Reading) and Path(onnxruntime.source, CUDA_LIBRARY).exists():
        offered.append("onnxruntime-cuda")
    return tuple(offered)


def measured(profile: Profile | None, engine: EngineName) -> set[str]:
    """Keys of the modules that a profile has figures of with an engine."""
    return {module.key for module in profile.modules if module.engine == engine} if profile is not None else set()


def due(
    engines: Sequence[EngineName], failed: Collection[str], kit: Sequence[KitModule], profile: Profile | None
) -> Due | None:
    """The first engine that has something to measure: what of the kit the processor has measured, and it has not."""
    here = measured(profile, PROCESSOR)
    for engine in engines:
        known = measured(profile, engine)
        missing = tuple(m for m in kit if m.runs == "tokens" and m.key in here and m.key not in known)
        if missing and engine not in failed:
            return Due(engine, missing)
    return None
