"""What every run of modules would need on one device, at once. Pure.

Files that modules share are counted once in a run (coordinator.planning.cost). Such modules are few, so the need of all
others is a difference of sums, and only those that share are added one by one.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt

from coordinator.planning.cost import DeviceCost, StageMemory, Workload
from models.graph import Graph

Bytes = npt.NDArray[np.int64]


def run_needs(graph: Graph, workload: Workload, cost: DeviceCost) -> Bytes:
    """[L + 1, L + 1] bytes that a stage of modules i to j - 1 needs on a device in all; read it where i < j."""
    length = len(graph.modules)
    alone = [_held(graph, workload, cost, [place])[0] for place in range(length)]
    sums = np.concatenate([[0], np.cumsum(alone, dtype=np.int64)]).astype(np.int64)
    needs: Bytes = sums[None, :] - sums[:, None] + StageMemory(graph, workload, cost).memory_bytes
    holders = Counter(digest for module in graph.modules for digest in set(module.artifacts))
    shared = [place for place, module in enumerate(graph.modules) if any(holders[d] > 1 for d in module.artifacts)]
    for number, place in enumerate(shared):
        # Runs that begin behind the one before, and not behind this one, hold these.
        begin = shared[number - 1] + 1 if number else 0
        together = _held(graph, workload, cost, shared[number:])
        for later, held in zip(shared[number:], together, strict=True):
            needs[begin : place + 1, later + 1 :] += held - alone[later]
    working = [cost.working_bytes.get(module.profile_key, 0) for module in graph.modules]
    for begin in range(length if any(working) else 0):
        needs[begin, begin + 1 :] += np.maximum.accumulate(np.array(working[begin:], dtype=np.int64))
    return needs


def _held(graph: Graph, workload: Workload, cost: DeviceCost, places: list[int]) -> list[int]:
    """What each of these modules adds to a stage of them alone, in order."""
    memory, held, before = StageMemory(graph, workload, cost), [], 0
    for place in places:
        memory.add(graph.modules[place])
        held.append(memory.held_bytes - before)
        before = memory.held_bytes
    return held
