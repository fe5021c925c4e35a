"""Made-up models and boards whose true costs are known, for the tests of planning."""

from __future__ import annotations

from itertools import pairwise

from msgspec import Struct

from coordinator.planning.planner import Candidate, PlanRequest
from hwprofiles.measure import BATCHES
from hwprofiles.profile import (
    Conditions,
    Cores,
    Identity,
    LinkMeasurement,
    Memory,
    ModuleMeasurement,
    ModuleTiming,
    Phase,
    Profile,
    Samples,
)
from hwprofiles.reading import Absent, Reading
from models.graph import Edge, Graph, Module
from wire import topics
from wire.messages import InboxAddress

MB = 1024 * 1024
HIDDEN = 576
PROBE_BYTES = 1_200
CHUNK_BYTES = 64 * 1024
GOODPUT_BYTES = 512 * 1024
WORKER_BYTES = 80 * MB


def address(stage: int) -> InboxAddress:
    return InboxAddress(topic=topics.INBOX.on("lab", "tiny", str(stage)))


def graph(blocks: int = 30, *, tied: bool = True, block_bytes: int = 2 * MB, kv_bytes: int = 768) -> Graph:
    """A chain with the sizes of a 135 M model at 4 bit; embedding and head share a file if `tied`."""
    shared = "sha256:" + "e" * 64
    head_file = shared if tied else "sha256:" + "f" * 64
    modules = [_module("embedding", "embedding", 28 * MB, shared, 0)]
    for number in range(blocks):
        modules.append(_module(f"block.{number}", "block", block_bytes, f"sha256:{number:064x}", kv_bytes))
    modules.append(_module("head", "head", 28 * MB, head_file, 0))
    edges = tuple(
        Edge(source=one.name, target=other.name, elements_per_token=HIDDEN, bytes_per_token=2 * HIDDEN)
        for one, other in pairwise(modules)
    )
    return Graph(
        model="tiny-chat",
        family="llama",
        precision="int4",
        wire_dtype="f16",
        hidden=HIDDEN,
        vocabulary=49_152,
        blocks=blocks,
        max_context_tokens=2_048,
        modules=tuple(modules),
        edges=edges,
    )


def _module(name: str, kind: str, weight_bytes: int, artifact: str, kv_bytes: int) -> Module:
    return Module(
        name=name,
        kind=kind,  # type: ignore[arg-type]
        profile_key=f"tiny/{kind}",
        weight_bytes=weight_bytes,
        artifacts=(artifact,),
        kv_bytes_per_token=kv_bytes,
        macs_per_token=weight_bytes,
    )


def samples(*seconds: float, valid: bool = True, because: str = "") -> Samples:
    return Samples(
        samples_s=seconds * 5 if len(seconds) == 1 else seconds,
        warmup=3,
        stopped_because="enough",
        valid=valid,
        invalid_because=because,
    )


def timing(phase: Phase, tokens: int, context: int, stack: int, seconds: float, *, valid: bool = True) -> ModuleTiming:
    taken = samples(seconds, valid=valid, because="" if valid else "drift: the last third took twice as long")
    return ModuleTiming(phase=phase, tokens=tokens, context=context, stack=stack, samples=taken)


def block_measurement(
    block_s: float,
    overhead_s: float,
    *,
    per_context_s: float = 0.0,
    valid: bool = True,
    held: float = 1.0,
    row_share: float | None = None,
) -> ModuleMeasurement:
    """A block that takes block_s + context * per_context_s per token, in stacks of 1 and 6; and where a further row of
    a step takes a share of the first one, in steps of several rows, too."""

    def at(tokens: int, context: int, stack: int) -> float:
        return overhead_s + stack * tokens * (block_s + context * per_context_s)

    timings = [timing("decode", 1, c, stack, at(1, c, stack), valid=valid) for c in (16, 256) for stack in (1, 6)]
    if row_share is not None:
        timings += [
            timing("decode", rows, 16, stack, at(1, 16, stack) * (1 + (rows - 1) * row_share), valid=valid)
            for rows in BATCHES
            for stack in (1, 6)
        ]
    timings += [
        timing("prefill", rows, c, stack, at(rows, c, stack), valid=valid)
        for rows in (32, 128)
        for c in (16, 256)
        for stack in (1, 6)
    ]
    return ModuleMeasurement(
        key="tiny/block",
        kind="block",
        engine="onnxruntime 1.23.2",
        threads=1,
        timings=tuple(timings),
        resident_bytes=int(6 * 2 * MB * held),
        base_bytes=WORKER_BYTES,
    )


def single_measurement(kind: str, seconds: float, row_share: float | None = None) -> ModuleMeasurement:
    """Embedding or head: one row decoded, or the same for a chunk of any size."""
    batches = BATCHES if row_share is not None else ()
    several = [timing("decode", rows, 0, 1, seconds * (1 + (rows - 1) * (row_share or 0.0))) for rows in batches]
    rows = [
        timing("decode", 1, 0, 1, seconds),
        *several,
        timing("prefill", 32, 0, 1, seconds),
        timing("prefill", 128, 0, 1, seconds),
    ]
    return ModuleMeasurement(
        key=f"tiny/{kind}",
        kind=kind,  # type: ignore[arg-type]
        engine="onnxruntime 1.23.2",
        threads=1,
        timings=tuple(rows),
        resident_bytes=0,
        base_bytes=WORKER_BYTES,
    )


def link(delay_s: float, bytes_per_s: float) -> LinkMeasurement:
    """A link with so much delay one way and this rate both ways, as a probe to oneself sees it."""
    return LinkMeasurement(
        broker="mqtt://127.0.0.1:1883",
        round_trip_payload_bytes=PROBE_BYTES,
        round_trip=samples(2 * delay_s + 2 * PROBE_BYTES / bytes_per_s),
        goodput_payload_bytes=GOODPUT_BYTES,
        goodput_chunk_bytes=CHUNK_BYTES,
        goodput=samples(2 * delay_s + (GOODPUT_BYTES + CHUNK_BYTES) / bytes_per_s),
    )


def profile(
    device: str,
    *,
    block_s: float = 1e-3,
    overhead_s: float = 2e-4,
    embedding_s: float = 3e-4,
    head_s: float = 4e-3,
    per_context_s: float = 0.0,
    link_to_broker: LinkMeasurement | Absent | None = None,
    valid: bool = True,
    held: float = 1.0,
    row_share: float | None = None,
    usable_bytes: int = 4_096 * MB,
) -> Profile:
    none = Absent("not on this board")
    return Profile(
        source="live",
        emulation="",
        identity=Identity(device=device, board=none, cpu=none, arch="aarch64", os=none, accelerators=none),
        memory=Memory(
            total_bytes=Reading(usable_bytes, "test"),
            available_bytes=none,
            limit_bytes=none,
            usable_bytes=usable_bytes,
            unified=False,
        ),
        cores=Cores(online=4, allowed=4, usable=4.0, because="no limit"),
        conditions=_conditions(),
        engines={},
        modules=(
            single_measurement("embedding", embedding_s),
            block_measurement(
                block_s, overhead_s, per_context_s=per_context_s, valid=valid, held=held, row_share=row_share
            ),
            single_measurement("head", head_s, row_share),
        ),
        link=link_to_broker if link_to_broker is not None else link(0.5e-3, 100e6 / 8),
    )


def _conditions() -> Conditions:
    none = Absent("not on this board")
    return Conditions(
        software="0.1.0",
        python="3.11",
        engine_versions={"onnxruntime": "1.23.2"},
        kernel="6.1",
        affinity=(0, 1, 2, 3),
        quota_cores=none,
        quota_period_s=none,
        governor=none,
        clock_hz_before=none,
        clock_hz_after=none,
        temperature_c_before=none,
        temperature_c_after=none,
        throttle_before=none,
        throttle_after=none,
        load_before=0.0,
        load_after=0.0,
        allow_spinning=False,
        timer="perf_counter",
        measured_at_unix=0.0,
        duration_s=1.0,
    )


def board(name: str, slower: float = 1.0, memory_bytes: int = 4_096 * MB, **changes: object) -> Candidate:
    """A board so many times slower than the fastest."""
    figures = {
        "block_s": 1e-3 * slower,
        "overhead_s": 2e-4 * slower,
        "embedding_s": 3e-4 * slower,
        "head_s": 4e-3 * slower,
    }
    made = profile(name, **{**figures, **changes})  # type: ignore[arg-type]
    return Candidate(device=name, profile=made, usable_memory_bytes=memory_bytes)


def request(**changes: object) -> PlanRequest:
    """For one request at a time; for a full pipeline as many as fill it."""
    slots = 8 if changes.get("objective") == "throughput" else 1
    fields: dict[str, object] = {"deployment": "tiny", "context_tokens": 512 // slots, "slots": slots}
    return PlanRequest(**{**fields, **changes})  # type: ignore[arg-type]


class Nothing(Struct):
    """A configuration that says nothing."""
