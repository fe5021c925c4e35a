"""Screens as plain text: devices, plan, stages of a finished request. Pure: dicts of the HTTP door in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.measured import blocks_text
from coordinator.notices import boards_hint
from coordinator.planning.replicas import copies_text
from coordinator.planning.slots import slots_text
from coordinator.screens.table import table
from wire.codecs import AS_IS
from wire.units import bytes_text, seconds_text


def _or_dash(value: object, text: str) -> str:
    return "-" if value is None else text


def state_text(device: Mapping[str, Any]) -> str:
    """'online'; 'online, at 0.40' for a board that runs at so much of what it measured."""
    speed = device["speed"]
    return f"{device['state']}, at {speed:.2f}" if speed < 1 else str(device["state"])


def profile_text(device: Mapping[str, Any]) -> str:
    """'live, 3 modules'; 'live, 3 modules, steps take 1.08' for a board that has worked."""
    borne = device.get("borne_out")
    return f"{device['profile']}, steps take {borne['times']:.2f}" if borne else str(device["profile"])


def devices_text(devices: Sequence[Mapping[str, Any]], site: str) -> str:
    """One row per device; says what to do when there is none."""
    if not devices:
        return f"no devices yet\n  try: {boards_hint(site)}"
    rows = [
        (
            row["device"],
            state_text(row),
            row["board"] or "-",
            _or_dash(row["cores"], f"{row['cores'] or 0:g}"),
            _or_dash(row["memory_bytes"], bytes_text(row["memory_bytes"] or 0)),
            _or_dash(row["round_trip_s"], seconds_text(row["round_trip_s"] or 0)),
            row["engines"] or "-",
            row["running"] or "-",
            profile_text(row),
            _or_dash(row["heard_s"], f"{row['heard_s'] or 0:.0f} s"),
        )
        for row in devices
    ]
    header = ("device", "state", "board", "cores", "memory", "link", "engines", "running", "profile", "heard")
    return table(header, rows, right=(3, 4, 5, 9))


def plan_text(plan: Mapping[str, Any]) -> str:
    """A plan as a table, with the sums and the reason."""
    rows = [
        (
            stage["stage"],
            stage["device"],
            blocks_text(stage["embedding"], stage["first_block"], stage["end_block"], stage["head"]),
            bytes_text(stage["held_bytes"]),
            f"{bytes_text(stage['memory_bytes'])} of {bytes_text(stage['memory_limit_bytes'])}",
            seconds_text(stage["compute_s"]),
            seconds_text(stage["hop_s"]),
            f"{stage['hop_bytes']} B{_coded(stage)}",
        )
        for stage in plan["stages"]
    ]
    header = ("stage", "device", "blocks", "weights+KV", "memory", "compute/token", "hop/token", "sent/token")
    lines = [
        f"{plan['model']} at {plan['precision']}, hidden states in {plan['wire_dtype']}, "
        f"objective {plan['objective']}, topology {plan['topology']}, epoch {plan['epoch']}",
        table(header, rows, right=(3, 5, 6, 7)),
        f"predicted {seconds_text(plan['predicted_token_s'])} per token "
        f"({1 / plan['predicted_token_s']:.1f} tokens/s for one stream); "
        f"slowest part {seconds_text(plan['predicted_slowest_s'])}",
        plan["because"],
        slots_text(plan["slots"], plan["slots_because"]),
    ]
    if plan["alone"]:
        lines.append(plan["alone"])
    lines += _copies(plan)
    if plan["left_out"]:
        lines.append("left out")
        lines += [f"  {left['device']}: {left['because']}" for left in plan["left_out"]]
    return "\n".join(lines)


def _copies(plan: Mapping[str, Any]) -> list[str]:
    """Which boards hold copies that wait, what they need and take; none when none were asked for."""
    if plan["replicas"] == 1:
        return []
    needed = sum(standby["memory_bytes"] for standby in plan["standbys"])
    lines = [copies_text(plan["replicas"], needed, plan["replicas_because"])]
    return lines + [
        f"  stage {standby['stage']} on {standby['device']} too: {bytes_text(standby['held_bytes'])} weights+KV, "
        f"{bytes_text(standby['memory_bytes'])} in all; {seconds_text(standby['compute_s'])} per token there"
        for standby in plan["standbys"]
    ]


def _coded(stage: Mapping[str, Any]) -> str:
    """' int8-group' where hidden states do not cross as they are, ' (prompts: int8-group)' where only prompts don't."""
    codec, of_rows = stage.get("codec", AS_IS), stage.get("row_codec", AS_IS)
    if codec == AS_IS:
        return ""
    return f" {codec}" if of_rows == codec else f" (prompts: {codec})"


def stages_text(end: Mapping[str, Any]) -> str:
    """The table at the end of a request: predicted beside measured, per stage and in all."""
    rows = []
    for row in end["stages"]:
        measured_s, sent = row["measured_compute_s"], row["sent_bytes_per_token"]
        rows.append(
            (
                row["stage"],
                row["device"],
                row["blocks"],
                bytes_text(row["held_bytes"]),
                seconds_text(row["predicted_compute_s"]),
                _or_dash(measured_s, seconds_text(measured_s or 0)),
                seconds_text(row["predicted_hop_s"]),
                _or_dash(sent, f"{sent or 0:.0f} B"),
            )
        )
    header = ("stage", "device", "blocks", "held", "predicted", "measured", "hop (predicted)", "sent/token")
    lines = [table(header, rows, right=(3, 4, 5, 6, 7))]
    token_s, predicted_s = end["token_s"], end["predicted_token_s"]
    if token_s is not None:
        lines.append(
            f"time per token: predicted {seconds_text(predicted_s)}, measured {seconds_text(token_s)} "
            f"({(token_s - predicted_s) / predicted_s:+.0%}); {end['tokens_per_s']:.1f} tokens/s; "
            f"first token after {seconds_text(end['time_to_first_token_s'])}"
        )
    if end["bytes_per_token"] is not None:
        lines.append(f"bytes per token over all hops: {end['bytes_per_token']:.0f}")
    if end["drafts_sent"]:
        share = end["drafts_accepted"] / end["drafts_sent"]
        lines.append(f"tokens guessed: {end['drafts_sent']}, right: {end['drafts_accepted']} ({share:.0%})")
    return "\n".join(lines)
