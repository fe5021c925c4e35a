"""The Profile document: what one device measured itself to be, with conditions and raw samples.

What could not be measured is absent, with the reason: nothing is assumed. `source` says whether the figures are live
(this board, as it is), replayed (a recorded tree) or emulated (a virtual board whose speed or link is stretched).

A profile crosses the network, so its numbers have bounds and its JSON at most 200 KB. It holds until what it was
measured with changes (`expired`).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from hwprofiles import seal
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.samples import MAX_SAMPLES as MAX_SAMPLES
from hwprofiles.samples import (
    Ceilings,
    Codings,
    Count,
    Course,
    DiskMeasurement,
    EnergyMeasurement,
    Rate,
    Seconds,
    Sustained,
    Text,
)
from hwprofiles.samples import Phase as Phase
from hwprofiles.samples import Samples as Samples
from wire.errors import CorruptData, Refused, UsageError
from wire.units import bytes_text

KEPT_SAMPLES: Final = 200
"""Samples of one run that are kept: p95 needs 59, and more only sharpen what is sharp already."""
KEPT_OF_PAIRS: Final = 40
FEWEST_KEPT: Final = 12
"""Fewer are never kept where more were taken: an interval of the median needs 6, seeing drift 12."""
SAMPLE_DIGITS: Final = 7
"""Samples are rounded to 1e-7 s: timers and schedulers jitter by more."""
MAX_PROFILE_BYTES: Final = 200 * 1024
"""Largest JSON of a profile: it must pass as one control message (256 KB) with room to spare."""
NOT_MEASURED: Final = Absent("not measured")
NOT_ASKED: Final = Absent("not asked for: edgelam bench --sustained SECONDS")
MAX_FILE_BYTES: Final = MAX_PROFILE_BYTES + 1024
"""With the seal (hwprofiles.seal)."""
MAX_PAIRS: Final = 64
MAX_AGE_S: Final = 30 * 86_400.0
"""A profile older than 30 days is measured again: dust, updates and seasons change a board."""


class ModuleTiming(Struct, frozen=True, kw_only=True):
    """Time of one step through `stack` equal modules: `tokens` rows at once, with `context` rows already in the
    KV cache (0 for modules without one)."""

    phase: Phase
    tokens: Annotated[int, Meta(ge=1, le=2**20)]
    context: Count
    stack: Annotated[int, Meta(ge=1, le=1024)]
    samples: Samples


class ModuleMeasurement(Struct, frozen=True, kw_only=True):
    """One module on one engine on this device."""

    key: Text
    kind: Literal["block", "embedding", "head"]
    engine: Text
    threads: Count
    timings: Annotated[tuple[ModuleTiming, ...], Meta(max_length=256)]
    resident_bytes: Count
    """Growth of the measuring process while the deepest stack was loaded and made its first steps; 0 where
    that was not measured."""
    shallow_bytes: Count = 0
    """The same of the shallowest of several stacks; 0 where there is one only, or that was not noted."""
    base_bytes: Count
    """Resident memory of the measuring process before the module was loaded: interpreter, libraries, an engine that has
    been started."""
    weight_bytes: Count = 0
    """Weights that a step reads in each of the modules; 0 where that is not known."""
    row_operations: Count = 0
    """Of one module for each row of a step: two for each weight of its matrices; 0 where that is not known."""
    took_s: Seconds = 0.0
    """Wall time of measuring it, loading and retries and all; 0 if that was not noted."""
    spoiled_because: Text = ""
    """What was wrong with the conditions when this was measured, if it was not with those of the profile."""


class LinkMeasurement(Struct, frozen=True, kw_only=True, tag="measured"):
    """The device's own link, measured through the real transport to its own topic on the site's broker and back:
    each sample crosses the link twice and the broker once."""

    broker: Text
    round_trip_payload_bytes: Annotated[int, Meta(ge=1, le=2**32)]
    round_trip: Samples
    goodput_payload_bytes: Annotated[int, Meta(ge=1, le=2**32)]
    goodput_chunk_bytes: Annotated[int, Meta(ge=1, le=2**32)]
    goodput: Samples
    """Seconds from the first publish to the last byte back, for `goodput_payload_bytes` in chunks."""


PairWay = Literal["direct", "central"]
"""Through each board's own broker, or through the site's."""


class Goodput(Struct, frozen=True, kw_only=True):
    """Loads of `payload_bytes` in chunks, in one direction: seconds from the first arrival to the last."""

    payload_bytes: Annotated[int, Meta(ge=1, le=2**32)]
    chunk_bytes: Annotated[int, Meta(ge=1, le=2**32)]
    samples: Samples


class PairMeasurement(Struct, frozen=True, kw_only=True, tag="measured"):
    """The way to another board and back, as activations would take it (hwprofiles.pairs)."""

    peer: Annotated[str, Meta(max_length=64)]
    way: PairWay
    measured_at_unix: float
    round_trip_payload_bytes: Annotated[int, Meta(ge=1, le=2**32)]
    round_trip: Samples
    sent: Count
    """Small messages that went there for `round_trip`, warm-up included."""
    lost: Count
    """Of these, how many did not come back in time at all."""
    late: Count
    """How many took so long that a token would be seen to stall."""
    there: Goodput
    back: Goodput


class Snapshot(Struct, frozen=True, kw_only=True):
    """The conditions at one moment; two of them make `Conditions`, one is compared when a profile may have expired."""

    software: str
    python: str
    engine_versions: dict[str, str]
    kernel: str
    affinity: tuple[int, ...]
    quota_cores: Reading[float] | Absent | Failed
    quota_period_s: Reading[float] | Absent | Failed
    governor: Reading[str] | Absent | Failed
    clock_hz: Reading[float] | Absent | Failed
    temperature_c: Reading[float] | Absent | Failed
    throttle: Reading[str] | Absent | Failed
    load: float
    timer: str
    at_unix: float
    at_mono_s: float
    power_mode: Reading[str] | Absent | Failed = Absent("not read")


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
    """Processes that ran or waited to run, averaged over the last minute."""
    load_after: float
    allow_spinning: bool
    timer: str
    measured_at_unix: float
    duration_s: float
    power_mode: Reading[str] | Absent | Failed = Absent("not read")
    """Of a Jetson: which cores run, and how fast (nvpmodel)."""


class Interface(Struct, frozen=True, kw_only=True):
    """A network interface of the board that is up, the loopback left out."""

    name: str
    addresses: tuple[str, ...]
    wireless: bool
    link_bits_per_s: Reading[float] | Absent | Failed
    """What the two ends negotiated, not what was measured."""


class Identity(Struct, frozen=True, kw_only=True):
    device: str
    board: Reading[str] | Absent | Failed
    cpu: Reading[str] | Absent | Failed
    arch: str
    os: Reading[str] | Absent | Failed
    accelerators: Reading[tuple[str, ...]] | Absent | Failed
    interfaces: tuple[Interface, ...] = ()
    power_modes: Reading[tuple[str, ...]] | Absent | Failed = Absent("not read")
    """All that this board offers: firmware that is too old offers fewer."""


class Memory(Struct, frozen=True, kw_only=True):
    total_bytes: Reading[int] | Absent | Failed
    available_bytes: Reading[int] | Absent | Failed
    limit_bytes: Reading[int] | Absent | Failed
    """The tightest limit that holds for the agent: cgroup v1 or v2, or one set by the user."""
    usable_bytes: Count
    """The least of the above that is known."""
    unified: bool
    """True where the GPU has no memory of its own."""


class Cores(Struct, frozen=True, kw_only=True):
    online: Annotated[int, Meta(ge=1, le=65536)]
    allowed: Annotated[int, Meta(ge=1, le=65536)]
    """By affinity."""
    usable: Annotated[float, Meta(gt=0, le=65536)]
    """Affinity and quota together; emulation not counted."""
    because: Text


class Profile(Struct, frozen=True, kw_only=True):
    """`schema` names version and kind, so that the file explains itself."""

    schema: Literal["edgelam.profile/1"] = "edgelam.profile/1"
    source: Literal["live", "replayed", "emulated"]
    emulation: Text
    identity: Identity
    memory: Memory
    cores: Cores
    conditions: Conditions
    engines: dict[str, Reading[str] | Absent | Failed]
    """What was measured with, and why others were not."""
    modules: Annotated[tuple[ModuleMeasurement, ...], Meta(max_length=256)]
    link: LinkMeasurement | Absent | Failed
    failed: Annotated[dict[Text, Text], Meta(max_length=256)] = {}
    """Keys of modules that could not be measured, and why."""
    ceilings: Ceilings | Absent | Failed = NOT_MEASURED
    disk: DiskMeasurement | Absent | Failed = NOT_MEASURED
    codings: Codings | Absent | Failed = NOT_MEASURED
    course: Course | Absent | Failed = NOT_MEASURED
    """While the modules were measured that were measured last."""
    energy: EnergyMeasurement | Absent | Failed = NOT_MEASURED
    sustained: Sustained | Absent | Failed = NOT_ASKED
    pairs: Annotated[tuple[PairMeasurement, ...], Meta(max_length=MAX_PAIRS)] = ()
    """Ways to other boards, the latest measurement of each; this board asked, the other answered."""
    pending: Text = ""
    """An engine with which the board is about to measure what it has measured on its processor; '' if there is none."""


def compact(profile: Profile) -> Profile:
    """Give the profile as it is kept: samples rounded, and evenly thinned until its JSON is at most 200 KB.

    Thinned runs say how many samples were taken. Raises Refused if it is too large even with 12 samples per run.
    """
    keep = KEPT_SAMPLES
    while True:
        kept = _thinned(profile, keep)
        size_bytes = len(msgspec.json.encode(kept))
        if size_bytes <= MAX_PROFILE_BYTES:
            return kept
        if keep == FEWEST_KEPT:
            raise Refused(
                f"profile of {len(profile.modules)} modules takes {bytes_text(size_bytes)}, "
                f"at most {bytes_text(MAX_PROFILE_BYTES)} are kept",
                try_="measure fewer models or engines at once",
            )
        keep = max(FEWEST_KEPT, keep // 2)


def _thinned(profile: Profile, keep: int) -> Profile:
    modules = tuple(
        msgspec.structs.replace(
            module,
            timings=tuple(
                msgspec.structs.replace(timing, samples=_thinned_samples(timing.samples, keep))
                for timing in module.timings
            ),
        )
        for module in profile.modules
    )
    link = profile.link
    if isinstance(link, LinkMeasurement):
        link = msgspec.structs.replace(
            link,
            round_trip=_thinned_samples(link.round_trip, keep),
            goodput=_thinned_samples(link.goodput, keep),
        )
    ceilings, disk = profile.ceilings, profile.disk
    if isinstance(ceilings, Ceilings):
        ceilings = msgspec.structs.replace(
            ceilings, memory=_thinned_rates(ceilings.memory, keep), products=_thinned_rates(ceilings.products, keep)
        )
    if isinstance(disk, DiskMeasurement):
        disk = msgspec.structs.replace(
            disk, write=_thinned_samples(disk.write, keep), read=_thinned_samples(disk.read, keep)
        )
    codings = profile.codings
    if isinstance(codings, Codings):
        timings = tuple(
            msgspec.structs.replace(one, samples=_thinned_samples(one.samples, min(keep, KEPT_OF_PAIRS)))
            for one in codings.timings
        )
        codings = msgspec.structs.replace(codings, timings=timings)
    pairs = tuple(_thinned_pair(pair, min(keep, KEPT_OF_PAIRS)) for pair in profile.pairs)
    return msgspec.structs.replace(
        profile, modules=modules, link=link, pairs=pairs, ceilings=ceilings, disk=disk, codings=codings
    )


def _thinned_rates(rates: tuple[Rate, ...], keep: int) -> tuple[Rate, ...]:
    return tuple(msgspec.structs.replace(rate, samples=_thinned_samples(rate.samples, keep)) for rate in rates)


def _thinned_pair(pair: PairMeasurement, keep: int) -> PairMeasurement:
    def of(goodput: Goodput) -> Goodput:
        return msgspec.structs.replace(goodput, samples=_thinned_samples(goodput.samples, keep))

    round_trip = _thinned_samples(pair.round_trip, keep)
    return msgspec.structs.replace(pair, round_trip=round_trip, there=of(pair.there), back=of(pair.back))


def _thinned_samples(samples: Samples, keep: int) -> Samples:
    values, taken = samples.samples_s, samples.taken
    if len(values) > keep:
        taken = taken or len(values)
        values = tuple(values[at * len(values) // keep] for at in range(keep))
    rounded = tuple(round(value, SAMPLE_DIGITS) for value in values)
    return msgspec.structs.replace(samples, samples_s=rounded, taken=taken)


def encode(profile: Profile) -> bytes:
    """Give the JSON bytes of the profile as it is kept (see `compact`), keys in a fixed order."""
    return msgspec.json.encode(compact(profile), order="deterministic")


def digest(profile: Profile) -> str:
    """Give 'sha256:...' of the kept JSON: equal for a profile and for what is loaded after saving it."""
    return f"sha256:{hashlib.sha256(encode(profile)).hexdigest()}"


def save(profile: Profile, path: Path) -> None:
    """Write the profile so that `path` holds the old or the new one, never a part; OSError passes through."""
    data = seal.sealed(encode(profile))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load(path: Path) -> Profile:
    """Read a profile; raise UsageError if there is none at `path`, CorruptData if it is damaged or too large."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"no profile at {path}", try_="edgelam bench, which measures one") from None
    if len(data) > MAX_FILE_BYTES:
        raise CorruptData(f"{path}: larger than any profile ({bytes_text(MAX_PROFILE_BYTES)})", try_=f"rm {path}")
    try:
        profile = msgspec.json.decode(data, type=Profile)
        changed = seal.broken(data)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CorruptData(f"{path}: not a profile: {error}", try_=f"rm {path}; it is measured again") from None
    if changed:
        raise CorruptData(f"{path}: changed after it was measured", try_=f"rm {path}; it is measured again")
    return profile


def sets_speed(at: Snapshot | Conditions) -> tuple[tuple[str, object], ...]:
    """What sets the speed of a board, by name: where one of these has changed, figures from before no longer hold."""
    return (
        ("software", at.software),
        ("engines", at.engine_versions),
        ("kernel", at.kernel),
        ("allowed cores", at.affinity),
        ("processor quota", _value(at.quota_cores)),
        ("quota period", _value(at.quota_period_s)),
        ("governor", _value(at.governor)),
        ("power mode", _value(at.power_mode)),
    )


def expired(
    profile: Profile,
    now_unix: float,
    current: Snapshot,
    memory: Memory,
    emulation: str,
    identity: Identity | None = None,
) -> str:
    """Say why the profile no longer holds for this device as it is now; '' if it does.

    `current`, `memory`, `emulation` and `identity` are today's; temperature and load may differ, what sets the speed
    may not. A replayed profile never holds, and neither does that of another board, whose card this one started from.
    """
    then = profile.conditions
    if profile.source == "replayed":
        return "it is of a recording, and was not measured here"
    age_s = now_unix - then.measured_at_unix
    if age_s > MAX_AGE_S:
        return f"measured {age_s / 86_400:.0f} days ago"
    if age_s < -MAX_AGE_S:
        return "measured in the future: the clock of the board has changed"
    changes = (
        *((what, was, now) for (what, was), (_, now) in zip(sets_speed(then), sets_speed(current), strict=True)),
        ("memory limit", _value(profile.memory.limit_bytes), _value(memory.limit_bytes)),
        ("emulation", profile.emulation, emulation),
        *(() if identity is None else _who(profile.identity, identity)),
    )
    for what, before, after in changes:
        if before != after:
            return f"{what} changed from {_shown(before)} to {_shown(after)}"
    return ""


def _who(then: Identity, now: Identity) -> tuple[tuple[str, object, object], ...]:
    return (
        ("board", _value(then.board), _value(now.board)),
        ("processor", _value(then.cpu), _value(now.cpu)),
        ("architecture", then.arch, now.arch),
    )


def _value(reading: Reading[float] | Reading[int] | Reading[str] | Absent | Failed) -> object:
    """Absent and failed readings are equal to themselves whatever their reasons: only values count."""
    return reading.value if isinstance(reading, Reading) else None


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in sorted(value.items())) or "none"
    return "none" if value in (None, "", ()) else str(value)
