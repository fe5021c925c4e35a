"""Copies of stages that wait: their orders, and how far they are. Pure.

A copy has an inbox of its own, to which nobody sends, and is its own next stage: so it connects, proves that it can be
reached, and hears nothing of the ring. When it takes over, its order differs in epoch, inbox and neighbours only, and
the device adopts it without loading anything (agent.converge).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import msgspec

from coordinator.deployments import readiness, report_of
from coordinator.planning.plan import Plan, PlannedStage, Standby
from coordinator.planning.replicas import Key
from wire import topics
from wire.messages import Applied, InboxAddress, StageOrder, StageReport

Orders = dict[str, tuple[StageOrder, ...]]
"""Device -> what it should hold."""


def with_copies(plan: Plan, orders: Mapping[str, Iterable[StageOrder]], site: str) -> Orders:
    """The orders of a plan, from those of its stages under any epoch and on any devices: what is loaded is the same."""
    made = {order.stage: order for found in orders.values() for order in found}
    ordered: Orders = {}
    for index, stage in enumerate(plan.stages):
        following = plan.stages[(index + 1) % len(plan.stages)]
        order = _placed(made[stage.stage], plan, stage, stage.inbox, following.inbox)
        ordered[stage.device] = (*ordered.get(stage.device, ()), order)
    for standby in plan.standbys:
        own = InboxAddress(topic=inbox_topic(site, plan, standby))
        order = _placed(made[standby.stage], plan, standby, own, own)
        ordered[standby.device] = (*ordered.get(standby.device, ()), order)
    return ordered


def inbox_topic(site: str, plan: Plan, standby: Standby) -> str:
    return topics.INBOX.on(site, plan.deployment, f"{standby.stage}-standby-{standby.device}")


def _placed(
    order: StageOrder, plan: Plan, at: PlannedStage | Standby, inbox: InboxAddress, after: InboxAddress
) -> StageOrder:
    standby = isinstance(at, Standby)
    return msgspec.structs.replace(order, epoch=plan.epoch, inbox=inbox, next=after, standby=standby, engine=at.engine)


def report_of_copy(plan: Plan, standby: Standby, applied: Mapping[str, Applied]) -> StageReport | None:
    report = report_of(plan, standby, applied.get(standby.device))
    return report if report is not None and report.standby else None


def ready_copies(plan: Plan, applied: Mapping[str, Applied], online: Callable[[str], bool]) -> set[Key]:
    """Copies that could take over now."""
    return {
        (standby.stage, standby.device)
        for standby in plan.standbys
        if online(standby.device)
        and (report := report_of_copy(plan, standby, applied)) is not None
        and report.phase == "ready"
    }


def failed_copies(plan: Plan, applied: Mapping[str, Applied]) -> dict[Key, str]:
    """Copies that their devices have given up, and why."""
    return {
        (standby.stage, standby.device): report.detail or "no reason given"
        for standby in plan.standbys
        if (report := report_of_copy(plan, standby, applied)) is not None and report.phase == "failed"
    }


def lost_stages(
    plan: Plan, applied: Mapping[str, Applied], online: Callable[[str], bool], brokers: Mapping[str, str]
) -> set[int]:
    """Stages that are not there any more, or not reached where the plan says; one that is being started again is."""
    return {stage.stage for stage in plan.stages if _is_lost(plan, stage, applied, online, brokers)}


def _is_lost(
    plan: Plan,
    stage: PlannedStage,
    applied: Mapping[str, Applied],
    online: Callable[[str], bool],
    brokers: Mapping[str, str],
) -> bool:
    if not online(stage.device) or stage.inbox.broker not in ("", brokers.get(stage.device)):
        return True
    alone = msgspec.structs.replace(plan, stages=(stage,))
    return bool(readiness(alone, applied, online).failed)


def copy_rows(plan: Plan, applied: Mapping[str, Applied], online: Callable[[str], bool]) -> list[dict[str, Any]]:
    """For GET /v1/status: how far each copy is."""
    rows = []
    for standby in plan.standbys:
        report = report_of_copy(plan, standby, applied)
        phase = "offline" if not online(standby.device) else report.phase if report is not None else "no answer yet"
        rows.append(
            {
                "stage": standby.stage,
                "device": standby.device,
                "phase": phase,
                "detail": report.detail if report is not None else "",
                "held_bytes": report.held_bytes if report is not None else 0,
                "fetched_bytes": report.fetched_bytes if report is not None else 0,
                "to_fetch_bytes": report.to_fetch_bytes if report is not None else 0,
            }
        )
    return rows


def waiting_text(plan: Plan, ready: Collection[Key]) -> str:
    """'3 of 3 standbys ready'; '' when none were asked for."""
    wanted = (plan.replicas - 1) * len(plan.stages)
    return f"{len(ready)} of {wanted} standbys ready" if wanted else ""
