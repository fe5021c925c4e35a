"""Which engine a board shall compute with: the one with which it measured itself to be fastest. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from coordinator.planning.cost import DeviceCost, Workload, device_cost
from coordinator.planning.plan import LeftOut
from hwprofiles.profile import Profile
from models.engine.names import AUTOMATIC
from models.graph import Graph
from wire.messages import EngineName


def best_engine_cost(
    graph: Graph,
    device: str,
    profile: Profile,
    usable_bytes: int,
    workload: Workload,
    wanted: str,
    without: Mapping[str, str] = {},
) -> DeviceCost | LeftOut:
    """Price a device on the engine that is wanted, or on the one of AUTOMATIC whose decode step through the whole model
    is the shortest ('auto'); or say why it can't be priced. `without`: engines that failed there, and why."""

    def priced(engine: EngineName) -> DeviceCost | LeftOut:
        return device_cost(graph, device, profile, usable_bytes, msgspec.structs.replace(workload, engine=engine))

    if wanted != "auto":
        return priced(msgspec.convert(wanted, EngineName))
    measured = {measurement.engine.partition(" ")[0] for measurement in profile.modules} - without.keys()
    # onnxruntime last: where nothing was measured, its reason is the one to give.
    offers = [priced(engine) for engine in AUTOMATIC if engine in measured or engine == "onnxruntime"]
    costs = [offer for offer in offers if isinstance(offer, DeviceCost)]
    if not costs:
        return offers[-1]
    best = min(costs, key=lambda cost: cost.stage_s(graph.modules))
    best_s = max(best.stage_s(graph.modules), 1e-9)
    others = [
        f"{cost.stage_s(graph.modules) / best_s:.1f} times as fast on {best.engine} as on {cost.engine}"
        for cost in costs
        if cost is not best
    ]
    others += [f"without {engine}, which failed there ({because})" for engine, because in without.items()]
    return msgspec.structs.replace(best, engine_because=", ".join(others))
