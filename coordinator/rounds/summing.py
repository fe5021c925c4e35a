"""One round of a secure job as a state machine: all train, then the updates of those who have are summed. Pure.

    train     the factors went out; who has trained says so, and keeps what came of it
    keys, shares, masked, reveal      the steps of models.secure.session

A sum takes seconds where training takes minutes, so it begins when all have trained; behind the round's deadline, when
enough have. Whoever loses its worker before that trains again. If it does so while a sum is made, the sum is begun
anew, with other keys and masks, once it has trained again; behind the deadline the sum goes on without it. Until the
last step nothing was revealed, so nothing is lost by that.

In the last step it is settled of whom the sum is. Shares of two thirds end it, and if so many can't be had any more it
is begun anew, but of the very same devices: of others it would tell what the difference of both sums is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final, Literal

from coordinator.rounds.machine import ASK_AGAIN_S, Asked, Look, Verdict
from models.secure.session import threshold_of
from wire.limits import LEAST_SUMMED

Step = Literal["train", "keys", "shares", "masked", "reveal"]

NEXT: Final[Mapping[Step, Step]] = {"train": "keys", "keys": "shares", "shares": "masked", "masked": "reveal"}
STEP_AGAIN_S: Final = 20.0
"""A device that was asked for a step of a sum and says nothing so long is asked again: answers are small but for the
masked update, and one that is on its way is not sent twice."""


class SumState:
    """Of round `number`; the words mean what they mean in coordinator.rounds.machine.RoundState. `fixed`: a sum of
    these may have been revealed, so it has to be of these."""

    def __init__(
        self,
        number: int,
        devices: Collection[str],
        at_least: int,
        deadline_s: float,
        patience_s: float,
        fixed: Collection[str] = (),
    ) -> None:
        """`patience_s`: behind the deadline, for each step of a sum."""
        self.number = number
        self.devices = tuple(sorted(fixed or devices))
        self.refused: dict[str, str] = {}
        self.step: Step = "train"
        self.attempt = 0
        """How often a sum was begun."""
        self.members: tuple[str, ...] = ()
        """Whose keys came."""
        self.among: tuple[str, ...] = ()
        """Of these, whose shares came."""
        self.survivors: tuple[str, ...] = ()
        """Of these, whose masked updates came: of whom the sum is."""
        self._at_least = max(at_least, LEAST_SUMMED)
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._fixed = bool(fixed)
        self._trained: dict[str, str] = {}
        """Device -> the worker that has its update."""
        self._asked: dict[str, Asked] = {}
        self._workers: dict[str, str] = {}
        """Who was asked to train last."""
        self._unwilling: dict[str, str] = {}
        """Survivors that give no shares, and why."""
        self._expected: tuple[str, ...] = ()
        """Who is to answer in this step of a sum."""
        self._came: set[str] = set()
        """Who has."""
        self._began_s = 0.0
        """The step."""

    @property
    def missing(self) -> tuple[str, ...]:
        """Who is waited for; of a sum that is there, who is not in it."""
        if self.over:
            return tuple(name for name in self.devices if name not in self.survivors and name not in self.refused)
        if self.step == "train":
            return tuple(name for name in self.devices if self.wanted(name))
        return tuple(name for name in self._expected if self.expects(name))

    @property
    def over(self) -> bool:
        return self.step == "reveal" and len(self._came) >= threshold_of(len(self.members))

    def look(self, now_s: float, ready: Mapping[str, str], _busy: Collection[str] = ()) -> Look:
        """`ready`: device -> the worker that it runs now and that can take a round."""
        if self.over:
            return Look((), "over")
        for device, worker in list(self._trained.items()):
            if ready.get(device, worker) != worker:
                del self._trained[device]  # with the worker that is gone
        self._go_on(now_s)
        self._begin(now_s, ready)
        ask = tuple(name for name in self.missing if name in ready and self._due(name, ready[name], now_s))
        for device in ask:
            self._asked[device] = Asked(ready[device], now_s)
            if self.step == "train":
                self._workers[device] = ready[device]
        return Look(ask, self._verdict())

    def wanted(self, device: str) -> bool:
        """Whether it would count that a device has trained."""
        return device in self.devices and device not in self._trained and device not in self.refused

    def expects(self, device: str) -> bool:
        """Whether an answer of this step is due from a device."""
        out = device in self._came or device in self.refused or device in self._unwilling
        return device in self._expected and not out

    def count(self, device: str) -> None:
        """It has trained."""
        assert self.wanted(device)
        self._trained[device] = self._workers.get(device, "")

    def answer(self, device: str) -> None:
        """It has answered in this step."""
        assert self.expects(device)
        self._came.add(device)

    def refuse(self, device: str, because: str) -> None:
        """It is out of the round; whose update is in the sum already gives no shares, and stays in it."""
        if device in self.survivors:
            self._unwilling.setdefault(device, because)
        elif device in self.devices and device not in self.refused:
            self.refused[device] = because

    def ask_all_again(self) -> None:
        """The connection to the broker was lost: nobody knows what came through."""
        self._asked.clear()

    def _begin(self, now_s: float, ready: Mapping[str, str]) -> None:
        """A sum, if it is time."""
        if self.step != "train":
            return
        here = tuple(name for name in self.devices if name in self._trained and name in ready)
        here = tuple(name for name in here if name not in self.refused)
        all_are = all(name in here or name in self.refused for name in self.devices)
        late = now_s >= self._deadline_s and not self._fixed
        if len(here) >= self._at_least and (all_are or late):
            self.attempt += 1
            self._enter("keys", here, now_s)

    def _go_on(self, now_s: float) -> None:
        """From a step of a sum to the next, when all have answered or enough behind the deadline."""
        if self.step == "train":
            return
        gone = [name for name in self._expected if name not in self._trained and name not in self._came]
        if self.step == "reveal":
            self._go_on_revealing(gone)
            return
        late = now_s >= self._deadline_s and not self._fixed
        if any(name not in self.refused for name in gone) and not late:
            self._anew()
            return
        open_ = [name for name in self._expected if self.expects(name) and name not in gone]
        if open_ and not (late and now_s >= self._began_s + self._patience_s):
            return
        came = tuple(name for name in self._expected if name in self._came)
        if self.step == "keys":
            self.members = came
        elif self.step == "shares":
            self.among = came
        if len(came) < max(self._at_least, threshold_of(len(self.members))) or (self._fixed and came != self.devices):
            self._anew()
            return
        if self.step == "masked":
            self.survivors = came
        self._enter(NEXT[self.step], came, now_s)

    def _go_on_revealing(self, gone: Collection[str]) -> None:
        """Whether enough are left who can give shares, and would."""
        threshold = threshold_of(len(self.members))
        would = [name for name in self._expected if name not in self._unwilling or name in self._came]
        if len(would) < threshold:
            self.refused.update(self._unwilling)
        elif len([name for name in would if name not in gone]) < threshold:
            self._anew(of=self.survivors)

    def _enter(self, step: Step, expected: tuple[str, ...], now_s: float) -> None:
        self.step, self._expected, self._began_s = step, expected, now_s
        self._came = set()
        self._asked.clear()

    def _anew(self, of: tuple[str, ...] = ()) -> None:
        """Nothing of the sum under way can come to an end."""
        if of:
            self.devices, self._fixed = of, True
        self.members = self.among = self.survivors = ()
        self._unwilling = {}
        self._enter("train", (), 0.0)

    def _due(self, device: str, worker: str, now_s: float) -> bool:
        asked, again_s = self._asked.get(device), ASK_AGAIN_S if self.step == "train" else STEP_AGAIN_S
        return asked is None or asked.worker != worker or now_s - asked.at_s >= again_s

    def _verdict(self) -> Verdict:
        if self.survivors:
            return "failed" if any(name in self.refused for name in self.survivors) else "waits"
        left = [name for name in self.devices if name not in self.refused]
        return "failed" if len(left) < (len(self.devices) if self._fixed else self._at_least) else "waits"
