"""`edgelam demo`: the main job on one machine: broker, coordinator, four virtual boards, one answer."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal

import typer

from coordinator.client import Client
from coordinator.commands.common import Precision, status_line, write_text
from coordinator.commands.run import follow
from coordinator.config import state_dir
from coordinator.inference.requests import GenerateRequest
from coordinator.journal import DeployRequest
from coordinator.screens.plain import devices_text, plan_text, stages_text
from models.cache import cache_dir
from models.fetch import fetch
from testbed import commands as testbed_commands
from testbed.boards import BoardSpec, preset
from testbed.site import CoordinatorProcess, remove_tree, until
from wire.errors import EdgelamError, Unreachable

MODEL = "smollm2"
PROMPT = "Explain in two sentences why the sky is blue."
ONLINE_TIMEOUT_S = 60.0


def demo(
    boards: Annotated[int, typer.Option(help="Virtual boards, 1 to 8.")] = 4,
    preset_name: Annotated[
        Literal["shelf", "equal"], typer.Option("--preset", help="shelf: unequal; equal.")
    ] = "shelf",
    link: Annotated[Literal["none", "ethernet", "wifi"] | None, typer.Option(help="All boards on this link.")] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")] = PROMPT,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", help="New tokens at most.")] = 64,
    precision: Precision = "int4",
) -> None:
    """Run SmolLM2-135M over virtual boards of unequal speed and links, every activation over MQTT.

    Needs no root, no boards and no broker; leaves nothing running.
    """
    signal.signal(signal.SIGTERM, _as_interrupt)
    specs = preset(preset_name, boards, link)
    fetch(MODEL, cache_dir(), status_line)
    state = state_dir() / f"demo-{os.getpid()}"
    site = f"demo-{secrets.token_hex(3)}"
    coordinator = CoordinatorProcess(state, site, ["--model", MODEL, "--precision", precision])
    testbed = None
    try:
        address = coordinator.start()
        _say(f"1. coordinator of site {site}", f"broker: {address['broker']}")
        testbed = _boards_up(site, specs, state, address)
        with Client(address["http_url"]) as there:
            _show(there, len(specs), prompt, max_tokens, precision)
    except EdgelamError:
        print(f"--- end of the coordinator's log ---\n{coordinator.log_end()}", file=sys.stderr)
        raise
    finally:
        # A second signal while we clean up must not leave half of it behind.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if testbed is not None:
            testbed.down()
        coordinator.stop()
        remove_tree(state)


def _as_interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _boards_up(
    site: str, specs: tuple[BoardSpec, ...], state: Path, address: dict[str, Any]
) -> testbed_commands.Testbed:
    """Boards find the coordinator by mDNS; where multicast does not work they are told, and that is said."""
    options = testbed_commands.UpOptions(site=site, boards=specs, state_dir=state / "testbed")
    try:
        testbed = testbed_commands.up(options)
        how = "each finds the coordinator by mDNS"
    except Unreachable as error:
        told = testbed_commands.UpOptions(
            site=site,
            boards=specs,
            state_dir=state / "testbed",
            coordinator=address["mqtt_url"],
            coordinator_http=address["http_url"].removeprefix("http://"),
        )
        testbed = testbed_commands.up(told)
        how = f"told where the coordinator is, since mDNS did not answer ({error.message})"
    notes = [f"note: {warning}" for warning in testbed.warnings]
    _say(f"2. {len(specs)} virtual boards, {how}", *(board.text() for board in testbed.boards), *notes)
    return testbed


def _show(there: Client, boards: int, prompt: str, max_tokens: int, precision: str) -> None:
    """Devices, plan, answer, figures."""

    def online() -> bool:
        return [row["state"] for row in there.get("/v1/devices")["devices"]].count("online") >= boards

    until(online, ONLINE_TIMEOUT_S, f"all {boards} boards online")
    started_s = time.monotonic()
    free = there.last("/v1/plan", DeployRequest(model=MODEL, precision=precision), status_line)["plan"]
    _say(
        f"3. the boards have measured themselves ({time.monotonic() - started_s:.0f} s)",
        devices_text(there.get("/v1/devices")["devices"], there.get("/v1/status")["site"]),
    )
    verdict = f"left to itself, the planner says: {free['because']}"
    request = GenerateRequest(
        model=MODEL,
        prompt=prompt,
        max_tokens=max_tokens,
        precision=precision,
        objective="throughput",
        boards_at_least=boards,
    )
    asked = DeployRequest(model=MODEL, precision=precision, objective="throughput", boards_at_least=boards)
    plan = there.last("/v1/plan", asked, status_line)["plan"]
    _say(
        "4. the plan from these measurements: all boards, the slowest stage as fast as can be",
        plan_text(plan),
        "",
        verdict,
    )
    write_text(f"\n5. {prompt}\n")
    end = follow(there.stream("/v1/generate", request), show=True)
    _say("6. what was predicted, and what was measured", stages_text(end))
    write_text(
        "\nTry next:\n"
        "  edgelam up --model smollm2            a coordinator that stays (other terminals for the rest)\n"
        "  edgelam testbed up --boards 4         virtual boards for it, or on a real board: edgelam-agent run\n"
        '  edgelam run smollm2 -p "Why is the sky blue?"\n'
        "  edgelam plan smollm2 --explain        why each board got its share\n"
        "  edgelam top                           devices, stages, tokens/s\n"
        "  edgelam topics tail                   what crosses the broker"
    )


def _say(title: str, *lines: str) -> None:
    write_text(f"\n{title}")
    for line in lines:
        write_text("\n".join(f"   {part}" if part else "" for part in line.splitlines()) if line else "")
