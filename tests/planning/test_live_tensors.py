"""What crosses a cut of a graph that is no chain: every live tensor, once."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.planning.planner import make_plan
from coordinator.planning.problem import hop_bytes
from models.graph import Edge, Graph
from tests.planning.boards import HIDDEN, address, board, graph, request
from wire.errors import Refused
from wire.frames import header_bytes


def edge(source: str, target: str, size: int, tensor: str = "") -> Edge:
    return Edge(source=source, target=target, elements_per_token=size, bytes_per_token=size, tensor=tensor)


def with_edges(blocks: int, edges: list[Edge]) -> Graph:
    return msgspec.structs.replace(graph(blocks), edges=tuple(edges))


def u_net() -> Graph:
    """Two levels down, two up: the skips of each level live until the way up."""
    names = ["embedding", "block.0", "block.1", "block.2", "head"]
    chain = [edge(one, other, size) for (one, other), size in zip(pairwise(names), (100, 60, 30, 60), strict=True)]
    return with_edges(3, [*chain, edge("embedding", "head", 100), edge("block.0", "block.2", 60)])


def test_skips_count_at_every_cut_that_they_cross() -> None:
    assert u_net().live_bytes() == (0, 100, 160, 190, 160, 0)
    assert [len(u_net().live_at(cut)) for cut in range(6)] == [0, 1, 2, 3, 2, 0]


def test_a_tensor_that_several_modules_need_crosses_once_and_another_one_beside_it() -> None:
    chain = [edge("embedding", "block.0", 10), edge("block.0", "head", 10)]
    several = [
        edge("embedding", "head", 10),
        edge("embedding", "head", 7, "mask"),
        edge("embedding", "block.0", 7, "mask"),
    ]
    assert with_edges(1, [*chain, *several]).live_bytes() == (0, 17, 27, 0)


def test_the_planner_pays_for_what_crosses() -> None:
    payloads = [100, 160, 190, 160]
    assert hop_bytes(u_net())[1:-1] == tuple(size + header_bytes(2) for size in payloads)
    boards = [board("a"), board("b", 1.1)]
    chain, wide = graph(30), edge("block.2", "block.27", 640 * 1024, "skip")
    skipping = msgspec.structs.replace(chain, edges=(*chain.edges, wide))
    plain = make_plan(chain, boards, request(objective="throughput"), address)
    skipped = make_plan(skipping, boards, request(objective="throughput"), address)
    assert len(plain.stages) == 2
    assert 3 <= plain.stages[0].end_block <= 27, "in a chain the cut is in the middle"
    for stage in skipped.stages[:-1]:
        live = skipping.live_bytes()[stage.end_block + 1]
        assert stage.hop_bytes == live + header_bytes(2), "what is planned is what is live there"
    assert not (len(skipped.stages) == 2 and 3 <= skipped.stages[0].end_block <= 27), "the skip is not carried over"


@settings(max_examples=80, deadline=None)
@given(data=st.data(), blocks=st.integers(1, 5))
def test_every_cut_carries_what_its_front_makes_and_its_back_needs(data: st.DataObject, blocks: int) -> None:
    names = [module.name for module in graph(blocks).modules]
    pairs = [(one, other) for place, one in enumerate(names) for other in names[place + 1 :]]
    drawn = data.draw(st.lists(st.sampled_from(pairs), unique=True, max_size=8))
    sizes = {name: data.draw(st.integers(1, 100)) for name in names}
    model = with_edges(blocks, [edge(one, other, sizes[one]) for one, other in drawn])
    for cut in range(len(names) + 1):
        front, back = names[:cut], names[cut:]
        needed = {one for one, other in drawn if one in front and other in back}
        assert model.live_bytes()[cut] == sum(sizes[name] for name in needed)


def test_modules_that_hang_together_with_nothing_are_refused() -> None:
    with pytest.raises(Refused, match="nothing goes from its first 2 modules"):
        hop_bytes(with_edges(1, [edge("embedding", "block.0", 2 * HIDDEN)]))
