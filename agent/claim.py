"""Two agents under one name: who stays. Pure.

At the first connect an agent reads its own retained state. Nothing there, or 'offline', or its own boot: the name is
free. 'online' from another boot: that boot is either alive, and then its heartbeat (1 Hz) is heard within
LISTEN_S, or it died without a last will, and then its name is taken over.

Once claimed, a foreign heartbeat means that two agents took the name at the same moment, or that another came in by
another broker. The one that has it longer stays: the earlier `since_unix`, and between equals the lesser boot id.
Only a boot whose state *and* heartbeat were seen counts: an old last will alone never drives a living agent away.
"""

from __future__ import annotations

from enum import Enum

from wire.messages import DeviceState

LISTEN_S = 3.0
"""Three heartbeat periods: a living agent is heard even when two messages are lost."""

ECHO_TIMEOUT_S = 2.0
"""Without an answer to our own marker for so long, nothing retained is there to come."""


class Verdict(Enum):
    WAIT = "wait"
    FREE = "the name is ours"
    TAKEN = "the name is another's"


class Claim:
    """Feed what was seen with the time it was seen; ask `verdict`."""

    def __init__(self, boot: str, since_unix: float, now_s: float) -> None:
        self._ours = (since_unix, boot)
        self._started_s = now_s
        self._deadline_s = now_s + ECHO_TIMEOUT_S
        self._echoed = False
        self._states: dict[str, DeviceState] = {}
        self._alive: set[str] = set()
        self.claimed = False
        self.rival = ""
        """Boot id of the other, once TAKEN."""

    def state_seen(self, state: DeviceState, now_s: float) -> None:
        """A message on our own state topic, retained or live."""
        if state.boot == self._ours[1]:
            return
        if len(self._states) >= 16:
            self._states.clear()
        self._states[state.boot] = state
        if not self.claimed and state.state != "offline":
            self._deadline_s = now_s + LISTEN_S

    def heartbeat_seen(self, boot: str, now_s: float) -> None:
        """A heartbeat under our name. Our own is the echo of a marker: what is retained has come before it."""
        if boot != self._ours[1]:
            if len(self._alive) >= 16:
                self._alive.clear()
            self._alive.add(boot)
        elif not self._echoed:
            self._echoed = True
            if not any(state.state != "offline" for state in self._states.values()):
                self._deadline_s = now_s

    def verdict(self, now_s: float) -> Verdict:
        for boot in sorted(self._alive):
            state = self._states.get(boot)
            if state is None or state.state == "offline":
                continue
            if not self.claimed or (state.since_unix, boot) < self._ours:
                self.rival = boot
                return Verdict.TAKEN
        if self.claimed or now_s < self._deadline_s:
            return Verdict.WAIT
        self.claimed = True
        self._alive.clear()
        return Verdict.FREE
