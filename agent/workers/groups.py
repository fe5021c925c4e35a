"""Which rows of answers make a step together.

The first stage decides. Its requests are in at most as many groups as the ring has stages, so that while one stage
works on one group the others have one each: stages that wait for each other and steps of a single row are both waste
(docs/decisions/0010). A group is out from its step on this stage until its tokens come back; those that come back
together stay together. Who is new joins the smallest group and waits until it is here; groups are made equal when one
is about to step, never while it is out. One request alone is a group of one: its steps are those of a single row.

The stages behind it run what comes as it comes (`InOrder`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from agent.workers.requests import Unit

PATIENCE_S: Final = 1.0
"""A group whose tokens stay away for longer is not waited for any more by those who joined it. Longer than a round of
a ring takes, and short for somebody who waits for a word."""


class Waiting(Protocol):
    """Rows that wait for their step, one of each request."""

    @property
    def ready(self) -> bool:
        """Whether `take` may give something."""

    def file(self, units: Sequence[Unit]) -> None:
        """Take rows that came together."""

    def take(self, now_s: float) -> Sequence[Unit]:
        """Give what makes the next step; nothing if it turns out that all have to wait."""

    def leave(self, request: int) -> None:
        """This request is over. A row of it may still be taken, if that is simpler."""

    def tick(self, now_s: float) -> None:
        """Call every second or so."""

    def waiting(self) -> Iterable[Unit]: ...

    def clear(self) -> None: ...


class InOrder:
    """Rows step as they came."""

    def __init__(self) -> None:
        self._queue: deque[Sequence[Unit]] = deque()

    @property
    def ready(self) -> bool:
        return bool(self._queue)

    def file(self, units: Sequence[Unit]) -> None:
        self._queue.append(units)

    def take(self, now_s: float) -> Sequence[Unit]:
        del now_s
        return self._queue.popleft() if self._queue else ()

    def leave(self, request: int) -> None:
        del request

    def tick(self, now_s: float) -> None:
        del now_s

    def waiting(self) -> Iterable[Unit]:
        return (unit for units in self._queue for unit in units)

    def clear(self) -> None:
        self._queue.clear()


@dataclass(slots=True, eq=False)
class _Group:
    """Requests by their numbers: those whose rows are here, and those that are out."""

    here: dict[int, Unit] = field(default_factory=dict)
    out: set[int] = field(default_factory=set)
    left_s: float = 0.0

    @property
    def size(self) -> int:
        return len(self.here) + len(self.out)


class Groups:
    """The groups of a first stage, the one that stepped longest ago first."""

    def __init__(self, stages: int) -> None:
        self._most = stages
        self._groups: list[_Group] = []
        self._of: dict[int, _Group] = {}

    @property
    def sizes(self) -> list[int]:
        return [group.size for group in self._groups]

    @property
    def ready(self) -> bool:
        return any(not group.out for group in self._groups)

    def file(self, units: Sequence[Unit]) -> None:
        back = []
        for unit in units:
            request = unit.live.request
            group = self._of.get(request) or self._join(request)
            if request in group.out:
                group.out.discard(request)
                back.append(group)
            group.here[request] = unit
        for group in back:
            self._wait_no_more(group)

    def take(self, now_s: float) -> Sequence[Unit]:
        for group in list(self._groups):
            if group.here and not group.out and self._balanced(group):
                units = list(group.here.values())
                group.out = set(group.here)
                group.here = {}
                group.left_s = now_s
                self._groups.remove(group)
                self._groups.append(group)
                return units
        return ()

    def leave(self, request: int) -> None:
        group = self._of.pop(request, None)
        if group is not None:
            group.here.pop(request, None)
            group.out.discard(request)
            if not group.size:
                self._groups.remove(group)

    def tick(self, now_s: float) -> None:
        for group in self._groups:
            if group.out and group.here and now_s - group.left_s > PATIENCE_S:
                self._wait_no_more(group)

    def waiting(self) -> Iterable[Unit]:
        return (unit for group in self._groups for unit in group.here.values())

    def clear(self) -> None:
        self._groups.clear()
        self._of.clear()

    def _join(self, request: int, but: _Group | None = None) -> _Group:
        """Put a request into a group of its own while there are fewer than stages, else into the smallest other one."""
        others = [group for group in self._groups if group is not but]
        if len(self._groups) < self._most or not others:
            group = _Group()
            self._groups.append(group)
        else:
            group = min(others, key=_size)
        self._of[request] = group
        return group

    def _balanced(self, group: _Group) -> bool:
        """Make a group that is here as large as it should be; False if it is no more."""
        while group.here and group.size > self._share():
            request, unit = group.here.popitem()
            self._join(request, but=group).here[request] = unit
        if not group.here:
            self._groups.remove(group)
        return bool(group.here)

    def _share(self) -> int:
        """How large a group may be: as many as there are stages, and equal. Of groups in excess the others take all."""
        if len(self._groups) > self._most:
            return 0
        if len(self._groups) < self._most:
            return max(1, len(self._of) // self._most)
        return -(-len(self._of) // self._most)

    def _wait_no_more(self, group: _Group) -> None:
        """What is still out of a group that is here, or should be, has no group until it comes."""
        for request in group.out:
            del self._of[request]
        group.out.clear()


def _size(group: _Group) -> int:
    return group.size
