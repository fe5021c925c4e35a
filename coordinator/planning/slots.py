"""How many requests a deployment serves at once, when nobody said. Pure but for what `make` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from coordinator.planning.aims import figure
from coordinator.planning.partition import Infeasible, Overloaded
from coordinator.planning.plan import Draft, Plan

USUAL_SLOTS: Final = 8
"""Two per stage on four boards: with more, a step takes nearly as much longer as it gives more."""

WORTH_SLOTS: Final = 0.10
"""More requests at once may make the figure that was asked for (the objective) worse by this share, not by more."""


def plan_with_slots(make: Callable[[int], Draft], asked: int | None) -> Plan:
    """The plan for as many requests at once as were `asked` for, or else for as many as go well, up to USUAL_SLOTS.

    `make(slots)` plans and raises Infeasible, as this does. What is only compared needs no reasons.
    """
    if asked is not None:
        return make(asked).finished()
    try:
        alone = make(1)
    except Overloaded:  # more requests may carry what one can't
        return _carrying(make)
    because = ""
    slots = USUAL_SLOTS
    while slots > 1:
        try:
            draft = make(slots)
        except Infeasible:
            because = f"the keys and values of {slots} requests do not fit on these boards"
        else:
            least = _figure(alone.plan)
            slower = _figure(draft.plan) / least - 1 if least > 0 else 0.0
            if slower <= WORTH_SLOTS:
                return _said(draft, because)
            because = f"with room for {slots} the model would have to be spread so that it is {slower:.0%} slower"
        slots //= 2
    return _said(alone, because)


def _carrying(make: Callable[[int], Draft]) -> Plan:
    """The plan for the most requests that there is room for, of a load that one request does not carry."""
    overload: Overloaded | None = None
    because, slots = "", USUAL_SLOTS
    while slots > 1:
        try:
            return _said(make(slots), because)
        except Overloaded as error:
            overload = overload or error
        except Infeasible:
            because = f"the keys and values of {slots} requests do not fit on these boards"
        slots //= 2
    if overload is not None:
        raise overload
    return make(1).finished()  # says what is missing


def _said(draft: Draft, because: str) -> Plan:
    return msgspec.structs.replace(draft.finished(), slots_because=because)


def _figure(plan: Plan) -> float:
    """What more requests must not make much worse: memory is what they need, so there it is the time of a token. And
    fewer requests do not fill a pipeline, so there it is the slowest part."""
    if plan.objective == "throughput" and plan.limits.tokens_per_s is None:
        return plan.predicted_slowest_s
    return plan.predicted_token_s if plan.objective in ("memory", "weighted") else figure(plan)


def slots_text(slots: int, because: str) -> str:
    """'up to 4 requests at once: the keys and values of 8 requests do not fit on these boards'."""
    count = "one request at a time" if slots == 1 else f"up to {slots} requests at once"
    return f"{count}: {because}" if because else count
