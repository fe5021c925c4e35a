"""What a device costs: a profile and a graph, joined into seconds and bytes. Pure; every figure was measured.

Compute. A stage that runs n equal blocks takes `overhead_s + n * block_s` per step; both come from timings of two
stacks of different depth (hwprofiles.measure.estimate). Embedding and head are timed alone, so their time holds one
overhead, which is taken out again: a stage pays it once.

A step of several requests, one row of each, was timed with as many as BATCHES says; between these it is a straight
line, and a longer context takes as much longer for each row. Where it was not measured a row takes what one alone does.

Hop, central topology. A device's link is measured by sending to itself through the broker: the round trip of P bytes
crosses the link twice and the broker once. Half of the sender's and half of the receiver's round trip therefore are
one crossing of each link and the broker once. Bytes beyond P are sent at each link's rate (hwprofiles.link), one link
after the other: the broker stores and forwards. It does so chunk by chunk: of what is longer than a chunk of C bytes,
one crosses the receiver's link while the next crosses the sender's. A smaller payload is priced as P, which is about
one hidden state.

    hop_s(d -> e, b <= C) = rtt_d / 2 + rtt_e / 2 + max(0, b - P_d) / rate_d + max(0, b - P_e) / rate_e
    hop_s(d -> e, b)      = hop_s(d -> e, C) + (b - C) / min(rate_d, rate_e)
    transfer_s(d -> e, b) = max(b / rate_d, b / rate_e)      how long one message occupies the busier link

A latency is paid by every token; it does not bound how many tokens a full pipeline moves. Occupancy does.

Memory of a stage = worker (interpreter, engine) + weights as the engine holds them (measured; files that modules
share counted once) + KV cache + scratch for a prefill chunk, against what is usable less a reserve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from coordinator.planning.plan import LeftOut, PlannedStage
from hwprofiles.link import bytes_per_s, one_way_s
from hwprofiles.measure import BATCHES, StepEstimate, estimate
from hwprofiles.profile import LinkMeasurement, ModuleMeasurement, Phase, Profile, Samples
from hwprofiles.stats import median_interval
from models.graph import Graph, Module
from wire.limits import CHUNK_BYTES_DEFAULT, CREDIT_WINDOW_BYTES
from wire.messages import EngineName

RESERVE_FRACTION: Final = 0.10
"""Share of usable memory that no stage is given: usage moves between planning and loading."""

RESERVE_MIN_BYTES: Final = 32 * 1024 * 1024
"""Least reserve: an agent's supervisor (about 40 MB, most of it already counted as used) still has to breathe."""

SCRATCH_ROWS_FACTOR: Final = 16
"""Float32 rows of hidden width alive at once per token of a prefill chunk: residual in and out, norm, q, k, v,
attention out, and gate, up and their product at three to four times hidden width."""

TRANSPORT_BYTES: Final = 2 * CREDIT_WINDOW_BYTES
"""One credit window received and one sent: what a worker may have in flight."""

EXPECTED_TOKENS: Final = 256
"""Rows in the KV cache at which decode is priced unless told otherwise: few chats are longer, and profiles measure
up to here, so nothing needs to be extrapolated."""


class Workload(Struct, frozen=True, kw_only=True):
    """What the stages are to carry. `expected_tokens` rows are in the KV cache when a decode step is priced."""

    context_tokens: int
    slots: int
    prefill_chunk_tokens: int
    expected_tokens: int
    engine: EngineName = "onnxruntime"
    accept_unsteady: bool = False
    """Use timings that the board itself marked invalid (drift, p90 above twice the median), and say so."""
    reserve_fraction: float = RESERVE_FRACTION
    """Share of each board's usable memory that stays free."""


class LinkCost(Struct, frozen=True, kw_only=True):
    """A device's own link, symmetrical as far as is known."""

    one_way_s: float
    """One crossing of this link by `probe_bytes`, with half of the broker."""
    probe_bytes: int
    bytes_per_s: float
    error_s: float = 0.0
    """Half the 95 % interval of `one_way_s`."""

    def crossing_s(self, payload_bytes: int) -> float:
        """Seconds for one crossing of this link by so many bytes, with half of the broker."""
        return self.one_way_s + max(0, payload_bytes - self.probe_bytes) / self.bytes_per_s


def central_s(sender: LinkCost, receiver: LinkCost, payload_bytes: int) -> float:
    """Seconds for so many bytes over the one link, the broker and the other link."""
    first_bytes = min(payload_bytes, CHUNK_BYTES_DEFAULT)
    slower = min(sender.bytes_per_s, receiver.bytes_per_s)
    return sender.crossing_s(first_bytes) + receiver.crossing_s(first_bytes) + (payload_bytes - first_bytes) / slower


class StepCost(Struct, frozen=True, kw_only=True):
    """Seconds of one module, and of a step whatever it holds."""

    module_s: float
    overhead_s: float
    notes: tuple[str, ...] = ()
    module_error_s: float = 0.0
    """Half the 95 % interval of `module_s`; `overhead_error_s` that of `overhead_s`."""
    overhead_error_s: float = 0.0


class Batch(Struct, frozen=True, kw_only=True):
    """A decode step of one row of each of several requests, as DeviceCost has it of one."""

    rows: int
    overhead_s: float
    decode_s: Mapping[str, float]


class Power(Struct, frozen=True, kw_only=True):
    """Watts of a whole board, as measured: while it computes, and while it waits. `covers`: what the meter sees."""

    active_w: float
    idle_w: float
    covers: str = ""


class DeviceCost(Struct, frozen=True, kw_only=True):
    """One device priced for one graph and workload. Seconds by profile key; a step is one token."""

    device: str
    usable_bytes: int
    memory_limit_bytes: int
    worker_base_bytes: int
    overhead_s: float
    decode_s: Mapping[str, float]
    """Marginal seconds of one module of that key per decoded token; every key of the graph is in it."""
    prefill_overhead_s: float
    prefill_s: Mapping[str, float]
    """The same for one prefill chunk; empty when not measured (see `notes`)."""
    held_ratio: Mapping[str, float]
    """Bytes the engine holds per byte of weights, at least 1: kernels may keep a packed copy. Less for an embedding: of
    its table it holds the pages that were looked up, which are the file's own."""
    batches: tuple[Batch, ...]
    """Decode steps of several requests, by rising number; no row takes longer than with fewer."""
    link: LinkCost | None
    link_because: str
    """Why `link` is missing: such a device can only hold the whole model."""
    notes: tuple[str, ...] = ()
    """What was extrapolated, simplified or taken although unsteady."""
    overhead_error_s: float = 0.0
    """Half the 95 % interval of `overhead_s`; `decode_error_s` by profile key (coordinator.planning.uncertainty)."""
    decode_error_s: Mapping[str, float] = {}
    power: Power | None = None
    """None: nothing measured it."""
    engine: EngineName = "onnxruntime"
    """With which it was priced (coordinator.planning.engines)."""
    engine_because: str = ""
    """Why with this one, where it has measured others."""
    working_bytes: Mapping[str, int] = {}
    """What each takes beside its weights: of modules that items pass while it runs, one after the other; of blocks what
    a stage of them takes once, however many there are."""
    slowed_because: str = ""
    """Why the seconds are more than was measured (coordinator.planning.slowed)."""

    def stage_s(self, modules: Iterable[Module]) -> float:
        """Seconds per decoded token of a stage of these modules."""
        return self.overhead_s + sum(self.decode_s[module.profile_key] for module in modules)

    def stage_batches_s(self, modules: Sequence[Module]) -> tuple[tuple[int, float], ...]:
        """(requests, seconds of a decode step of a stage of these modules, one row of each)."""
        return tuple(
            (batch.rows, batch.overhead_s + sum(batch.decode_s[module.profile_key] for module in modules))
            for batch in self.batches
        )

    def busy_j(self, seconds: float | None) -> float | None:
        """Joules for so much work of whatever phase; None when seconds or power were not measured."""
        return None if seconds is None or self.power is None else self.power.active_w * seconds

    def stage_prefill_s(self, modules: Iterable[Module]) -> float | None:
        """Seconds per prefill chunk of a stage of these modules; None when prefill was not measured."""
        keys = [module.profile_key for module in modules]
        if not all(key in self.prefill_s for key in keys):
            return None
        return self.prefill_overhead_s + sum(self.prefill_s[key] for key in keys)


def memory_limit_bytes(usable_bytes: int, reserve_fraction: float = RESERVE_FRACTION) -> int:
    """What stages may take of `usable_bytes`: all but the reserve, at least 0."""
    return max(0, usable_bytes - max(RESERVE_MIN_BYTES, int(usable_bytes * reserve_fraction)))


class StageMemory:
    """Adds up what a growing stage needs on one device; files that its modules share are counted once."""

    def __init__(self, graph: Graph, workload: Workload, cost: DeviceCost) -> None:
        self._ratio = cost.held_ratio
        self._base_bytes = cost.worker_base_bytes + TRANSPORT_BYTES
        self._scratch_bytes = workload.prefill_chunk_tokens * graph.hidden * 4 * SCRATCH_ROWS_FACTOR
        self._tokens = workload.context_tokens * workload.slots
        self._looked_up = min(1.0, self._tokens / graph.vocabulary) if graph.items is None else 0.0
        self._logits_bytes = graph.vocabulary * 4 * workload.slots
        self._files: dict[str, int] = {}
        self._working = cost.working_bytes
        self.working_bytes = 0
        """The most that one of its modules takes beside its weights."""
        self.held_bytes = 0
        """Weights, KV cache and scratch: what the stage itself accounts for."""

    def add(self, module: Module) -> int:
        """Take one more module into the stage; give `memory_bytes` after it."""
        weights = int(module.weight_bytes * self._ratio.get(module.profile_key, 1.0))
        if module.kind == "embedding":  # mapped from its file: of its rows those are held that were looked up
            weights = max(weights, int(module.weight_bytes * self._looked_up))
        # The bytes of a module are split over its files by number only: exact where it has one, as packed models do,
        # and a module that adds nothing but known files adds what it holds beyond them.
        known = sum(self._files.get(digest, 0) for digest in module.artifacts)
        added = max(0, weights - known)
        fresh = [digest for digest in module.artifacts if digest not in self._files]
        for digest in fresh:
            self._files[digest] = added // len(fresh)
        self.held_bytes += added + module.kv_bytes_per_token * self._tokens
        if module.kind == "head":
            self.held_bytes += self._logits_bytes
        self.working_bytes = max(self.working_bytes, self._working.get(module.profile_key, 0))
        return self.memory_bytes

    @property
    def memory_bytes(self) -> int:
        """What the stage needs on the device in all."""
        return self._base_bytes + self._scratch_bytes + self.working_bytes + self.held_bytes


def stage_memory(graph: Graph, workload: Workload, cost: DeviceCost, modules: Iterable[Module]) -> tuple[int, int]:
    """Give (held_bytes, memory_bytes) of a stage of these modules."""
    memory = StageMemory(graph, workload, cost)
    for module in modules:
        memory.add(module)
    return memory.held_bytes, memory.memory_bytes


def stage_modules(graph: Graph, stage: PlannedStage) -> list[Module]:
    """The modules that a stage of a plan holds, in the graph's order."""
    names = ["embedding"] if stage.embedding else []
    names += [f"block.{number}" for number in range(stage.first_block, stage.end_block)]
    names += ["head"] if stage.head else []
    return [graph.module(name) for name in names]


def device_cost(
    graph: Graph, device: str, profile: Profile, usable_bytes: int, workload: Workload
) -> DeviceCost | LeftOut:
    """Price a device for a graph, or say why it can't be priced."""
    measured: dict[str, ModuleMeasurement] = {}
    for measurement in profile.modules:
        if measurement.engine.split()[:1] == [workload.engine]:
            measured.setdefault(measurement.key, measurement)
    wanted = {module.profile_key: module for module in graph.modules}
    missing = [key for key in wanted if key not in measured]
    if missing:
        names = ", ".join(sorted({wanted[key].kind for key in missing}))
        reasons = sorted({profile.failed[key] for key in missing if key in profile.failed})
        if reasons:
            return LeftOut(device=device, because=f"could not measure {names} of {graph.model}: {'; '.join(reasons)}")
        return LeftOut(device=device, because=f"has not measured {names} of {graph.model} on {workload.engine}")
    decode: dict[str, StepCost] = {}
    several: dict[int, dict[str, StepCost]] = {rows: {} for rows in BATCHES}
    prefill: dict[str, StepCost] = {}
    notes: list[str] = []
    items = graph.items
    for key, module in wanted.items():
        if items is not None:
            item = step_cost(measured[key], "prefill", items.rows, workload)
            if isinstance(item, str):
                return LeftOut(device=device, because=f"{module.kind}: {item}")
            decode[key] = item
            notes.extend(f"{module.kind}: {note}" for note in item.notes)
            continue
        step = step_cost(measured[key], "decode", 1, workload)
        if isinstance(step, str):
            return LeftOut(device=device, because=f"{module.kind}, decode: {step}")
        decode[key] = step
        for rows, steps in several.items():
            steps[key] = rows_cost(measured[key], step, rows)
        notes.extend(f"{module.kind}, decode: {note}" for note in step.notes)
        chunk = step_cost(measured[key], "prefill", workload.prefill_chunk_tokens, workload)
        if isinstance(chunk, str):
            notes.append(f"{module.kind}, prefill: {chunk}")
        else:
            prefill[key] = chunk
    blocks = {key for key, module in wanted.items() if module.kind == "block"}
    held = {key: _held(measured[key], module, items is not None) for key, module in wanted.items()}
    overhead_s, decode_s = _share_overhead(decode, blocks)
    batches = () if items is not None else _batches(overhead_s, decode_s, several, blocks)
    prefill_overhead_s, prefill_s = _share_overhead(prefill, blocks)
    link, link_because = link_cost(profile)
    if link is not None and link_because:
        notes.append(link_because)
    return DeviceCost(
        device=device,
        usable_bytes=usable_bytes,
        memory_limit_bytes=memory_limit_bytes(usable_bytes, workload.reserve_fraction),
        worker_base_bytes=max(measured[key].base_bytes for key in wanted),
        overhead_s=overhead_s,
        decode_s=decode_s,
        batches=batches,
        prefill_overhead_s=prefill_overhead_s,
        prefill_s=prefill_s,
        held_ratio={key: ratio for key, (ratio, _) in held.items()},
        working_bytes={key: working for key, (_, working) in held.items() if working},
        link=link,
        link_because="" if link else link_because,
        engine=workload.engine,
        notes=tuple(dict.fromkeys(notes)),
        overhead_error_s=max((step.overhead_error_s for key, step in decode.items() if key in blocks), default=0.0),
        decode_error_s={key: step.module_error_s for key, step in decode.items()},
    )


def _batches(
    overhead_s: float, decode_s: Mapping[str, float], several: Mapping[int, Mapping[str, StepCost]], blocks: set[str]
) -> tuple[Batch, ...]:
    """Steps of so many rows; none takes longer by the row than one of fewer, nor less in all."""
    found: list[Batch] = []
    before = Batch(rows=1, overhead_s=overhead_s, decode_s=decode_s)
    for rows, steps in sorted(several.items()):
        once_s, each_s = _share_overhead(steps, blocks)
        times = rows / before.rows
        before = Batch(
            rows=rows,
            overhead_s=min(max(once_s, before.overhead_s), times * before.overhead_s),
            decode_s={
                key: min(max(seconds, before.decode_s[key]), times * before.decode_s[key])
                for key, seconds in each_s.items()
            },
        )
        found.append(before)
    return tuple(found)


def _share_overhead(steps: Mapping[str, StepCost], blocks: set[str]) -> tuple[float, dict[str, float]]:
    """Give the overhead of one step and the marginal seconds of each key. What was timed alone holds an overhead."""
    overhead_s = max((step.overhead_s for key, step in steps.items() if key in blocks), default=0.0)
    marginal = {
        key: step.module_s if key in blocks else max(0.0, step.overhead_s + step.module_s - overhead_s)
        for key, step in steps.items()
    }
    return overhead_s, marginal


def _held(measurement: ModuleMeasurement, module: Module, of_items: bool) -> tuple[float, int]:
    """What the process grew by for each byte of weights, between the bounds that DeviceCost.held_ratio names, and what
    it grew by beside them; (1, 0) where that was not measured."""
    grown, shallow, weights = measurement.resident_bytes, measurement.shallow_bytes, module.weight_bytes
    if grown <= 0:
        return 1.0, 0
    least = 0.0 if module.kind == "embedding" else 1.0
    if of_items:
        return (max(least, min(1.0, grown / weights)) if weights > 0 else 1.0), max(0, grown - weights)
    depths = {timing.stack for timing in measurement.timings} or {1}
    each, once = grown / max(depths), 0.0
    if 0 < shallow < grown:  # two depths tell what each block holds from what a stage takes once
        each = (grown - shallow) / (max(depths) - min(depths))
        once = max(0.0, shallow - min(depths) * each)
    return (max(least, each / weights) if weights > 0 else 1.0), int(once)


def step_cost(measurement: ModuleMeasurement, phase: Phase, tokens: int, workload: Workload) -> StepCost | str:
    """Give the cost of a module and of a step, at the workload's context; or say why it is not known."""
    # What several requests take together says nothing of one (see row_cost).
    offered = [
        step for step in estimate(measurement).steps if step.phase == phase and (phase == "prefill" or step.tokens == 1)
    ]
    if not offered:
        return "not measured"
    taken = [step for step in offered if step.valid]
    notes: list[str] = []
    if not taken:
        because = offered[0].because
        taken = [step for step in offered if step.block_s > 0]
        if not (taken and workload.accept_unsteady):
            return f"the figures can't be trusted ({because})"
        notes.append(f"taken although not to be trusted ({because})")
    if measurement.kind == "block" and len({timing.stack for timing in measurement.timings}) == 1:
        notes.append(taken[0].because)
    module_s, said = _at(taken, tokens, workload.expected_tokens, lambda step: step.block_s)
    overhead_s, _ = _at(taken, tokens, workload.expected_tokens, lambda step: step.overhead_s)
    module_error_s, _ = _at(taken, tokens, workload.expected_tokens, lambda step: step.block_high_s - step.block_s)
    high_s, _ = _at(taken, tokens, workload.expected_tokens, lambda step: step.overhead_high_s - step.overhead_s)
    return StepCost(
        module_s=module_s,
        overhead_s=overhead_s,
        notes=(*notes, *said),
        module_error_s=max(0.0, module_error_s),
        overhead_error_s=max(0.0, high_s),
    )


def rows_cost(measurement: ModuleMeasurement, step: StepCost, rows: int) -> StepCost:
    """What a decode step of so many requests takes, one row of each, given what one of a single row does at the
    workload's context. No more than as many steps; a longer context is as much longer for each row."""
    valid = [found for found in estimate(measurement).steps if found.valid and found.phase == "decode"]
    several = [found for found in valid if found.tokens > 1]
    alone = [found for found in valid if found.tokens == 1]

    def at(figure: Callable[[StepEstimate], float], now: float) -> float:
        if not several or not alone:
            return rows * now
        context = several[0].context
        there = interpolated({found.context: figure(found) for found in alone}, context)
        points = {1: there, **{found.tokens: figure(found) for found in several if found.context == context}}
        return interpolated(points, rows) + rows * (now - there)

    module_s, overhead_s = at(lambda found: found.block_s, step.module_s), at(lambda f: f.overhead_s, step.overhead_s)
    return StepCost(module_s=max(0.0, module_s), overhead_s=max(0.0, overhead_s))


def _at(
    steps: Sequence[StepEstimate], tokens: int, context: int, figure: Callable[[StepEstimate], float]
) -> tuple[float, list[str]]:
    """A figure at `tokens` rows and `context` cached rows, from the measured points; and what to say about it."""
    by_tokens: dict[int, float] = {}
    notes: list[str] = []
    for rows in sorted({step.tokens for step in steps}):
        points = {step.context: figure(step) for step in steps if step.tokens == rows}
        by_tokens[rows] = interpolated(points, context)
        if len(points) > 1 and context > max(points):
            notes.append(f"context {context} extrapolated from {max(points)}")
    if tokens > max(by_tokens):
        notes.append(f"{tokens} rows extrapolated from {max(by_tokens)}")
    if len(by_tokens) == 1:
        rows, seconds = next(iter(by_tokens.items()))
        return seconds * tokens / rows, notes
    return interpolated(by_tokens, tokens), notes


def interpolated(points: Mapping[int, float], at: int) -> float:
    """Linear between measured points; constant below the first; beyond the last with the last slope, never falling."""
    places = sorted(points)
    if at <= places[0] or len(places) == 1:
        return points[places[0]]
    high = next((place for place in places if place >= at), places[-1])
    low = places[places.index(high) - 1]
    slope = (points[high] - points[low]) / (high - low)
    if at > high:
        return points[high] + max(0.0, slope) * (at - high)
    return points[low] + slope * (at - low)


def link_cost(profile: Profile) -> tuple[LinkCost | None, str]:
    """Give a link's cost and what to say about it; None and the reason when it was not measured.

    An unsteady link stays usable: jitter is a property of links.
    """
    measurement = profile.link
    if not isinstance(measurement, LinkMeasurement):
        return None, f"link not measured: {measurement.because}"
    rate = bytes_per_s(measurement)
    half_s = one_way_s(measurement)
    if rate is None or half_s is None:
        return None, "link not measured: its samples give no rate"
    low_s, high_s = median_interval(measurement.round_trip.samples_s) or (0.0, 0.0)
    link = LinkCost(
        one_way_s=half_s,
        probe_bytes=measurement.round_trip_payload_bytes,
        bytes_per_s=rate,
        error_s=(high_s - low_s) / 4,  # half of the interval, of half of the round trip
    )
    return link, _unsteady(measurement.round_trip) or _unsteady(measurement.goodput)


def _unsteady(samples: Samples) -> str:
    return "" if samples.valid else f"link unsteady ({samples.invalid_because or 'marked invalid'})"
