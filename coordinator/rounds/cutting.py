"""Which boards get which blocks of a trunk, and how long a step takes then. Pure.

Blocks of a model are alike, so boards get them by number. A step takes its batches through the segments like a
pipeline: while one segment works for one board with data, the next works for another. So with many boards the slowest
segment decides, and with one the sum of all; and each further segment costs a way over the network, there and back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from wire.messages import Role
from wire.shares import Share


class Holder(NamedTuple):
    """A board that may have blocks, `most_blocks` by its memory."""

    device: str
    most_blocks: int
    block_s: float | None
    """A block, forwards and backwards, for the batch of one board; None: not known."""
    hop_s: float | None
    """The states of such a batch over its link; None: not known."""


class Cut(NamedTuple):
    """A segment: blocks [first_block, end_block) on a board. Or a part of one block that stands for all of these."""

    device: str
    first_block: int
    end_block: int
    role: Role = "trunk"
    share: Share | None = None
    """Of a shard."""

    @property
    def blocks(self) -> int:
        return self.end_block - self.first_block


def cut(holders: Sequence[Holder], blocks: int, ends: int, at_least: int, at_most: int) -> tuple[Cut, ...]:
    """Segments on `at_least` to `at_most` of the boards, so that a step of `ends` boards takes the least time; of equal
    times that of the fewest. The fastest boards are taken, in the order in which they are given. None where
    their memory is too small for all blocks."""
    known = [holder.block_s for holder in holders if holder.block_s is not None]
    slowest = max(known, default=1.0)
    by_speed = sorted(holders, key=lambda holder: (holder.block_s or slowest, holder.block_s is None))
    best: tuple[float, tuple[Cut, ...]] | None = None
    for count in range(max(1, at_least), min(at_most, len(holders), blocks) + 1):
        fastest = set(by_speed[:count])
        those = [holder for holder in holders if holder in fastest]
        shares = divided(
            [holder.most_blocks for holder in those], [holder.block_s or slowest for holder in those], blocks
        )
        if not shares:
            continue
        taken_s = step_s(
            [share * (holder.block_s or slowest) for share, holder in zip(shares, those, strict=True)],
            [holder.hop_s or 0.0 for holder in those],
            ends,
        )
        if best is None or taken_s < best[0]:
            best = taken_s, _cuts(those, shares)
    return best[1] if best is not None else ()


def divided(most: Sequence[int], block_s: Sequence[float], blocks: int) -> tuple[int, ...]:
    """Blocks for each board, one at least and so many at most, so that the slowest is as fast as can be; none where
    they don't go in."""
    if sum(most) < blocks or len(most) > blocks or min(most, default=0) < 1:
        return ()
    shares = [1] * len(most)
    for _ in range(blocks - len(most)):
        open_ = [board for board in range(len(most)) if shares[board] < most[board]]
        shares[min(open_, key=lambda board: (shares[board] + 1) * block_s[board])] += 1
    return tuple(shares)


def step_s(compute_s: Sequence[float], hop_s: Sequence[float], ends: int) -> float:
    """Of a step that all make: `compute_s` of each segment for the batch of one board, `hop_s` the same of states over
    its link. States come and go on each link, once forwards and once backwards, in both directions at the same time."""
    stages_s = [max(compute, 2 * hop) for compute, hop in zip(compute_s, hop_s, strict=True)]
    first_s = sum(compute_s) + 2 * sum(hop_s)
    return first_s + max(0, ends - 1) * max(stages_s)


def _cuts(holders: Sequence[Holder], shares: Sequence[int]) -> tuple[Cut, ...]:
    found: list[Cut] = []
    first = 0
    for holder, share in zip(holders, shares, strict=True):
        found.append(Cut(holder.device, first, first + share))
        first += share
    return tuple(found)
