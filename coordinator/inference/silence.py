"""What to make of a silence between two tokens. Pure: times and answers come in, steps come out.

    WAITING ──deadline──> ASKED ──all answered──> known to all: WAITING, with twice the patience
                            │                     not known to one, or lost between two: Resume
                            ├──answer deadline──> ASKED AGAIN (of those who have not answered; a question may be lost)
                            │                       ├──all answered──> as above
                            │                       └──answer deadline──> some answered: Gone (the others)
                            │                                             none did: UNSURE
                            └ UNSURE ──a heartbeat's time──> heartbeats came: Gone (all); none came: WAITING, as above

None at all answers when the requester's own way to the broker is dead, too: then silence says nothing of the stages.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from wire.limits import HEARTBEAT_PERIOD_S
from wire.messages import Standing

UNSURE_S: Final = 1.5 * HEARTBEAT_PERIOD_S
"""Some device beats within it, if anything comes through."""

TIMES_ASKED: Final = 2
MOST_PATIENCE: Final = 64
"""Times the deadline, in one silence: a request's own time-out comes earlier, mostly."""


class Ask(NamedTuple):
    """Ask these stages how the request stands."""

    number: int
    stages: tuple[int, ...]


class Gone(NamedTuple):
    """These stages do not answer."""

    stages: tuple[int, ...]


class Resume(NamedTuple):
    """The request does not go on by itself any more, though all stages are there."""

    reason: str


class FalseAlarm(NamedTuple):
    """All is well, it only takes longer than foreseen."""


Step = Ask | Gone | Resume | FalseAlarm


class _State(Enum):
    WAITING = "waiting"
    ASKED = "asked"
    UNSURE = "unsure"


class Silence:
    """One silence of one request. `due_s`: when `at` should be called next."""

    def __init__(self, stages: int, now_s: float, deadline_s: float, answer_s: float) -> None:
        self._stages = stages
        self._deadline_s = deadline_s
        self._answer_s = answer_s
        self._patience = 1
        self._state = _State.WAITING
        self._number = 0
        self._times = 0
        self._answers: dict[int, Standing] = {}
        self._before: tuple[int, ...] = ()
        """Rows that each stage had run when all were asked last, if nothing of the request waited anywhere."""
        self.asked_s = now_s
        """When it was asked first in the round under way."""
        self.due_s = now_s + deadline_s

    def at(self, now_s: float, heartbeats: bool) -> Step | None:
        """The next step at this time; `heartbeats`: whether any came since `asked_s`."""
        if now_s < self.due_s:
            return None
        if self._state is _State.WAITING:
            self._state, self._number, self._times = _State.ASKED, self._number + 1, 1
            self._answers.clear()
            self.asked_s, self.due_s = now_s, now_s + self._answer_s
            return Ask(self._number, tuple(range(self._stages)))
        missing = tuple(stage for stage in range(self._stages) if stage not in self._answers)
        if self._state is _State.ASKED and self._times < TIMES_ASKED:
            self._times += 1
            self.due_s = now_s + self._answer_s
            return Ask(self._number, missing)
        if self._answers or (self._state is _State.UNSURE and heartbeats):
            self._wait(now_s)
            return Gone(missing)
        if self._state is _State.ASKED:
            self._state, self.due_s = _State.UNSURE, now_s + UNSURE_S
        else:
            self._wait(now_s)
        return None

    def heard(self, standing: Standing, now_s: float) -> Step | None:
        """Take an answer; what is not asked, or came too late, changes nothing."""
        if self._state is _State.WAITING or standing.number != self._number or standing.stage >= self._stages:
            return None
        self._answers[standing.stage] = standing
        if len(self._answers) < self._stages:
            return None
        answers = [self._answers[stage] for stage in range(self._stages)]
        self._wait(now_s)
        for answer in answers:
            if not answer.known:
                return Resume(f"stage {answer.stage} does not know the request any more")
        resting = () if any(answer.waiting for answer in answers) else tuple(answer.run for answer in answers)
        if resting and resting == self._before:
            return Resume("a message was lost between two stages")
        self._before = resting
        return FalseAlarm()

    def _wait(self, now_s: float) -> None:
        """Wait again, twice as long."""
        self._state = _State.WAITING
        self._patience = min(MOST_PATIENCE, 2 * self._patience)
        self.due_s = now_s + self._patience * self._deadline_s
