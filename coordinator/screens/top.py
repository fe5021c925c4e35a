"""The live screen: devices, deployments, tokens/s. `snapshot -> rows` is pure; rich only draws them.

Breakpoints at 120, 80 and 60 characters choose which columns are shown at most; on plain screens those that don't fit
beside long names give way. Name and state are always there, and never cut. State is a word, never only a colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from coordinator.screens.plain import state_text
from coordinator.screens.table import table
from wire.ids import site_option
from wire.units import bytes_text, seconds_text

STALE_AFTER_S = 3.0


class Snapshot(Struct, frozen=True, kw_only=True):
    """One look at the coordinator; `taken_s` is monotonic."""

    taken_s: float
    status: dict[str, Any]
    devices: tuple[dict[str, Any], ...]
    notices: tuple[dict[str, Any], ...]


class Column(Struct, frozen=True, kw_only=True):
    title: str
    from_width: int
    right: bool = False


DEVICE_COLUMNS: tuple[Column, ...] = (
    Column(title="device", from_width=0),
    Column(title="state", from_width=0),
    Column(title="stage", from_width=60),
    Column(title="steps/s", from_width=60, right=True),
    Column(title="step", from_width=80, right=True),
    Column(title="cpu", from_width=80, right=True),
    Column(title="memory", from_width=80, right=True),
    Column(title="link", from_width=120, right=True),
    Column(title="board", from_width=120),
)


def columns_for(width: int) -> tuple[int, ...]:
    """Indices of the device columns that fit a terminal of this width."""
    return tuple(index for index, column in enumerate(DEVICE_COLUMNS) if width >= column.from_width)


def _stages(device: Mapping[str, Any]) -> str:
    parts = [
        f"{report['deployment']}/{report['stage']} {'standby ' if report['standby'] else ''}{report['phase']}"
        for report in device["stages"]
    ]
    return ", ".join(parts) or "-"


def _steps(device: Mapping[str, Any]) -> dict[tuple[str, int, int], tuple[int, float]]:
    return {
        (row["deployment"], row["epoch"], row["stage"]): (row["decode_steps"], row["decode_busy_s"])
        for row in device["counters"]
    }


def _rate(
    device: Mapping[str, Any],
    before: Mapping[str, Any] | None,
    span_s: float,
    only: tuple[str, int, int] | None = None,
) -> tuple[str, str]:
    """Decode steps per second and mean step time since the snapshot before; '-' when idle or unknown.

    Of all stages of the device, or `only` of (deployment, epoch, stage).
    """
    if before is None or span_s <= 0:
        return "-", "-"
    now, then = _steps(device), _steps(before)
    counted = [key for key in now if key in then and only in (None, key)]
    steps = sum(now[key][0] - then[key][0] for key in counted)
    busy_s = sum(now[key][1] - then[key][1] for key in counted)
    if steps <= 0:
        return "-", "-"
    return f"{steps / span_s:.1f}", seconds_text(busy_s / steps)


def device_cells(device: Mapping[str, Any], before: Mapping[str, Any] | None, span_s: float) -> tuple[str, ...]:
    """All cells of a device's row, in the order of DEVICE_COLUMNS."""
    state = state_text(device)
    heard_s = device["heard_s"]
    if heard_s is not None and heard_s > STALE_AFTER_S:
        state += f" ({heard_s:.0f} s old)"
    rate, step = _rate(device, before, span_s)
    memory = "-"
    if device["memory_used_bytes"] is not None and device["memory_bytes"]:
        memory = f"{bytes_text(device['memory_used_bytes'])} of {bytes_text(device['memory_bytes'])}"
    cpu = "-" if device["cpu_fraction"] is None else f"{device['cpu_fraction']:.2f}"
    link = "-" if device["round_trip_s"] is None else seconds_text(device["round_trip_s"])
    return (device["device"], state, _stages(device), rate, step, cpu, memory, link, device["board"] or "-")


def device_rows(now: Snapshot, before: Snapshot | None) -> list[tuple[str, ...]]:
    earlier = {device["device"]: device for device in before.devices} if before else {}
    span_s = now.taken_s - before.taken_s if before else 0.0
    return [device_cells(device, earlier.get(device["device"]), span_s) for device in now.devices]


def headline(now: Snapshot) -> str:
    status = now.status
    broker = "up" if status["broker_up"] else "DOWN"
    return (
        f"site {status['site']}  broker {broker} ({status['protocol']})  "
        f"{status['devices_online']} of {status['devices_known']} devices online"
    )


def deployment_lines(now: Snapshot, before: Snapshot | None) -> list[str]:
    """One line per deployment: state, stages, tokens/s of its head."""
    lines = []
    for row in now.status["deployments"]:
        plan = row["plan"]
        head = plan["stages"][-1]
        device = next((d for d in now.devices if d["device"] == head["device"]), None)
        earlier = next((d for d in before.devices if d["device"] == head["device"]), None) if before else None
        own = (row["name"], row["epoch"], head["stage"])
        rate = _rate(device, earlier, now.taken_s - before.taken_s, own)[0] if device and before else "-"
        chain = " > ".join(stage["device"] for stage in plan["stages"])
        lines.append(f"{row['name']}  epoch {row['epoch']}  {row['text']}  {chain}  {rate} tokens/s")
    return lines or ["no deployment yet  (try: edgelam run smollm2 --prompt Hello)"]


def notice_lines(now: Snapshot, most: int = 4) -> list[str]:
    return [
        f"{notice['level']}: {notice['text']}" + (f"  try: {notice['try_']}" if notice["try_"] else "")
        for notice in now.notices[-most:]
    ]


def _device_table(rows: Sequence[tuple[str, ...]], chosen: Sequence[int]) -> str:
    header = [DEVICE_COLUMNS[index].title for index in chosen]
    right = [place for place, index in enumerate(chosen) if DEVICE_COLUMNS[index].right]
    return table(header, [[row[index] for index in chosen] for row in rows], right=right)


def plain(now: Snapshot, before: Snapshot | None, width: int = 100) -> str:
    """The whole screen as text."""
    rows = device_rows(now, before)
    chosen = columns_for(width)
    body = _device_table(rows, chosen)
    while len(chosen) > 2 and len(body.splitlines()[1]) > width:  # long names leave room for fewer columns
        chosen = chosen[:-1]
        body = _device_table(rows, chosen)
    if not rows:
        body = f"no devices yet  (try: edgelam testbed up{site_option(now.status['site'])} --boards 4)"
    lines: Sequence[str] = [headline(now), "", body, "", *deployment_lines(now, before), *notice_lines(now)]
    return "\n".join(lines)
