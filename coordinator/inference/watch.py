"""Waits for the next token of a request, and finds out who is silent when it does not come."""

from __future__ import annotations

import time
from collections.abc import Callable

from coordinator.inference.patience import Pace
from coordinator.inference.requests import Generation, Token
from coordinator.inference.silence import Ask, FalseAlarm, Gone, Resume, Silence, Step
from coordinator.losses import Lost
from coordinator.planning.plan import Plan
from coordinator.service import Coordinator


class Watch:
    """Over one generation. `live()` gives how many requests run on its deployment."""

    def __init__(
        self, coordinator: Coordinator, plan: Plan, generation: Generation, pace: Pace, live: Callable[[], int]
    ) -> None:
        self._coordinator = coordinator
        self._plan = plan
        self._generation = generation
        self._pace = pace
        self._live = live
        self._last_s: float | None = None

    async def next_token(self) -> Token:
        """Wait for the next token. Raises the request's error; Lost, when what should give the token is gone; and
        Unreachable after the request's time-out (`Generation.timeout_s`)."""
        generation, now_s = self._generation, time.monotonic()
        until_s = now_s + generation.timeout_s
        silence = Silence(len(self._plan.stages), now_s, self._deadline_s(), self._pace.answer_s())
        while True:
            item = await generation.next(min(until_s, silence.due_s) - time.monotonic())
            now_s = time.monotonic()
            if isinstance(item, Token):
                if self._last_s is not None:
                    self._pace.add(item.arrived_s - self._last_s)
                self._last_s = item.arrived_s
                return item
            if item is not None:
                self._act(silence.heard(item, now_s))
            elif now_s >= until_s:
                raise generation.timed_out()
            else:
                self._act(silence.at(now_s, self._coordinator.heard_since(silence.asked_s)))

    def _deadline_s(self) -> float:
        if self._last_s is not None:
            return self._pace.deadline_s(self._live())
        meta = self._generation.meta
        return self._pace.first_deadline_s(meta.prompt_tokens, self._live(), meta.replay_tokens)

    def _act(self, step: Step | None) -> None:
        generation, stages = self._generation, self._plan.stages
        if isinstance(step, Ask):
            hub = self._coordinator.hub
            parcel = generation.inquiry_parcel(step.number)
            for stage in step.stages:
                hub.send(stages[stage].inbox, parcel, lambda why: generation.fail(Lost(why)))
        elif isinstance(step, Gone):
            devices = list(dict.fromkeys(stages[stage].device for stage in step.stages))
            self._pace.given_up.update(devices)
            self._coordinator.unanswered(self._plan, devices)
            generation.fail(Lost(f"{' and '.join(devices)} did not answer"))
        elif isinstance(step, Resume):
            generation.fail(Lost(step.reason))
        elif isinstance(step, FalseAlarm):
            self._pace.false_alarm()
