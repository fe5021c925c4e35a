"""What people see: the same rows give the same text, names are never cut, and no terminal is too poor or too narrow.

The goldens are in golden/; `UPDATE_GOLDEN=1 pytest tests/coordinator/test_screens.py` writes them anew, to be read.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from coordinator.commands.common import printable
from coordinator.commands.top import drawing
from coordinator.measured import counters_of, measured
from coordinator.planning.plan import LeftOut
from coordinator.screens.plain import devices_text, plan_text, stages_text, state_text
from coordinator.screens.table import table
from coordinator.screens.top import STALE_AFTER_S, Snapshot, columns_for, device_cells, plain
from tests.coordinator.plans import plan_of
from wire.messages import StageCounters, StageReport, Telemetry

GOLDEN = Path(__file__).parent / "golden"
WIDTHS = (40, 60, 80, 120, 200)
LONGEST = "a-board-with-the-longest-name-00"
assert len(LONGEST) == 32


def counters(stage: int, steps: int, busy_s: float, deployment: str = "tiny", epoch: int = 3) -> dict[str, Any]:
    told = StageCounters(
        deployment=deployment, epoch=epoch, stage=stage, decode_steps=steps, decode_rows=steps, decode_busy_s=busy_s,
        decode_sent_bytes=steps * 1232, resident_bytes=50_000_000,
    )  # fmt: skip
    return dict(msgspec.to_builtins(told))


def device(name: str, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "device": name, "state": "online", "boot": "ab", "board": "Raspberry Pi 5 Model B Rev 1.0", "arch": "aarch64",
        "cores": 4.0, "memory_bytes": 8 << 30, "memory_used_bytes": 210 << 20, "cpu_fraction": 0.12,
        "temperature_c": 51.0, "engines": "onnxruntime 1.23.2", "emulated": "", "software": "0.1.0",
        "profile": "live, 3 modules", "speed": 1.0, "speed_because": "",
        "round_trip_s": 0.0021, "heard_s": 0.4, "running": "tiny 0: ready", "epoch": 3,
        "stages": [msgspec.to_builtins(StageReport(deployment="tiny", epoch=3, stage=0, phase="ready"))],
        "counters": [counters(0, 100, 0.5)],
    }  # fmt: skip
    return {**row, **changes}


NOTHING_KNOWN = dict.fromkeys(
    ("board", "arch", "cores", "memory_bytes", "memory_used_bytes", "cpu_fraction", "temperature_c", "engines",
     "emulated", "software", "round_trip_s", "heard_s", "epoch"),
)  # fmt: skip
SHELF = (
    device("pi5"),
    device("orin", board="NVIDIA Jetson Orin Nano", stages=[], counters=[], running="", cores=5.5),
    device(LONGEST, state="suspect", heard_s=STALE_AFTER_S + 9),
    device("new", state="seen", profile="none", running="", stages=[], counters=[], **NOTHING_KNOWN),
)
NOTICES = (
    {"level": "warning", "text": "no heartbeat from pi4 for 3.1 s", "try_": "wait, or look at its link"},
    {"level": "info", "text": "pi5 is online (10.0.0.7)", "try_": ""},
)


def plan_row() -> dict[str, Any]:
    plan = msgspec.structs.replace(
        plan_of("pi5", LONGEST), left_out=(LeftOut(device="orin", because="alone it holds no block in its memory"),)
    )
    return dict(msgspec.to_builtins(plan))


def snapshot(taken_s: float = 0.0, devices: tuple[dict[str, Any], ...] = SHELF, deployed: bool = True) -> Snapshot:
    row = {
        "name": "tiny",
        "model": "tiny",
        "epoch": 3,
        "ready": True,
        "text": "ready",
        "failed": [],
        "plan": plan_row(),
    }
    status = {
        "site": "lab", "broker_up": True, "protocol": "MQTT 5", "devices_online": 2, "devices_known": len(devices),
        "deployments": [row] if deployed else [],
    }  # fmt: skip
    return Snapshot(taken_s=taken_s, status=status, devices=devices, notices=NOTICES)


def later() -> Snapshot:
    """Two seconds and fifty steps later."""
    moved = (
        device("pi5", counters=[counters(0, 150, 0.75)]),
        SHELF[1],
        {**SHELF[2], "counters": [counters(1, 40, 0.1), counters(0, 900, 9.0, deployment="other")]},
        SHELF[3],
    )
    return snapshot(2.0, moved)


def before() -> Snapshot:
    shelf = (
        SHELF[0],
        SHELF[1],
        {**SHELF[2], "counters": [counters(1, 20, 0.05), counters(0, 0, 0.0, "other")]},
        SHELF[3],
    )
    return snapshot(0.0, shelf)


def end_row() -> dict[str, Any]:
    plan = plan_of("pi5", LONGEST)

    def told(stage: int, steps: int) -> Telemetry:
        return Telemetry(
            seq=1, boot="ab", mono_s=1.0, cpu_fraction=1.0, memory_used_bytes=1, memory_bytes=1,
            stages=(msgspec.convert(counters(stage, steps, steps * 0.0046), StageCounters),),
        )  # fmt: skip

    then = counters_of(plan, {"pi5": told(0, 10)})
    now = counters_of(plan, {"pi5": told(0, 73)})
    return {
        "stages": [msgspec.to_builtins(row) for row in measured(plan, then, now)],
        "token_s": 0.0123, "predicted_token_s": 0.010, "tokens_per_s": 81.3, "time_to_first_token_s": 0.31,
        "bytes_per_token": 1316.0,
        "drafts_sent": 40,
        "drafts_accepted": 33,
    }  # fmt: skip


SCREENS = {
    "devices": lambda: devices_text(SHELF, "lab"),
    "devices-none": lambda: devices_text([], "lab"),
    "plan": lambda: plan_text(plan_row()),
    "stages": lambda: stages_text(end_row()),
    "stages-unmeasured": lambda: stages_text(
        {**end_row(), "token_s": None, "tokens_per_s": None, "bytes_per_token": None, "drafts_sent": 0}
    ),
    "top-none": lambda: plain(snapshot(devices=(), deployed=False), None),
    **{f"top-{width}": lambda width=width: plain(later(), before(), width) for width in WIDTHS},
}


@pytest.mark.parametrize("name", SCREENS)
def test_a_screen_is_as_it_was_agreed(name: str) -> None:
    text = SCREENS[name]() + "\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()
    assert text.isascii(), "plain screens need no more than ASCII"


@pytest.mark.parametrize("name", SCREENS)
def test_no_line_ends_in_blanks(name: str) -> None:
    assert all(line == line.rstrip() for line in SCREENS[name]().splitlines())


@pytest.mark.parametrize("width", WIDTHS)
def test_names_states_and_hints_are_never_cut(width: int) -> None:
    text = plain(later(), before(), width)
    for row in SHELF:
        assert row["device"] in text and row["state"] in text
    assert "try: wait, or look at its link" in text
    needed = len(LONGEST) + 2 + len("suspect (12 s old)")
    assert all(len(line) <= max(width, needed) for line in text.split("\n\n")[1].splitlines())


def test_a_wider_screen_shows_no_less() -> None:
    shown = [set(columns_for(width)) for width in WIDTHS]
    assert all(narrow <= wide for narrow, wide in pairwise(shown))
    assert shown[0] == {0, 1}


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_live_screen_keeps_every_name_whole(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(drawing(later(), before(), width))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(row["device"] in text for row in SHELF)
    assert max(len(line) for line in text.splitlines()) <= width


def test_tokens_per_second_of_a_deployment_are_those_of_its_own_head() -> None:
    """Another deployment's stage on the same board made 900 steps meanwhile."""
    (line,) = [line for line in plain(later(), before(), 80).splitlines() if line.startswith("tiny  epoch 3")]
    assert line.endswith("10.0 tokens/s")


def test_counters_that_went_back_are_not_shown_as_speed() -> None:
    restarted = snapshot(2.0, (device("pi5", counters=[counters(0, 3, 0.1)]), *SHELF[1:]))
    assert "-" in plain(restarted, snapshot(), 80).splitlines()[4].split()


def test_a_table_aligns_whatever_it_is_given() -> None:
    lines = table(("a", "b"), [(None, 1), ("xyz", 22)], right=(1,)).splitlines()
    assert lines == ["a      b", "----  --", "None   1", "xyz   22"]


# Terminals that can do little, and text that wants too much.


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}]
)
def test_a_terminal_without_unicode_shows_question_marks_and_does_not_crash(environment: dict[str, str]) -> None:
    program = (
        "from coordinator.commands.common import print_json, write_text\n"
        "write_text('caf\\u00e9 \\u65e5 \\ud800')\nprint_json('\\u00e9')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == b"caf? ? ?"
    assert json.loads(done.stdout.splitlines()[1]) == "\u00e9"
    assert done.stdout.isascii()


def test_what_a_board_or_a_model_says_can_not_command_the_terminal() -> None:
    hostile = "\x1b[2J\x1b]0;owned\x07 plain\r\x9b31m\x00 \ttab\nline é 日 👩‍🚀"
    shown = printable(hostile)
    assert not any(mark in shown for mark in "\x1b\x07\r\x9b\x00")
    assert shown.endswith("\ttab\nline é 日 👩‍🚀")


def test_a_board_that_became_slow_says_so_beside_its_state() -> None:
    hot = device("pi4", speed=0.4, speed_because="runs at 0.40 of its profile since 12:03")
    assert state_text(hot) == "online, at 0.40" and state_text(device("pi5")) == "online"
    assert "online, at 0.40" in devices_text([hot], "home")
    assert device_cells(hot, None, 0.0)[1] == "online, at 0.40"
