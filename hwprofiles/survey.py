"""The board as it stands: identity, memory, cores and engines, with the limits that hold for this process.

Cheap enough for a supervisor (tens of milliseconds, no engine imported), and repeatable at any time.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hwprofiles.probe import engines as engine_probe
from hwprofiles.probe import jetson, limits, network, nvidia, proc, tegrastats
from hwprofiles.probe.commands import Runner, runner_for
from hwprofiles.profile import Cores, Identity, Memory
from hwprofiles.reading import Absent, Failed, Reading
from wire.units import bytes_text

Engines = dict[str, Reading[str] | Absent | Failed]


class Survey(NamedTuple):
    identity: Identity
    memory: Memory
    cores: Cores
    engines: Engines


def survey(root: Path, device: str, emulated_memory_bytes: int = 0, run: Runner | None = None) -> Survey:
    """Read everything. `emulated_memory_bytes` > 0 is a limit set by the user, besides those of control groups."""
    return Survey(
        identity=identity(root, device, run),
        memory=memory(root, emulated_memory_bytes),
        cores=cores(root),
        engines=engine_probe.engines_of(root),
    )


def identity(root: Path, device: str, run: Runner | None = None) -> Identity:
    return Identity(
        device=device,
        board=proc.board(root),
        cpu=proc.cpu_model(root),
        arch=proc.arch(root),
        os=_system(root),
        accelerators=_accelerators(root),
        interfaces=network.interfaces(root),
        power_modes=jetson.power_modes(run or runner_for(root)) if tegrastats.runs_on(root) else Absent("not a Jetson"),
    )


def _system(root: Path) -> Reading[str] | Absent | Failed:
    """Distribution, and the L4T release where there is one."""
    distribution, release = proc.distribution(root), jetson.l4t_release(root)
    if isinstance(distribution, Reading) and isinstance(release, Reading):
        return Reading(f"{distribution.value}, L4T {release.value}", f"{distribution.source}, {release.source}")
    return distribution


def _accelerators(root: Path) -> Reading[tuple[str, ...]] | Absent | Failed:
    """Names for people: a Jetson's own GPU by its module, others by NVML."""
    module = jetson.module(root)
    if isinstance(module, Reading):
        name = f"GPU of {module.value.soc}"
        kind = " ".join(filter(None, (module.value.family, module.value.code)))
        return Reading((f"{name} ({kind})" if kind else name,), module.source)
    found = nvidia.gpus(root)
    if not isinstance(found, Reading):
        return found
    if not found.value:
        return Absent("NVML lists no GPU")
    return Reading(tuple(_gpu_text(gpu) for gpu in found.value), found.source)


def _gpu_text(gpu: nvidia.Gpu) -> str:
    name = gpu.name.value if isinstance(gpu.name, Reading) else "NVIDIA GPU of unknown name"
    return f"{name}, {bytes_text(gpu.memory_bytes.value)}" if isinstance(gpu.memory_bytes, Reading) else name


def memory(root: Path, emulated_memory_bytes: int = 0) -> Memory:
    """Memory of the host, and the tightest limit on this process; `usable_bytes` is the least that is known, 0 if
    nothing is."""
    info = proc.memory(root)
    total: Reading[int] | Absent | Failed
    available: Reading[int] | Absent | Failed
    if isinstance(info, Reading):
        total = Reading(info.value.total_bytes, info.source)
        available = Reading(info.value.available_bytes, info.source)
    else:
        total = available = info
    limit = limits.memory_limit(root)
    if emulated_memory_bytes > 0 and not (isinstance(limit, Reading) and limit.value <= emulated_memory_bytes):
        limit = Reading(emulated_memory_bytes, "set by the user")
    known = [reading.value for reading in (total, available, limit) if isinstance(reading, Reading)]
    return Memory(
        total_bytes=total,
        available_bytes=available,
        limit_bytes=limit,
        usable_bytes=min(known, default=0),
        unified=isinstance(jetson.module(root), Reading),
    )


def cores(root: Path) -> Cores:
    """Processors that this process may use: online, of those allowed by affinity and processor set, of those quota."""
    online = proc.online_cores(root)
    affinity, processor_set = proc.affinity(root), limits.processor_set(root)
    sets = [set(found.value) for found in (online, affinity, processor_set) if isinstance(found, Reading)]
    allowed = len(set.intersection(*sets)) if sets else 0
    quota = limits.processor_quota(root)
    online_count = len(online.value) if isinstance(online, Reading) else allowed
    allowed = max(1, allowed)  # whatever the files say, we run on one
    usable, because = float(allowed), f"{allowed} allowed of {max(1, online_count)} online"
    if not sets:
        because = "nothing says which processors there are"
    if isinstance(quota, Reading):
        usable = min(usable, quota.value.cores)
        because += f", quota of {quota.value.cores:g} per {quota.value.period_s * 1e3:g} ms ({quota.source})"
    elif isinstance(quota, Failed):
        because += f", quota unknown ({quota.because})"
    return Cores(online=max(1, online_count), allowed=allowed, usable=usable, because=because)
