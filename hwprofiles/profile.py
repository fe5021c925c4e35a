"""The Profile document: what one device measured itself to be, with conditions and raw samples.

What could not be measured is absent, with the reason: nothing is assumed. `source` says whether the figures are live
(this board, as it is), replayed (a recorded tree) or emulated (a virtual board whose speed or link is stretched).
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from hwprofiles.reading import Absent, Failed, Reading

Phase = Literal["decode", "prefill"]


class Samples(Struct, frozen=True, kw_only=True):
    """Raw samples in seconds, in the order taken, and why sampling stopped. Percentiles are computed, not stored."""

    samples_s: tuple[float, ...]
    warmup: int
    stopped_because: str
    valid: bool = True
    invalid_because: str = ""


class ModuleTiming(Struct, frozen=True, kw_only=True):
    """Time of one step through `stack` equal modules: `tokens` rows at once, with `context` rows already in the
    KV cache (0 for modules without one)."""

    phase: Phase
    tokens: int
    context: int
    stack: int
    samples: Samples


class ModuleMeasurement(Struct, frozen=True, kw_only=True):
    """One module on one engine on this device."""

    key: str
    kind: Literal["block", "embedding", "head"]
    engine: str
    threads: int
    timings: tuple[ModuleTiming, ...]
    resident_bytes: int
    """Growth of the measuring process while the deepest stack was loaded."""
    base_bytes: int
    """Resident memory of the measuring process before anything was loaded: interpreter, engine, libraries."""


class LinkMeasurement(Struct, frozen=True, kw_only=True):
    """The device's own link, measured through the real transport to its own topic on the site's broker and back:
    each sample crosses the link twice and the broker once."""

    broker: str
    round_trip_payload_bytes: int
    round_trip: Samples
    goodput_payload_bytes: int
    goodput_chunk_bytes: int
    goodput: Samples
    """Seconds from the first publish to the last byte back, for `goodput_payload_bytes` in chunks."""


class Conditions(Struct, frozen=True, kw_only=True):
    """Under which conditions the figures were taken, before and after."""

    software: str
    python: str
    engine_versions: dict[str, str]
    kernel: str
    affinity: tuple[int, ...]
    quota_cores: Reading[float] | Absent | Failed
    quota_period_s: Reading[float] | Absent | Failed
    governor: Reading[str] | Absent | Failed
    clock_hz_before: Reading[float] | Absent | Failed
    clock_hz_after: Reading[float] | Absent | Failed
    temperature_c_before: Reading[float] | Absent | Failed
    temperature_c_after: Reading[float] | Absent | Failed
    throttle_before: Reading[str] | Absent | Failed
    throttle_after: Reading[str] | Absent | Failed
    load_before: float
    load_after: float
    allow_spinning: bool
    timer: str
    measured_at_unix: float
    duration_s: float


class Identity(Struct, frozen=True, kw_only=True):
    device: str
    board: Reading[str] | Absent | Failed
    cpu: Reading[str] | Absent | Failed
    arch: str
    os: Reading[str] | Absent | Failed
    accelerators: Reading[tuple[str, ...]] | Absent | Failed


class Memory(Struct, frozen=True, kw_only=True):
    total_bytes: Reading[int] | Absent | Failed
    available_bytes: Reading[int] | Absent | Failed
    limit_bytes: Reading[int] | Absent | Failed
    """The tightest limit that holds for the agent: cgroup v1 or v2, or one set by the user."""
    usable_bytes: int
    """The least of the above that is known."""
    unified: bool


class Cores(Struct, frozen=True, kw_only=True):
    online: int
    allowed: int
    """By affinity."""
    usable: float
    """Affinity and quota together; emulation not counted."""
    because: str


class Profile(Struct, frozen=True, kw_only=True):
    """`schema` names version and kind, so that the file explains itself."""

    schema: str = "edgelam.profile/1"
    source: Literal["live", "replayed", "emulated"]
    emulation: str
    identity: Identity
    memory: Memory
    cores: Cores
    conditions: Conditions
    engines: dict[str, Reading[str] | Absent | Failed]
    modules: tuple[ModuleMeasurement, ...]
    link: LinkMeasurement | Absent | Failed
