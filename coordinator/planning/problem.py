"""A graph and priced devices as arrays: the problem that is solved. Pure.

The modules of a graph stand in topological order, and cut i lies before module i: the modules before it need nothing of
those behind it. What crosses it are all tensors that are made before it and needed behind it (models.graph); in a chain
that is one token's hidden state. Over the last cut goes the token id, from the head back to the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from coordinator.planning.cost import DeviceCost, Workload
from coordinator.planning.pairs import Direct
from coordinator.planning.partition import BatchSteps, Flags, Floats, Problem
from coordinator.planning.room import run_needs
from coordinator.planning.topology import shorter
from models.graph import Graph, Items
from wire.errors import Refused
from wire.frames import header_bytes
from wire.limits import CHUNK_BYTES_DEFAULT

NOTHING: Final[Direct] = {}

TOKEN_ID_BYTES: Final = 4
"""A token id travels as int32 [1]."""

ITEM_META_BYTES: Final = 200
"""What rides in front of an item: where its answer goes, and what it took so far."""


def hop_bytes(graph: Graph) -> tuple[int, ...]:
    """Payload bytes of the message over each cut for one decoded token, header included; nothing crosses cut 0.

    For items: with what rides in front, and the last number is what comes out. Raises Refused if the graph's modules
    are in no topological order, or nothing crosses between two of them.
    """
    live = graph.live_bytes()[1:-1]
    if not all(live):
        raise Refused(f"{graph.model}: nothing goes from its first {live.index(0) + 1} modules to the others")
    if graph.items is not None:
        around = header_bytes(1) + ITEM_META_BYTES
        return (0, *(size + around for size in live), graph.items.output_bytes + around)
    return (0, *(size + header_bytes(2) for size in live), TOKEN_ID_BYTES + header_bytes(1))


def make_problem(
    graph: Graph, workload: Workload, costs: Sequence[DeviceCost], pins: Mapping[str, str], direct: Direct = NOTHING
) -> Problem:
    """Put the devices' costs into arrays; `pins` (module -> device) become places where a stage may not be. `direct`
    are the ways between them that were measured: each is taken where it is the shorter one."""
    seconds = [[cost.decode_s[module.profile_key] for module in graph.modules] for cost in costs]
    payloads = hop_bytes(graph)
    hop, transfer = _links(costs, payloads)
    _shorten(hop, transfer, costs, payloads, direct)
    shape = (len(costs), len(graph.modules) + 1, len(graph.modules) + 1)
    needs = np.array([run_needs(graph, workload, cost) for cost in costs], dtype=np.float64).reshape(shape)
    limits = np.array([cost.memory_limit_bytes for cost in costs], dtype=np.float64).reshape(-1, 1, 1)
    open_to = np.array([_open_to(graph, cost, pins) for cost in costs], dtype=np.bool_).reshape(shape)
    if graph.items is not None:
        hop[:, :, -1], transfer[:, :, -1] = _in_and_out(costs, payloads[-1], graph.items)
    return Problem(
        devices=tuple(cost.device for cost in costs),
        seconds=np.array(seconds, dtype=np.float64).reshape(len(costs), len(graph.modules)),
        overhead_s=np.array([cost.overhead_s for cost in costs], dtype=np.float64),
        fits=open_to & (needs <= limits),
        hop_s=hop,
        transfer_s=transfer,
        share=needs / np.maximum(limits, 1.0),
        streams=workload.slots if graph.items is None else None,
        batches=_batches(graph, costs),
    )


def make_prefill_problem(
    graph: Graph, costs: Sequence[DeviceCost], chunk_tokens: int, problem: Problem, direct: Direct = NOTHING
) -> Problem:
    """The same for a chunk of a prompt. Nothing goes back to the first stage; a device that has not measured chunks
    may hold nothing."""
    modules = graph.modules
    payloads = [chunk_tokens * size for size in (*hop_bytes(graph)[:-1], 0)]
    hop, transfer = _links(costs, payloads)
    _shorten(hop, transfer, costs, payloads, direct)
    hop[:, :, -1], transfer[:, :, -1] = 0.0, 0.0
    seconds = np.array(
        [[cost.prefill_s.get(module.profile_key, np.inf) for module in modules] for cost in costs], dtype=np.float64
    ).reshape(len(costs), len(modules))
    measured: Flags = np.isfinite(seconds).min(axis=1, initial=True)
    return replace(
        problem,
        seconds=np.where(measured[:, None], seconds, 0.0),
        overhead_s=np.array([cost.prefill_overhead_s for cost in costs], dtype=np.float64),
        fits=problem.fits & measured[:, None, None],
        hop_s=hop,
        transfer_s=transfer,
        batches=(),
    )


def _batches(graph: Graph, costs: Sequence[DeviceCost]) -> tuple[BatchSteps, ...]:
    """The same with several rows to a step, for the numbers of rows that all boards are priced with."""
    return tuple(
        BatchSteps(
            many[0].rows,
            np.array([[one.decode_s[module.profile_key] for module in graph.modules] for one in many]),
            np.array([one.overhead_s for one in many]),
        )
        for many in zip(*(cost.batches for cost in costs), strict=True)
    )


def _open_to(graph: Graph, cost: DeviceCost, pins: Mapping[str, str]) -> Flags:
    """[L + 1, L + 1] whether none of the modules i to j - 1 is pinned elsewhere; false where i is not before j."""
    elsewhere = [pins.get(module.name, cost.device) != cost.device for module in graph.modules]
    barred = np.concatenate([[0], np.cumsum(elsewhere)])
    return np.triu(barred[None, :] == barred[:, None], 1)


def _shorten(
    hop: Floats, transfer: Floats, costs: Sequence[DeviceCost], payloads: Sequence[int], direct: Direct
) -> None:
    """Put in the figures of ways that were measured and are shorter."""
    place = {cost.device: number for number, cost in enumerate(costs)}
    for (sender, receiver), way in direct.items():
        a, b = place.get(sender), place.get(receiver)
        if a is None or b is None or a == b:
            continue
        for cut, size in enumerate(payloads):
            if shorter(way.hop_s(size), float(hop[a, b, cut])):
                hop[a, b, cut], transfer[a, b, cut] = way.hop_s(size), way.transfer_s(size)


def _in_and_out(costs: Sequence[DeviceCost], output_bytes: int, items: Items) -> tuple[Floats, Floats]:
    """[N, N] of the last device and the first: an answer goes from the one to who asked, an item from there to the
    other. Both cross the broker's side once and the board's link once. So they do where one board does it all: they are
    on the diagonal, and nothing where its link was not measured."""
    input_bytes = items.input_bytes + header_bytes(1) + ITEM_META_BYTES
    out = np.array([_crossing_s(cost, output_bytes) for cost in costs])
    into = np.array([_crossing_s(cost, input_bytes) for cost in costs])
    busy_out = np.array([output_bytes / cost.link.bytes_per_s if cost.link else np.inf for cost in costs])
    busy_into = np.array([input_bytes / cost.link.bytes_per_s if cost.link else np.inf for cost in costs])
    hop = out[:, None] + into[None, :]
    transfer = np.maximum(busy_out[:, None], busy_into[None, :])
    unknown = [number for number, cost in enumerate(costs) if cost.link is None]
    hop[unknown, unknown], transfer[unknown, unknown] = 0.0, 0.0
    return hop, transfer


def _crossing_s(cost: DeviceCost, size: int) -> float:
    """Of its own link; infinite where that was not measured."""
    return cost.link.crossing_s(size) if cost.link else np.inf


def _links(costs: Sequence[DeviceCost], payloads: Sequence[int]) -> tuple[Floats, Floats]:
    """Latency and occupancy [N, N, L + 1]; 0 on the diagonal, infinite where a link was not measured."""
    first = [min(size, CHUNK_BYTES_DEFAULT) for size in payloads]
    crossing = np.array([[_crossing_s(cost, size) for size in first] for cost in costs], dtype=np.float64).reshape(
        len(costs), len(payloads)
    )
    beyond = np.array(payloads, dtype=np.float64) - first
    pace = np.array([1 / cost.link.bytes_per_s if cost.link else 0.0 for cost in costs], dtype=np.float64)
    slower = np.maximum(pace[:, None], pace[None, :])[:, :, None]
    busy = np.array(
        [[size / cost.link.bytes_per_s if cost.link else np.inf for size in payloads] for cost in costs],
        dtype=np.float64,
    ).reshape(len(costs), len(payloads))
    # As central_s has it.
    hop = crossing[:, None, :] + crossing[None, :, :] + beyond * slower
    transfer = np.maximum(busy[:, None, :], busy[None, :, :])
    same = np.arange(len(costs))
    hop[same, same], transfer[same, same] = 0.0, 0.0
    return hop, transfer
