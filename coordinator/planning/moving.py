"""What it costs to move weights, as seconds per token: so a new plan leaves loaded what it can. Pure.

A module on a board that does not hold it has to be sent there, at its link's measured rate. Shared over the tokens that
a deployment gives until something changes again, that is added to what the module takes there. A board that holds a
module already gets it without; so among plans that are nearly as good the one is found that moves least.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

import numpy as np

from coordinator.planning.cost import DeviceCost, stage_modules
from coordinator.planning.partition import Floats
from coordinator.planning.plan import Plan
from models.graph import Graph

TOKENS_AHEAD: Final = 10_000
"""That a deployment is taken to give before its boards, links or requests are others: an hour of steady answers."""

Held = Mapping[str, Collection[str]]
"""Device -> names of the modules that are loaded on it."""


def held_by(plan: Plan, graph: Graph) -> dict[str, tuple[str, ...]]:
    """What a plan in force has loaded, copies of stages included."""
    stages = {stage.stage: stage for stage in plan.stages}
    places = [(stage.device, stage) for stage in plan.stages]
    places += [(standby.device, stages[standby.stage]) for standby in plan.standbys]
    held: dict[str, tuple[str, ...]] = {}
    for device, stage in places:
        held[device] = (*held.get(device, ()), *(module.name for module in stage_modules(graph, stage)))
    return held


def moving_s(graph: Graph, costs: Collection[DeviceCost], held: Held) -> Floats:
    """[N, L] seconds per token of sending each module to each device. Where no link was measured nothing is added:
    such a device can hold only everything, and nobody knows how long that takes."""
    seconds = np.zeros((len(costs), len(graph.modules)))
    for d, cost in enumerate(costs):
        here = held.get(cost.device, ())
        for place, module in enumerate(graph.modules):
            if module.name not in here and cost.link is not None:
                seconds[d, place] = module.weight_bytes / cost.link.bytes_per_s / TOKENS_AHEAD
    return seconds
