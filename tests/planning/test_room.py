"""The need of every run of modules at once is what a stage of it needs."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning.cost import DeviceCost, Workload, device_cost, stage_memory
from coordinator.planning.room import run_needs
from models.graph import Graph
from tests.planning.boards import MB, graph, profile

WORKLOAD = Workload(context_tokens=512, slots=3, prefill_chunk_tokens=64, expected_tokens=128)


def with_files(files: list[list[int]]) -> Graph:
    """A model of so many blocks in which modules hold the files of these numbers."""
    made = graph(len(files))
    blocks = [
        msgspec.structs.replace(module, artifacts=tuple(f"sha256:{number:064x}" for number in held))
        for module, held in zip(made.modules[1:-1], files, strict=True)
    ]
    return msgspec.structs.replace(made, modules=(made.modules[0], *blocks, made.modules[-1]))


@settings(max_examples=60, deadline=None)
@given(files=st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=6), held=st.floats(1.0, 3.0))
def test_all_runs_need_what_their_stages_need(files: list[list[int]], held: float) -> None:
    model = with_files(files)
    cost = device_cost(model, "pi5", profile("pi5", held=held), 4096 * MB, WORKLOAD)
    assert isinstance(cost, DeviceCost)
    needs = run_needs(model, WORKLOAD, cost)
    for first in range(len(model.modules)):
        for end in range(first + 1, len(model.modules) + 1):
            _, memory_bytes = stage_memory(model, WORKLOAD, cost, model.modules[first:end])
            assert needs[first, end] == memory_bytes, (first, end)
