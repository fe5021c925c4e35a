"""What a device should run, against what it does run: the next actions. Pure.

`actions` looks at each stage that is wanted or running, says in which situation it is, and gives what follows:

    situation                                             action
    running, not wanted                                   Stop
    running, wanted, loaded from other files or sizes     Stop (and then Start)
    running, wanted, only epoch or neighbours differ      Adopt (told through its pipe; nothing is loaded again)
    running, wanted, all the same                         -
    being ended                                           -
    not running, files missing                            Fetch
    not running, files there, resting after a death       -
    not running, files there, died too often              -
    not running, files there                              Start

Standbys wait until every stage that has to answer was fetched and started here: nothing holds up an answer less than a
copy that may never be needed.

Asking again with the same arguments gives the same answer, and an answer carried out is not given again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import Enum
from typing import Literal

import msgspec
from msgspec import Struct

from wire.messages import ArtifactRef, StageOrder

Phase = Literal["waiting", "fetching", "loading", "ready", "failed", "stopping"]
"""As wire.messages.StageReport has it."""

Key = tuple[str, int]
"""(deployment, stage)."""


class Hold(Enum):
    """Why a stage that does not run is not started."""

    NONE = "may start"
    RESTING = "died a moment ago"
    GIVEN_UP = "died too often in this epoch"


class Running(Struct, frozen=True):
    """A worker that exists, or (with `order` None) the memory of one that died."""

    order: StageOrder | None
    ending: bool = False
    hold: Hold = Hold.NONE


class Fetch(Struct, frozen=True):
    key: Key
    refs: tuple[ArtifactRef, ...]


class Start(Struct, frozen=True):
    key: Key
    order: StageOrder


class Adopt(Struct, frozen=True):
    """The stage keeps what is loaded and takes a new epoch, inbox or next."""

    key: Key
    order: StageOrder


class Stop(Struct, frozen=True):
    key: Key
    because: str


Action = Fetch | Start | Adopt | Stop

# What an engine is loaded from. All other fields of an order may change under a loaded engine.
_LOADED = (
    "engine", "graph", "weights", "embedding", "head", "first_block", "end_block", "hidden", "vocabulary",
    "wire_dtype", "context_tokens", "slots", "config", "runs", "standard_graph", "training",
)  # fmt: skip


def key_of(order: StageOrder) -> Key:
    return order.deployment, order.stage


def same_load(one: StageOrder, other: StageOrder) -> bool:
    """Whether an engine loaded for `one` serves `other` as it is."""
    return all(getattr(one, field) == getattr(other, field) for field in _LOADED)


def light(order: StageOrder) -> StageOrder:
    """The order without what a loaded engine needs no more: short enough for a pipe that nobody reads just now."""
    return msgspec.structs.replace(order, weights=(), config="")


def files_of(order: StageOrder) -> tuple[ArtifactRef, ...]:
    """Graphs, weights and tokenizer, each digest once."""
    graphs = (order.graph,) if order.standard_graph is None else (order.graph, order.standard_graph)
    tokenizer = order.training.tokenizer if order.training is not None else None
    refs = (*graphs, *order.weights, *(() if tokenizer is None else (tokenizer,)))
    return tuple({ref.digest: ref for ref in refs}.values())


def actions(
    wanted: Sequence[StageOrder], running: Mapping[Key, Running], present: Collection[str]
) -> tuple[Action, ...]:
    """Give what to do next; `present` are the digests that are stored and verified."""
    orders = {key_of(order): order for order in wanted}
    found: list[Action] = []
    for key in sorted({*orders, *running}):
        action = _action(key, orders.get(key), running.get(key, Running(None)), present)
        if action is not None:
            found.append(action)
    if any(isinstance(action, Fetch | Start) and not orders[action.key].standby for action in found):
        found = [action for action in found if not (isinstance(action, Fetch | Start) and orders[action.key].standby)]
    # Stops first: they give back memory and disk that the others need.
    return tuple(sorted(found, key=lambda action: not isinstance(action, Stop)))


def _action(key: Key, order: StageOrder | None, now: Running, present: Collection[str]) -> Action | None:
    if now.ending:
        return None
    if now.order is not None:
        if order is None:
            return Stop(key, "no longer wanted")
        if not same_load(now.order, order):
            return Stop(key, "other blocks, files or sizes are wanted")
        return None if now.order == order else Adopt(key, order)
    if order is None:
        return None
    missing = tuple(ref for ref in files_of(order) if ref.digest not in present)
    if missing:
        return Fetch(key, missing)
    return Start(key, order) if now.hold is Hold.NONE else None
