"""One round as a state machine: who has been asked, whose update counts, when it is over. Pure.

    asked     the factors went to the worker that the device runs now; to its next one they go again, and to all when
              the connection to the broker was lost, or an answer takes very long
    counted   its update was accepted and is on disk: what comes from it afterwards is dropped
    refused   it could not do it, or what it sent is none: it is out of this round

A round is over when every device has been counted or refused; or, behind its deadline, when enough have been counted.
Behind the deadline with too few it waits on: a board that is switched on again goes on with the round.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal, NamedTuple, Protocol

from msgspec import Struct

Verdict = Literal["waits", "over", "failed"]

ASK_AGAIN_S: Final = 120.0
"""A device that was asked and says nothing so long: question or answer may have been lost without anybody's knowing.
Being asked twice costs it nothing but the factors' way."""


class Asked(Struct, frozen=True):
    worker: str
    """Which one: boot of the agent and how often the worker was started."""
    at_s: float


class Look(NamedTuple):
    """What is due: whom to ask now, and whether the round is over."""

    ask: tuple[str, ...]
    verdict: Verdict


class Progress(Protocol):
    """How a round stands: RoundState here, coordinator.rounds.joint.JointState where all make it together."""

    refused: dict[str, str]

    @property
    def missing(self) -> tuple[str, ...]: ...

    def look(self, now_s: float, ready: Mapping[str, str], busy: Collection[str] = ()) -> Look:
        """`ready`: device -> the worker that it runs now and that can take a round; `busy`: who fetches what it needs,
        which may take its time."""

    def wanted(self, device: str) -> bool: ...

    def count(self, device: str) -> None: ...

    def refuse(self, device: str, because: str) -> None: ...

    def ask_all_again(self) -> None: ...


class RoundState:
    """Of round `number`; `counted` are devices whose updates are on disk already."""

    def __init__(
        self,
        number: int,
        devices: tuple[str, ...],
        at_least: int,
        deadline_s: float,
        counted: tuple[str, ...] = (),
    ) -> None:
        self.number = number
        self.devices = tuple(sorted(devices))
        self.counted: set[str] = set(counted)
        self.refused: dict[str, str] = {}
        self._at_least = at_least
        self._deadline_s = deadline_s
        self._asked: dict[str, Asked] = {}

    def look(self, now_s: float, ready: Mapping[str, str], _busy: Collection[str] = ()) -> Look:
        """`ready`: device -> the worker that it runs now and that can take a round."""
        waits = [device for device in self.devices if device not in self.counted and device not in self.refused]
        ask = tuple(device for device in waits if device in ready and self._due(device, ready[device], now_s))
        for device in ask:
            self._asked[device] = Asked(ready[device], now_s)
        return Look(ask, self._verdict(now_s, bool(waits)))

    def wanted(self, device: str) -> bool:
        """Whether an update of a device would count."""
        return device in self.devices and device not in self.counted and device not in self.refused

    def count(self, device: str) -> None:
        """Its update is on disk."""
        assert self.wanted(device)
        self.counted.add(device)

    def refuse(self, device: str, because: str) -> None:
        if self.wanted(device):
            self.refused[device] = because

    def ask_all_again(self) -> None:
        """The connection to the broker was lost: nobody knows what came through."""
        self._asked.clear()

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(device for device in self.devices if self.wanted(device))

    def _due(self, device: str, worker: str, now_s: float) -> bool:
        asked = self._asked.get(device)
        return asked is None or asked.worker != worker or now_s - asked.at_s >= ASK_AGAIN_S

    def _verdict(self, now_s: float, some_wait: bool) -> Verdict:
        enough = len(self.counted) >= self._at_least
        if not some_wait:
            return "over" if enough else "failed"
        return "over" if enough and now_s >= self._deadline_s else "waits"
