"""Where a graph of nodes can be cut, what crosses there, and which cuts are worth offering. Pure.

Nodes stand in topological order; cut i lies before node i. What crosses it are all tensors that were made before it (or
given) and are needed behind it, each once, however many need it: a U-Net's skips are live over all cuts between their
ends. A graph of hundreds of nodes is cut into at most MOST_MODULES modules: a module is as much work as makes it worth
placing alone, and ends where little crosses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from msgspec import Struct

MOST_MODULES: Final = 16
"""Boards measure each kind of module, and what is cut finer loses more on its way than it gains."""
WIDEST: Final = 4.0
"""A module may be so many times as much work as the least one, if a narrower cut comes within it."""
ALIKE: Final = 1.02
"""A cut is narrower than another if more crosses the other by this factor: a few sizes beside a state are nothing."""
NOTHING: Final = 0.02
"""Share of the least work below which nodes behind a cut still belong before it: a norm, a reshape."""


class Node(Struct, frozen=True, kw_only=True):
    """`takes` and `gives` are tensors between nodes; constants and weights are not among them."""

    takes: tuple[str, ...]
    gives: tuple[str, ...]
    work: float
    """Anything that grows with the time it takes, alike for all nodes."""


def live_at_cuts(nodes: Sequence[Node], given: Sequence[str], wanted: Sequence[str]) -> list[tuple[str, ...]]:
    """For each cut 0 .. len(nodes), the tensors that cross it, in the order in which they come to be."""
    last_use = {name: len(nodes) for name in wanted}
    for index, node in enumerate(nodes):
        for name in node.takes:
            last_use[name] = max(last_use.get(name, 0), index)
    live = [name for name in given if name in last_use]
    crossing = [tuple(live)]
    for index, node in enumerate(nodes):
        live = [name for name in live if last_use[name] > index]
        live += [name for name in node.gives if last_use.get(name, -1) > index]
        crossing.append(tuple(live))
    return crossing


def chosen_cuts(nodes: Sequence[Node], crossing: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> list[int]:
    """Choose the cuts between modules, in order; at a cut only tensors that have a size (in bytes) may cross."""
    widths = {cut: _width(crossing[cut], sizes) for cut in range(1, len(nodes))}
    wide = {cut: width for cut, width in widths.items() if width is not None}
    possible = list(wide)
    done = [0.0]
    for node in nodes:
        done.append(done[-1] + node.work)
    least = done[-1] / MOST_MODULES
    found: list[int] = []
    begin = 0
    while True:
        enough = [cut for cut in possible if cut > begin and done[cut] - done[begin] >= least]
        enough = [cut for cut in enough if done[-1] - done[cut] >= least]
        if not enough:
            return found
        near = [cut for cut in enough if done[cut] - done[begin] <= WIDEST * least] or enough[:1]
        narrow = ALIKE * min(wide[cut] for cut in near)
        best = next(cut for cut in near if wide[cut] <= narrow)
        for cut in near:
            if cut > best and done[cut] - done[best] <= NOTHING * least and wide[cut] <= wide[best]:
                best = cut
        found.append(best)
        begin = best


def _width(names: Sequence[str], sizes: Mapping[str, int]) -> int | None:
    if not names or any(name not in sizes for name in names):
        return None
    return sum(sizes[name] for name in names)
