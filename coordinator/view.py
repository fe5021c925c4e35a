"""What the coordinator shows of itself: plain rows, made from its state by pure functions."""

from __future__ import annotations

import os
import time
from typing import Any

import msgspec

from coordinator.borne import BorneOut
from coordinator.deployments import readiness
from coordinator.distrust import Distrust
from coordinator.fleet import Device
from coordinator.planning.slowed import Slowed
from coordinator.service import Coordinator
from coordinator.standbys import copy_rows, ready_copies, waiting_text
from hwprofiles.profile import LinkMeasurement
from hwprofiles.stats import median
from wire.messages import DeviceInfo
from wire.version import VERSION


def status_row(coordinator: Coordinator) -> dict[str, Any]:
    """Answer of GET /v1/status."""
    return {
        "schema": "edgelam.status/1",
        "version": VERSION,
        "site": coordinator.site,
        "boot": coordinator.boot,
        "pid": os.getpid(),
        "up_s": time.monotonic() - coordinator.started_s,
        "mqtt_url": coordinator.mqtt_url,
        "broker": coordinator.broker_text,
        "broker_up": coordinator.broker_up,
        "protocol": coordinator.hub.transport.protocol,
        "devices_online": len(coordinator.online()),
        "devices_known": len(coordinator.devices()),
        "refused_messages": coordinator.refused_messages,
        "deployments": [deployment_row(coordinator, record.name) for record in coordinator.records()],
    }


def deployment_row(coordinator: Coordinator, name: str) -> dict[str, Any]:
    record = next(record for record in coordinator.records() if record.name == name)
    plan, applied, online = record.plan, coordinator.applied(), coordinator.is_online
    state = readiness(plan, applied, online)
    waiting = waiting_text(plan, ready_copies(plan, applied, online))
    return {
        "name": name,
        "model": record.plan.model,
        "epoch": record.plan.epoch,
        "ready": state.ready,
        "text": f"{state.text()}; {waiting}" if waiting else state.text(),
        "failed": [f"{device}: {why}" for device, why in state.failed],
        "standbys": copy_rows(plan, applied, online),
        "plan": msgspec.to_builtins(record.plan),
    }


def device_rows(coordinator: Coordinator) -> list[dict[str, Any]]:
    """Answer of GET /v1/devices."""
    now_s = time.monotonic()
    return [
        device_row(
            device,
            now_s,
            coordinator.slowed(device.name),
            coordinator.trust.of(device.name),
            coordinator.borne.of(device.name),
        )
        for device in coordinator.devices()
    ]


def device_row(
    device: Device,
    now_s: float,
    slowed: Slowed | None = None,
    doubt: Distrust | None = None,
    borne: BorneOut | None = None,
) -> dict[str, Any]:
    """One device; None where nothing is known."""
    info, profile, telemetry, applied = device.info, device.profile, device.telemetry, device.applied
    link = profile.link if profile is not None and isinstance(profile.link, LinkMeasurement) else None
    return {
        "device": device.name,
        "state": device.presence.value,
        "boot": device.boot,
        "board": board_text(info) if info else None,
        "arch": info.arch if info else None,
        "cores": info.cores if info else None,
        "memory_bytes": info.memory_bytes if info else None,
        "memory_used_bytes": telemetry.memory_used_bytes if telemetry else None,
        "cpu_fraction": telemetry.cpu_fraction if telemetry else None,
        "temperature_c": telemetry.temperature_c if telemetry else None,
        "engines": " ".join(f"{e.name} {e.version}" for e in info.engines if e.version) if info else None,
        "emulated": info.emulated if info else None,
        "software": info.software if info else None,
        "data_broker": info.data_broker if info else None,
        "data_broker_because": info.data_broker_because if info else None,
        "profile": profile_text(device) + (", not believed" if doubt is not None else ""),
        "borne_out": msgspec.to_builtins(borne),
        "profile_doubted": doubt.because if doubt is not None else "",
        "speed": 1 / slowed.times if slowed is not None else 1.0,
        "speed_because": slowed.because if slowed is not None else "",
        "round_trip_s": median(link.round_trip.samples_s) if link and link.round_trip.samples_s else None,
        "heard_s": now_s - device.heard_s if device.heard_s is not None else None,
        "running": running_text(device),
        "epoch": applied.epoch if applied else None,
        "stages": [msgspec.to_builtins(report) for report in applied.stages] if applied else [],
        "counters": [msgspec.to_builtins(counters) for counters in telemetry.stages] if telemetry else [],
    }


def board_text(info: DeviceInfo) -> str:
    """What the board is; its architecture where it has no name; and that it is virtual, where it is."""
    name = info.arch if info.board.startswith("(") else info.board
    return f"virtual, {info.emulated}" if info.emulated else name


def profile_text(device: Device) -> str:
    """'none', or source and number of measured modules."""
    if device.profile is None:
        return "none"
    return f"{device.profile.source}, {len(device.profile.modules)} modules"


def running_text(device: Device) -> str:
    """'smollm2 0: ready, smollm2 1 (standby): loading'."""
    if device.applied is None:
        return ""
    return ", ".join(
        f"{report.deployment} {report.stage}{' (standby)' if report.standby else ''}: {report.phase}"
        for report in device.applied.stages
    )
