"""Second copies of stages: on which boards they wait, and what becomes of a plan when one takes over. Pure.

A copy is the whole stage in a worker of its own, on a board that does not have the stage yet; so the loss of any one
board leaves each stage loaded somewhere. It must fit beside what the board holds already, under the same limit as a
stage (coordinator.planning.cost). Among the ways to place all copies the one is taken after which a loss costs least:
the sum, over the copies, of the time that their stage would take there. The cut itself is chosen without them.

A copy that takes over has the stage's very files, sizes and place in the ring, so nothing is cut anew, sent or loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

import msgspec

from coordinator.measured import blocks_text
from coordinator.planning.aims import filled_s
from coordinator.planning.cost import DeviceCost, LinkCost, central_s, stage_memory, stage_modules
from coordinator.planning.partition import Infeasible
from coordinator.planning.plan import LeftOut, Plan, PlannedStage, Standby
from coordinator.planning.planner import request_of
from coordinator.planning.request import Candidate, price, workload_of
from models.graph import Graph
from wire.messages import InboxAddress
from wire.units import bytes_text

MAX_TRIED: Final = 20_000
"""Partial placements looked at before the best one found so far is taken: half a second. A handful of boards needs far
fewer, and many boards have room."""

MAX_NAMED: Final = 3
"""Stages without a place that an error describes, and boards that it names for each: those with most room."""

MISSING_S: Final = 1e6
"""What a copy that is nowhere counts: more than any time."""

TOOK_OVER: Final = " After a loss: "
"""Begins the sentence of a plan's reason that says which copies took over."""

Key = tuple[int, str]
"""(stage, device)"""

Way = Callable[[str, str, float], "tuple[str, float]"]
"""(sender, receiver, seconds through the site's broker) -> broker ('' is the site's) and seconds."""


class _Hop(NamedTuple):
    """Seconds on the way, and for which the busier link is kept."""

    hop_s: float
    transfer_s: float


class _Offer(NamedTuple):
    standby: Standby
    value_s: float


def with_standbys(
    plan: Plan,
    graph: Graph,
    candidates: Sequence[Candidate],
    replicas: int,
    *,
    barred: Collection[Key] = (),
    partly: bool = False,
) -> Plan:
    """The plan with `replicas` copies of each stage; those that it has already stay where they are.

    Raises Infeasible, which says what is missing, where they don't fit. With `partly` as many are placed as do fit, and
    the plan says which are missing.
    """
    boards = boards_of(plan, graph, candidates)
    rooms = {device: cost.memory_limit_bytes - held_on(plan, device) for device, cost in boards.items()}
    slots: list[tuple[PlannedStage, list[_Offer]]] = []
    for stage in plan.stages:
        have = {stage.device, *(standby.device for standby in plan.standbys if standby.stage == stage.stage)}
        offers = [
            offer
            for device, cost in boards.items()
            if device not in have and (stage.stage, device) not in barred
            if (offer := _offer(plan, graph, stage, cost, boards)) is not None
            if offer.standby.memory_bytes <= rooms[device]
        ]
        offers.sort(key=lambda offer: (offer.value_s, offer.standby.device))
        slots += [(stage, offers)] * max(0, replicas - len(have))
    slots.sort(key=lambda slot: len(slot[1]))
    chosen = _Search([offers for _, offers in slots], rooms).best
    without = [stage for (stage, _), found in zip(slots, chosen, strict=True) if found is None]
    for found in chosen:
        if found is not None:
            rooms[found.standby.device] -= found.standby.memory_bytes
    because = _missing_text(plan, graph, boards, rooms, without, replicas) if without else ""
    if without and not partly:
        raise Infeasible(f"{plan.model}: {because}", try_=_advice(plan))
    standbys = [*plan.standbys, *(found.standby for found in chosen if found is not None)]
    standbys.sort(key=lambda standby: (standby.stage, standby.device))
    return msgspec.structs.replace(plan, replicas=replicas, standbys=tuple(standbys), replicas_because=because)


def taken_over(
    plan: Plan, lost: Collection[int], ready: Collection[Key], gone: Collection[str], way: Way
) -> Plan | None:
    """The same cut with copies in the places of the `lost` stages; None if one of these has no copy that is ready.

    Copies on devices that are `gone` are left out, and `way` says through which broker the new neighbours in the ring
    reach each other. The plan's epoch is the caller's to change.
    """
    taking: dict[int, Standby] = {}
    for standby in sorted(plan.standbys, key=lambda standby: standby.compute_s, reverse=True):
        if standby.stage in lost and standby.device not in gone and (standby.stage, standby.device) in ready:
            taking[standby.stage] = standby
    if not lost or set(taking) != set(lost):
        return None
    stages = [_moved(stage, taking[stage.stage]) if stage.stage in lost else stage for stage in plan.stages]
    stages = _joined(stages, taking, way)
    by_device: dict[str, float] = {}
    for stage in stages:
        by_device[stage.device] = by_device.get(stage.device, 0.0) + filled_s(plan, stage)
    before_s = sum(stage.compute_s + stage.hop_s for stage in plan.stages)
    after_s = sum(stage.compute_s + stage.hop_s for stage in stages)
    moves = [f"stage {number} goes on on {found.device}" for number, found in sorted(taking.items())]
    left = {stage.device for stage in plan.stages} - by_device.keys()
    said = [LeftOut(device=device, because="lost; copies of its stages took over") for device in sorted(left)]
    left_out = [found for found in plan.left_out if found.device not in left | by_device.keys()]
    standbys = tuple(s for s in plan.standbys if s.device not in gone and s is not taking.get(s.stage))
    return msgspec.structs.replace(
        plan,
        topology="direct" if any(stage.inbox.broker for stage in stages) else "central",
        stages=tuple(stages),
        left_out=(*left_out, *said),
        predicted_token_s=plan.predicted_token_s - before_s + after_s,
        predicted_first_token_s=None,
        predicted_slowest_s=max(plan.predicted_slowest_s, *by_device.values()),
        because=f"{plan.because.partition(TOOK_OVER)[0]}{TOOK_OVER}{', '.join(moves)}.",
        standbys=standbys,
        replicas_because=_bare_text(plan, standbys),
    )


def covered(plan: Plan) -> bool:
    """Whether after the loss of any one board each stage is loaded somewhere."""
    return all(
        any(standby.stage == stage.stage and standby.device != stage.device for standby in plan.standbys)
        for stage in plan.stages
    )


def copies_text(replicas: int, held_bytes: int, because: str) -> str:
    """'2 copies of each stage; those that wait need 210.5 MB', and what is missing."""
    count = f"{replicas} copies of each stage; those that wait need {bytes_text(held_bytes)}"
    return f"{count}; {because}" if because else count


def held_on(plan: Plan, device: str) -> int:
    """Bytes that a plan's stages, and copies of them, need on a device."""
    stages = sum(stage.memory_bytes for stage in plan.stages if stage.device == device)
    return stages + sum(standby.memory_bytes for standby in plan.standbys if standby.device == device)


def boards_of(plan: Plan, graph: Graph, candidates: Sequence[Candidate]) -> dict[str, DeviceCost]:
    """The boards that could hold a copy of something, by name. Unsteady figures will do: a copy that may be slower than
    foreseen is better than none."""
    request = msgspec.structs.replace(request_of(plan), accept_unsteady=True)
    return {cost.device: cost for cost in price(graph, candidates, request).costs}


def _offer(
    plan: Plan, graph: Graph, stage: PlannedStage, cost: DeviceCost, boards: dict[str, DeviceCost]
) -> _Offer | None:
    """A copy of a stage on a board; None if it could not take part in the ring there."""
    modules, count = stage_modules(graph, stage), len(plan.stages)
    before, after = plan.stages[stage.stage - 1], plan.stages[(stage.stage + 1) % count]
    coming = going = _Hop(0.0, 0.0)
    if count > 1:
        if cost.link is None:
            return None
        links = {device: found.link for device, found in boards.items() if found.link is not None}
        coming = _hop(cost.link, links.get(before.device, cost.link), before.hop_bytes)
        going = _hop(cost.link, links.get(after.device, cost.link), stage.hop_bytes)
    held_bytes, memory_bytes = stage_memory(graph, workload_of(request_of(plan)), cost, modules)
    standby = Standby(
        stage=stage.stage,
        device=cost.device,
        held_bytes=held_bytes,
        memory_bytes=memory_bytes,
        memory_limit_bytes=cost.memory_limit_bytes,
        compute_s=cost.stage_s(modules),
        prefill_chunk_s=cost.stage_prefill_s(modules),
        hop_in_s=coming.hop_s,
        hop_s=going.hop_s,
        transfer_in_s=coming.transfer_s,
        transfer_s=going.transfer_s,
        engine=cost.engine,
    )
    value_s = standby.compute_s + standby.hop_in_s + standby.hop_s
    if plan.objective == "throughput":  # a board that works already would have both to do for each token
        value_s += sum(other.compute_s for other in plan.stages if other.device == cost.device)
    return _Offer(standby, value_s)


def _hop(one: LinkCost, other: LinkCost, size: int) -> _Hop:
    """A message between two boards through the site's broker, whoever sends it."""
    busy_s = max(size / one.bytes_per_s, size / other.bytes_per_s)
    return _Hop(central_s(one, other, size), busy_s)


class _Search:
    """The best way to take one offer from each list, or none: all places are tried, the best first, and what can't
    become better than the best so far is not followed."""

    def __init__(self, slots: Sequence[Sequence[_Offer]], rooms: dict[str, int]) -> None:
        self._slots = slots
        self._rooms = dict(rooms)
        self._least = [0.0]
        """At most what the last n lists can cost."""
        for offers in reversed(slots):
            self._least.append(self._least[-1] + min((offer.value_s for offer in offers), default=MISSING_S))
        self._taken: list[_Offer | None] = []
        self._tried = 0
        self._best_s = float("inf")
        self.best: list[_Offer | None] = []
        self._follow(0.0)

    def _follow(self, value_s: float) -> None:
        place = len(self._taken)
        self._tried += 1
        if value_s + self._least[len(self._slots) - place] >= self._best_s:
            return
        if place == len(self._slots):
            self._best_s, self.best = value_s, list(self._taken)
            return
        for offer in self._slots[place]:
            standby = offer.standby
            if standby.memory_bytes > self._rooms[standby.device] or self._has(standby):
                continue
            self._rooms[standby.device] -= standby.memory_bytes
            self._taken.append(offer)
            self._follow(value_s + offer.value_s)
            self._taken.pop()
            self._rooms[standby.device] += standby.memory_bytes
            if self._tried > MAX_TRIED and self.best:
                return
        self._taken.append(None)
        self._follow(value_s + MISSING_S)
        self._taken.pop()

    def _has(self, standby: Standby) -> bool:
        """Whether another copy of the stage is on this device already."""
        return any(
            taken is not None and (taken.standby.stage, taken.standby.device) == (standby.stage, standby.device)
            for taken in self._taken
        )


def _moved(stage: PlannedStage, standby: Standby) -> PlannedStage:
    times = standby.compute_s / max(stage.compute_s, 1e-12)
    return msgspec.structs.replace(
        stage,
        device=standby.device,
        held_bytes=standby.held_bytes,
        memory_bytes=standby.memory_bytes,
        memory_limit_bytes=standby.memory_limit_bytes,
        compute_s=standby.compute_s,
        batches_s=tuple((rows, step_s * times) for rows, step_s in stage.batches_s),
        prefill_chunk_s=standby.prefill_chunk_s,
        engine=standby.engine,
        because=f"{standby.device}: had a copy of stage {stage.stage}, which was on {stage.device}",
    )


def _joined(stages: list[PlannedStage], taking: dict[int, Standby], way: Way) -> list[PlannedStage]:
    """The ring closed again round the stages that moved; hops between stages that did not are as they were."""
    count = len(stages)
    if count == 1:
        return [_reached(stages[0], "")]
    joined = list(stages)
    for number in range(count):
        following = (number + 1) % count
        if number not in taking and following not in taking:
            continue
        # Where both moved, this was reckoned with the link of one that is gone: near enough until the next plan.
        copy = taking.get(number)
        if copy is not None:
            hop = _Hop(copy.hop_s, copy.transfer_s)
        else:
            hop = _Hop(taking[following].hop_in_s, taking[following].transfer_in_s)
        broker, hop_s = way(stages[number].device, stages[following].device, hop.hop_s)
        joined[number] = msgspec.structs.replace(joined[number], hop_s=hop_s, transfer_s=hop.transfer_s)
        joined[following] = _reached(joined[following], broker)
    return joined


def _reached(stage: PlannedStage, broker: str) -> PlannedStage:
    return msgspec.structs.replace(stage, inbox=InboxAddress(topic=stage.inbox.topic, broker=broker))


def _bare_text(plan: Plan, standbys: Sequence[Standby]) -> str:
    """Which stages are without all of their copies for now."""
    short = [
        str(stage.stage)
        for stage in plan.stages
        if sum(standby.stage == stage.stage for standby in standbys) < plan.replicas - 1
    ]
    if not short:
        return ""
    what = f"stage {short[0]} has" if len(short) == 1 else f"stages {', '.join(short)} have"
    return f"{what} fewer for now: lost, and not made again yet"


def _missing_text(
    plan: Plan,
    graph: Graph,
    boards: dict[str, DeviceCost],
    rooms: dict[str, int],
    without: Sequence[PlannedStage],
    replicas: int,
) -> str:
    """Which copies find no place: what they need, and what boards have left."""
    if len(boards) < replicas:
        there = ", ".join(boards) or "none"
        return f"{replicas} copies of each stage need {replicas} boards, and there are {len(boards)} ({there})"
    parts = []
    stages = list(dict.fromkeys(without))
    for stage in stages[:MAX_NAMED]:
        modules = stage_modules(graph, stage)
        holds = blocks_text(stage.embedding, stage.first_block, stage.end_block, stage.head)
        others = sorted(boards.keys() - {stage.device}, key=lambda device: (-rooms[device], device))
        needs = max(stage_memory(graph, workload_of(request_of(plan)), boards[device], modules)[1] for device in others)
        left = ", ".join(f"{device} {bytes_text(max(0, rooms[device]))}" for device in others[:MAX_NAMED])
        parts.append(f"stage {stage.stage} ({holds}) needs {bytes_text(needs)} on another board; left are {left}")
    more = f"; and so on for {len(stages) - MAX_NAMED} more" if len(stages) > MAX_NAMED else ""
    count = f"{len(without)} of them find no place beside the others"
    return f"{replicas} copies of each stage: {count}: {'; '.join(parts)}{more}"


def _advice(plan: Plan) -> str:
    fewer = "--slots 1, a shorter --context, " if plan.slots > 1 else "a shorter --context, "
    return f"{fewer}one more board, or fewer --replicas"
