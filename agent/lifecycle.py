"""The life of a device's agent, as one table.

An agent is SEARCHING until it knows where the broker is, DIALLING until it is connected, CLAIMING until it is sure
that nobody else runs under its name, SERVING from then on, MEASURING while it takes its own measure, DRAINING while
its workers end, and STOPPED. A broker that is lost while SERVING or MEASURING changes nothing here: workers keep
running, and everything retained is said again when the link is back.

Nothing here does I/O: `NEXT` is the whole protocol, and the service carries out the actions in order.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Final, Literal, NamedTuple


class State(Enum):
    SEARCHING = "searching"
    DIALLING = "dialling"
    CLAIMING = "claiming"
    SERVING = "serving"
    MEASURING = "measuring"
    DRAINING = "draining"
    STOPPED = "stopped"


class Event(Enum):
    BROKER_FOUND = "broker found"
    LINK_UP = "link up"
    LINK_DOWN = "link down"
    CLAIMED = "name is ours"
    TAKEN = "name is in use by another"
    MEASURE = "measuring begins"
    MEASURED = "measuring ended"
    STOP = "stop asked"
    WORKERS_GONE = "all workers ended"


class Action(Enum):
    DIAL = "connect to the broker that was found"
    CLAIM = "ask who runs under our name"
    ANNOUNCE = "publish everything retained"
    PUBLISH_STATE = "publish the state"
    TELL_LINK_LOST = "say that the broker is gone"
    END_WORKERS = "end all workers"
    LEAVE = "publish 'offline' and disconnect"
    GIVE_WAY = "disconnect without a word: the name is another's"


class Step(NamedTuple):
    state: State
    actions: tuple[Action, ...] = ()


class UnexpectedEvent(Exception):
    """The table has no such step: a defect of ours, named."""


_END = (Action.PUBLISH_STATE, Action.END_WORKERS)

NEXT: Final[Mapping[tuple[State, Event], Step]] = {
    (State.SEARCHING, Event.BROKER_FOUND): Step(State.DIALLING, (Action.DIAL,)),
    (State.SEARCHING, Event.STOP): Step(State.STOPPED),
    (State.DIALLING, Event.BROKER_FOUND): Step(State.DIALLING, (Action.DIAL,)),
    (State.DIALLING, Event.LINK_UP): Step(State.CLAIMING, (Action.CLAIM,)),
    (State.DIALLING, Event.STOP): Step(State.STOPPED, (Action.GIVE_WAY,)),
    (State.CLAIMING, Event.LINK_DOWN): Step(State.DIALLING),
    (State.CLAIMING, Event.CLAIMED): Step(State.SERVING, (Action.ANNOUNCE,)),
    (State.CLAIMING, Event.TAKEN): Step(State.STOPPED, (Action.GIVE_WAY,)),
    (State.CLAIMING, Event.STOP): Step(State.STOPPED, (Action.GIVE_WAY,)),
    (State.SERVING, Event.BROKER_FOUND): Step(State.SERVING, (Action.DIAL,)),
    (State.SERVING, Event.LINK_UP): Step(State.SERVING, (Action.ANNOUNCE,)),
    (State.SERVING, Event.LINK_DOWN): Step(State.SERVING, (Action.TELL_LINK_LOST,)),
    (State.SERVING, Event.TAKEN): Step(State.DRAINING, (Action.END_WORKERS,)),
    (State.SERVING, Event.MEASURE): Step(State.MEASURING, (Action.PUBLISH_STATE,)),
    (State.SERVING, Event.STOP): Step(State.DRAINING, _END),
    (State.MEASURING, Event.BROKER_FOUND): Step(State.MEASURING, (Action.DIAL,)),
    (State.MEASURING, Event.LINK_UP): Step(State.MEASURING, (Action.ANNOUNCE,)),
    (State.MEASURING, Event.LINK_DOWN): Step(State.MEASURING, (Action.TELL_LINK_LOST,)),
    (State.MEASURING, Event.TAKEN): Step(State.DRAINING, (Action.END_WORKERS,)),
    (State.MEASURING, Event.MEASURED): Step(State.SERVING, (Action.PUBLISH_STATE,)),
    (State.MEASURING, Event.STOP): Step(State.DRAINING, _END),
    (State.DRAINING, Event.LINK_UP): Step(State.DRAINING, (Action.PUBLISH_STATE,)),
    (State.DRAINING, Event.LINK_DOWN): Step(State.DRAINING),
    (State.DRAINING, Event.MEASURED): Step(State.DRAINING),
    (State.DRAINING, Event.STOP): Step(State.DRAINING),
    (State.DRAINING, Event.TAKEN): Step(State.DRAINING),
    (State.DRAINING, Event.WORKERS_GONE): Step(State.STOPPED, (Action.LEAVE,)),
}

SAID: Final[Mapping[State, Literal["online", "busy", "draining", "offline"]]] = {
    State.SERVING: "online",
    State.MEASURING: "busy",
    State.DRAINING: "draining",
}
"""What the retained state topic says; in all other states the agent says nothing."""


def handle(state: State, event: Event) -> Step:
    """Give the step after `event`; raise UnexpectedEvent if the table has none."""
    step = NEXT.get((state, event))
    if step is None:
        raise UnexpectedEvent(f"{event.value!r} while {state.value}")
    return step
