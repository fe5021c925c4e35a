"""Where the keys and values of requests lie: one buffer per tensor, with a place for each slot.

    [slots, kv_heads, context, head_dim]     the keys of one block, or its values

A step over several requests reads and writes a range of places in one piece, so the requests of a step must lie side by
side. Who steps with whom changes seldom; when it does, used rows are moved, a few megabytes. A slot's number, which is
what callers know, stays; its place does not. A free place holds no memory: its pages are given back.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from models.engine.base import EngineFailed, NoSlot
from models.engine.manifest import StageManifest
from models.engine.memory import Floats

FLOAT_BYTES: Final = 4


@dataclass(slots=True, eq=False)
class Slot:
    """One request here: `rows` of its keys and values are at `place`."""

    number: int
    place: int
    rows: int = 0
    ranks: slice | None = None
    """Of the stage's adapters, those that its rows take part with."""


class Places:
    """The slots of a stage and their memory. Raises EngineFailed when there is no room for it."""

    def __init__(self, manifest: StageManifest, context_tokens: int, slots: int) -> None:
        config = manifest.config
        self.names = tuple(f"kv.{index}.{part}" for index in manifest.blocks for part in ("key", "value"))
        shape = (len(self.names), slots, config.kv_heads, context_tokens, config.head_dim)
        self._place_bytes = config.kv_heads * context_tokens * config.head_dim * FLOAT_BYTES
        self._pages = None
        try:
            if self.names:
                self._pages = _pages(len(self.names) * slots * self._place_bytes)
            memory = np.zeros(0, np.float32) if self._pages is None else np.frombuffer(self._pages, np.float32)
        except (OSError, MemoryError, ValueError, OverflowError) as error:
            raise EngineFailed(
                f"no memory for the keys and values of {slots} x {context_tokens} tokens: {error}",
                try_="deploy with a smaller context, or with fewer slots",
            ) from error
        self._memory: Floats = memory.reshape(shape)
        self._at: list[Slot | None] = [None] * slots
        self._slots: list[Slot | None] = [None] * slots

    @property
    def slot_bytes(self) -> int:
        """Keys and values of one slot whose context is full."""
        return len(self.names) * self._place_bytes

    @property
    def used_bytes(self) -> int:
        """The slots in use, in full."""
        return self.slot_bytes * sum(slot is not None for slot in self._slots)

    def open(self) -> Slot:
        """Take the lowest free number, at the lowest free place; raise NoSlot."""
        if None not in self._slots:
            raise NoSlot(f"all {len(self._slots)} slots are taken", try_="try again when a request has ended")
        slot = Slot(self._slots.index(None), self._at.index(None))
        self._slots[slot.number] = self._at[slot.place] = slot
        return slot

    def close(self, slot: Slot) -> None:
        self._slots[slot.number] = self._at[slot.place] = None
        self._give_back(slot.place)

    def find(self, number: int) -> Slot:
        found = self._slots[number] if 0 <= number < len(self._slots) else None
        if found is None:
            raise EngineFailed(f"slot {number} is not open")
        return found

    def views(self, first: int, count: int) -> Iterable[tuple[str, Floats]]:
        """Each tensor by name, for this range of places: [count, kv_heads, context, head_dim], contiguous."""
        for index, name in enumerate(self.names):
            yield name, self._memory[index, first : first + count]

    def gather(self, together: Sequence[Slot], others: Sequence[Sequence[Slot]]) -> int:
        """Bring slots side by side, in any order, and give their first place. The teams among `others` that lie side by
        side stay so, or come to; they have no slot in common with `together` or each other."""
        first = min(slot.place for slot in together)
        if not _side_by_side(together):
            window = self._best_window(together, [team for team in others if len(team) > 1 and _side_by_side(team)])
            if window is None:
                self._pack([together, *others])
            else:
                self._fill(window, together)
            first = min(slot.place for slot in together)
        return first

    def _best_window(self, together: Sequence[Slot], kept: Sequence[Sequence[Slot]]) -> int | None:
        """Where the fewest rows have to move, if nobody of `kept` has to; None if there is no such range."""
        fixed = {slot.place for team in kept for slot in team}
        costs: dict[int, int] = {}
        for first in range(len(self._at) - len(together) + 1):
            window = range(first, first + len(together))
            if not fixed.intersection(window):
                out = [slot for slot in self._at[first : window.stop] if slot is not None and slot not in together]
                costs[first] = sum(slot.rows for slot in together if slot.place not in window)
                costs[first] += sum(slot.rows for slot in out)
        return min(costs, key=lambda first: (costs[first], first)) if costs else None

    def _fill(self, first: int, together: Sequence[Slot]) -> None:
        window = range(first, first + len(together))
        missing = [slot for slot in together if slot.place not in window]
        for place in window:
            if self._at[place] not in together:
                self._swap(missing.pop().place, place)

    def _pack(self, teams: Sequence[Sequence[Slot]]) -> None:
        """Lay all teams one after another, and who is in none behind them."""
        order = [slot for team in sorted(teams, key=_first) for slot in sorted(team, key=_place)]
        order += [slot for slot in self._at if slot is not None and slot not in order]
        for place, slot in enumerate(order):
            if slot.place != place:
                self._swap(slot.place, place)

    def _swap(self, one: int, other: int) -> None:
        """Exchange what is at two places, of which one may be free."""
        rows_one, rows_other = (0 if slot is None else slot.rows for slot in (self._at[one], self._at[other]))
        for tensor in self._memory:
            kept = tensor[other, :, :rows_other].copy()
            tensor[other, :, :rows_one] = tensor[one, :, :rows_one]
            tensor[one, :, :rows_other] = kept
        self._at[one], self._at[other] = self._at[other], self._at[one]
        for place in (one, other):
            slot = self._at[place]
            if slot is None:
                self._give_back(place)
            else:
                slot.place = place

    def _give_back(self, place: int) -> None:
        """Let the kernel have the pages of a free place; those it shares with a neighbour stay."""
        if self._pages is None:
            return
        for index in range(len(self.names)):
            start = (index * len(self._at) + place) * self._place_bytes
            first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (start + self._place_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > first:
                self._pages.madvise(mmap.MADV_DONTNEED, first, end - first)


def _pages(size_bytes: int) -> mmap.mmap:
    """Memory that the kernel provides page by page, when a page is first written. Large pages would hold what no token
    has written yet."""
    pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages


def _place(slot: Slot) -> int:
    return slot.place


def _first(team: Sequence[Slot]) -> int:
    return min(slot.place for slot in team)


def _side_by_side(slots: Sequence[Slot]) -> bool:
    places = [slot.place for slot in slots]
    return max(places) - min(places) == len(places) - 1
