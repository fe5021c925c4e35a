"""A graph and priced devices as arrays: the problem that is solved. Pure.

The modules of a graph are a chain: cut i lies before module i, and what crosses it is one token's hidden state; over
the last cut goes the token id, from the head back to the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

import numpy as np

from coordinator.planning.cost import DeviceCost, StageMemory, Workload
from coordinator.planning.partition import Flags, Floats, Problem
from models.graph import Graph
from wire.errors import Refused
from wire.frames import header_bytes

TOKEN_ID_BYTES: Final = 4
"""A token id travels as int32 [1]."""


def hop_bytes(graph: Graph) -> tuple[int, ...]:
    """Payload bytes of the message over each cut for one decoded token, header included; nothing crosses cut 0.

    Raises Refused if the graph is not a chain.
    """
    edges = {(edge.source, edge.target): edge.bytes_per_token for edge in graph.edges}
    names = [module.name for module in graph.modules]
    steps = list(pairwise(names))
    if set(steps) != set(edges):
        raise Refused(f"{graph.model}: its modules are no chain, and only chains can be cut so far")
    return (0, *(edges[step] + header_bytes(2) for step in steps), TOKEN_ID_BYTES + header_bytes(1))


def make_problem(graph: Graph, workload: Workload, costs: Sequence[DeviceCost], pins: Mapping[str, str]) -> Problem:
    """Put the devices' costs into arrays; `pins` (module -> device) become places where a stage may not be."""
    seconds = [[cost.decode_s[module.profile_key] for module in graph.modules] for cost in costs]
    hop, transfer = _links(costs, hop_bytes(graph))
    return Problem(
        devices=tuple(cost.device for cost in costs),
        seconds=np.array(seconds, dtype=np.float64).reshape(len(costs), len(graph.modules)),
        overhead_s=np.array([cost.overhead_s for cost in costs], dtype=np.float64),
        fits=np.array([_fits(graph, workload, cost, pins) for cost in costs], dtype=np.bool_),
        hop_s=hop,
        transfer_s=transfer,
    )


def _fits(graph: Graph, workload: Workload, cost: DeviceCost, pins: Mapping[str, str]) -> Flags:
    """[L + 1, L + 1] whether the device may hold modules i to j - 1: memory suffices, and no pin is elsewhere."""
    length = len(graph.modules)
    fits = np.zeros((length + 1, length + 1), dtype=np.bool_)
    for first in range(length):
        memory = StageMemory(graph, workload, cost)
        for place, module in enumerate(graph.modules[first:], start=first):
            elsewhere = pins.get(module.name, cost.device) != cost.device
            if elsewhere or memory.add(module) > cost.memory_limit_bytes:
                break
            fits[first, place + 1] = True
    return fits


def _links(costs: Sequence[DeviceCost], payloads: Sequence[int]) -> tuple[Floats, Floats]:
    """Latency and occupancy [N, N, L + 1]; 0 on the diagonal, infinite where a link was not measured."""
    crossing = np.array(
        [[cost.link.crossing_s(size) if cost.link else np.inf for size in payloads] for cost in costs], dtype=np.float64
    ).reshape(len(costs), len(payloads))
    busy = np.array(
        [[size / cost.link.bytes_per_s if cost.link else np.inf for size in payloads] for cost in costs],
        dtype=np.float64,
    ).reshape(len(costs), len(payloads))
    hop = crossing[:, None, :] + crossing[None, :, :]
    transfer = np.maximum(busy[:, None, :], busy[None, :, :])
    same = np.arange(len(costs))
    hop[same, same], transfer[same, same] = 0.0, 0.0
    return hop, transfer
