"""From a plan to stages that run: orders for every device, and whether they have been carried out.

Pure: plans and reports in, orders and verdicts out. The service publishes and waits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec
from msgspec import Struct

from coordinator.journal import DeploymentRecord
from coordinator.planning.plan import Plan, PlannedStage, Standby
from coordinator.planning.replicas import held_on
from models.engine.names import STANDARD
from models.graph import Graph
from wire.errors import PeerError, Refused
from wire.limits import MAX_CONTROL_BYTES
from wire.messages import Applied, ArtifactRef, Desired, StageOrder, StageReport, decode
from wire.units import bytes_text

MAX_NAME = 32
"""Characters of a topic level and DNS label of ours (wire.ids)."""


LARGEST_EPOCH = 2**63 - 1
"""Epochs grow: what fits with this one fits with every later one."""

MAX_STAGES = 64
"""Stages in one Desired message (wire.messages)."""


class Readiness(Struct, frozen=True, kw_only=True):
    """Where a deployment stands. `ready` when every stage of its epoch is; `failed` holds (device, detail)."""

    ready: bool
    waiting: tuple[str, ...]
    failed: tuple[tuple[str, str], ...]

    def text(self) -> str:
        return "ready" if self.ready else "; ".join(self.waiting)


def deployment_name(model: str) -> str:
    """A topic level from a model's name: 'hf:org/Model-1B' -> 'org-model-1b'; at most 32 characters.

    Of a longer name (a path, mostly) the end is kept, with a hash: two models in one folder are two deployments.
    """
    text = re.sub(r"[^a-z0-9]+", "-", model.lower().removeprefix("hf:")).strip("-")
    if len(text) <= MAX_NAME:
        return text or "model"
    digest = hashlib.sha256(model.encode("utf-8", "replace")).hexdigest()[:6]
    return f"{text[-(MAX_NAME - 7) :].strip('-')}-{digest}"


def stage_artifacts(graph: Graph, stage: PlannedStage) -> list[str]:
    """Digests of the files that hold a stage's weights, each once, in module order."""
    names = (["embedding"] if stage.embedding else []) + [
        f"block.{number}" for number in range(stage.first_block, stage.end_block)
    ]
    names += ["head"] if stage.head else []
    return list(dict.fromkeys(digest for name in names for digest in graph.module(name).artifacts))


def make_orders(
    plan: Plan,
    graph: Graph,
    config: Struct,
    graph_artifact: Callable[[PlannedStage], ArtifactRef],
    weight_artifact: Callable[[str], ArtifactRef],
    standard_artifact: Callable[[PlannedStage], ArtifactRef | None] = lambda _: None,
) -> dict[str, tuple[StageOrder, ...]]:
    """The order for each device of a plan."""
    orders: dict[str, tuple[StageOrder, ...]] = {}
    for index, stage in enumerate(plan.stages):
        following = plan.stages[(index + 1) % len(plan.stages)]
        before = plan.stages[index - 1]
        order = StageOrder(
            deployment=plan.deployment,
            epoch=plan.epoch,
            stage=stage.stage,
            stages=len(plan.stages),
            model=plan.model,
            engine=stage.engine,
            graph=graph_artifact(stage),
            standard_graph=standard_artifact(stage),
            weights=tuple(weight_artifact(digest) for digest in stage_artifacts(graph, stage)),
            embedding=stage.embedding,
            head=stage.head,
            first_block=stage.first_block,
            end_block=stage.end_block,
            hidden=graph.hidden,
            vocabulary=graph.vocabulary,
            wire_dtype=plan.wire_dtype,
            context_tokens=plan.context_tokens,
            slots=plan.slots,
            prefill_chunk_tokens=plan.prefill_chunk_tokens,
            inbox=stage.inbox,
            next=following.inbox,
            codec_in="as-is" if stage.embedding else before.codec,
            codec_out=stage.codec,
            row_codec_in="as-is" if stage.embedding else before.row_codec,
            row_codec_out=stage.row_codec,
            config=msgspec.json.encode(config).decode(),
            runs=plan.runs,
        )
        orders[stage.device] = (*orders.get(stage.device, ()), order)
    return orders


class Ordering(Protocol):
    """A deployment, or a job: something that devices have orders for."""

    @property
    def orders(self) -> dict[str, tuple[StageOrder, ...]]: ...


def desired_for(device: str, epoch: int, records: Iterable[Ordering], artifacts_url: str) -> Desired:
    """All stages that a device should run, over all deployments and jobs."""
    stages = tuple(order for record in records for order in record.orders.get(device, ()))
    return Desired(device=device, epoch=epoch, artifacts_url=artifacts_url, stages=stages)


def check_orders(record: DeploymentRecord, others: Iterable[Ordering], artifacts_url: str) -> None:
    """Raise Refused if what a device would be told, with all other deployments, is more than a message may be, or
    holds what none may hold.

    Asked before a deployment is journaled: devices refuse such a message, and a restart would send it again.
    """
    check_told(record, others, artifacts_url, record.plan.epoch)
    _check_size(f"the plan of {record.name}", msgspec.json.encode(record.plan))


def check_told(record: Ordering, others: Iterable[Ordering], artifacts_url: str, epoch: int) -> None:
    """The same of the orders alone."""
    records = [*others, record]
    for device in record.orders:
        desired = desired_for(device, LARGEST_EPOCH, records, artifacts_url)
        _check_size(f"the orders for {device}", msgspec.json.encode(desired))
        if len(desired.stages) > MAX_STAGES:
            raise Refused(
                f"{device} would hold {len(desired.stages)} stages, at most {MAX_STAGES} are possible",
                try_="take another deployment out of force first",
            )
        _check_readable(device, msgspec.structs.replace(desired, epoch=epoch))


def _check_readable(device: str, desired: Desired) -> None:
    """One order that can't be read keeps a device from all others, which travel in the same message."""
    try:
        decode(msgspec.json.encode(desired), Desired, f"the orders for {device}")
    except PeerError as error:
        raise Refused(
            f"{device} could not take its orders: {error.message}", try_="other values of --context and --slots"
        ) from None


def _check_size(what: str, data: bytes) -> None:
    if len(data) > MAX_CONTROL_BYTES:
        raise Refused(
            f"{what} would take {bytes_text(len(data))}, a message may have {bytes_text(MAX_CONTROL_BYTES)}",
            try_="more boards, with fewer modules each: --boards-at-least; or another model",
        )


def readiness(plan: Plan, applied: Mapping[str, Applied], online: Callable[[str], bool]) -> Readiness:
    """Compare a plan with what the devices say that they run."""
    waiting: list[str] = []
    failed: list[tuple[str, str]] = []
    for stage in plan.stages:
        where = f"stage {stage.stage} on {stage.device}"
        if not online(stage.device):
            waiting.append(f"{where}: the device is offline")
            continue
        report = report_of(plan, stage, applied.get(stage.device))
        refusal = _refusal_of(plan, applied.get(stage.device))
        if report is None and refusal:
            failed.append((stage.device, refusal))
        elif report is None:
            waiting.append(f"{where}: no answer yet")
        elif report.phase == "failed":
            failed.append((stage.device, report.detail or "no reason given"))
        elif report.phase != "ready":
            share = f" {report.fetched_bytes}/{report.to_fetch_bytes} bytes" if report.phase == "fetching" else ""
            waiting.append(f"{where}: {report.phase}{share}")
    return Readiness(ready=not waiting and not failed, waiting=tuple(waiting), failed=tuple(failed))


def loading_text(plan: Plan, applied: Mapping[str, Applied]) -> str:
    """How far a deployment is, in a line: '2 of 4 stages ready; pi4 fetching 12.4 MB of 34.7 MB; pi5 loading'."""
    parts: list[str] = []
    ready = 0
    for stage in plan.stages:
        report = report_of(plan, stage, applied.get(stage.device))
        if report is None:
            parts.append(f"{stage.device} has not answered")
        elif report.phase == "ready":
            ready += 1
        elif report.phase == "fetching":
            share = f"{bytes_text(report.fetched_bytes)} of {bytes_text(report.to_fetch_bytes)}"
            parts.append(f"{stage.device} fetching {share}")
        else:
            parts.append(f"{stage.device} {report.phase}")
    return "; ".join([f"{ready} of {len(plan.stages)} stages ready", *parts])


def report_of(plan: Plan, stage: PlannedStage | Standby, applied: Applied | None) -> StageReport | None:
    """What a device says of a stage that it holds in the plan's epoch, or of a copy of one."""
    for report in applied.stages if applied else ():
        if (report.deployment, report.stage, report.epoch) == (plan.deployment, stage.stage, plan.epoch):
            return report
    return None


def _refusal_of(plan: Plan, applied: Applied | None) -> str:
    """Why a device does not take the orders of a plan; '' if it has not said that."""
    if applied is None or applied.refused_epoch < plan.epoch:
        return ""
    return f"it refused the order: {applied.refused_because or 'no reason given'}"


def ended_stages(before: Applied | None, now: Applied | None) -> tuple[StageReport, ...]:
    """Reports of stages that were ready, and are not or were started again: what they held of requests is gone."""
    restarts = {
        (report.deployment, report.stage, report.epoch): report.restarts
        for report in (before.stages if before else ())
        if report.phase == "ready"
    }
    return tuple(
        report
        for report in (now.stages if now else ())
        if (key := (report.deployment, report.stage, report.epoch)) in restarts
        and (report.phase != "ready" or report.restarts > restarts[key])
    )


def needs_standard(plan: Plan, stage: PlannedStage) -> bool:
    """Whether the stage, or a copy of it, shall run on an engine that reads standard operators only."""
    copies = [standby.engine for standby in plan.standbys if standby.stage == stage.stage]
    return not STANDARD.isdisjoint([stage.engine, *copies])


def fallbacks(before: Applied | None, now: Applied | None) -> tuple[StageReport, ...]:
    """Reports of stages that run on another engine than was ordered, and did not say so before."""
    said = {(report.deployment, report.stage, report.fell_back) for report in (before.stages if before else ())}
    return tuple(
        report
        for report in (now.stages if now else ())
        if report.fell_back and (report.deployment, report.stage, report.fell_back) not in said
    )


def works_on(plan: Plan, stage: int, device: str) -> bool:
    """Whether a stage of the ring is on this device: a copy of it that waits does not count."""
    return any(planned.stage == stage and planned.device == device for planned in plan.stages)


def held_elsewhere(records: Sequence[DeploymentRecord], deployment: str, device: str) -> int:
    """Bytes that other deployments hold on a device."""
    return sum(held_on(record.plan, device) for record in records if record.name != deployment)
