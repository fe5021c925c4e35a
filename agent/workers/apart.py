"""Rows that share no step (wire.messages.RequestMeta.alone, and rows with guesses), beside those that go in groups."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from agent.workers.groups import Waiting
from agent.workers.requests import Unit


class Apart:
    """The groups of a first stage, and the rows of requests that run alone: the two take turns."""

    def __init__(self, groups: Waiting) -> None:
        self._groups = groups
        self._alone: deque[Unit] = deque()
        self._alone_next = False

    @property
    def ready(self) -> bool:
        return bool(self._alone) or self._groups.ready

    def file(self, units: Sequence[Unit]) -> None:
        others = []
        for unit in units:
            if unit.live.alone or unit.drafts:
                self._groups.leave(unit.live.request)
                self._alone.append(unit)
            else:
                others.append(unit)
        if others:
            self._groups.file(others)

    def take(self, now_s: float) -> Sequence[Unit]:
        self._alone_next = not self._alone_next
        units = () if self._alone and self._alone_next else self._groups.take(now_s)
        return units or ((self._alone.popleft(),) if self._alone else ())

    def leave(self, request: int) -> None:
        self._groups.leave(request)

    def tick(self, now_s: float) -> None:
        self._groups.tick(now_s)

    def waiting(self) -> Iterable[Unit]:
        return (*self._alone, *self._groups.waiting())

    def clear(self) -> None:
        self._alone.clear()
        self._groups.clear()
