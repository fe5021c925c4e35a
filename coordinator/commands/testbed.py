"""`edgelam testbed up | status | down`: virtual boards on this machine."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from coordinator.commands.common import Json, print_json, status_line, write_text
from coordinator.config import DEFAULT_SITE, read_address, state_dir
from coordinator.screens.table import table
from testbed import commands
from testbed.boards import preset
from wire.errors import ExitCode, UsageError

app = typer.Typer(help="Virtual boards on this machine: up, status, down.", no_args_is_help=True)

Site = Annotated[str, typer.Option(help="Site of the coordinator.")]
Folder = Annotated[Path | None, typer.Option("--state", help="Folder of the testbed; default in $EDGELAM_STATE.")]


def folder_of(site: str, named: Path | None) -> Path:
    return named or state_dir() / "testbed" / site


def _ports(site: str) -> tuple[str, str]:
    """Broker and HTTP of the coordinator here, if it is this site's; ('', '') lets mDNS find it."""
    address = read_address(state_dir())
    if address is None or address.site != site:
        return "", ""
    return address.mqtt_url.removeprefix("mqtt://"), address.http_url.removeprefix("http://")


@app.command()
def up(
    boards: Annotated[int, typer.Option(help="How many boards.")] = 4,
    preset_name: Annotated[
        Literal["shelf", "equal"], typer.Option("--preset", help="shelf: unequal boards; equal: all alike.")
    ] = "shelf",
    link: Annotated[
        Literal["none", "ethernet", "wifi"] | None,
        typer.Option(
            help="All boards on this link: ethernet 100 Mbit/s 1 ms, wifi 20 Mbit/s 5 ms. Default: the preset's."
        ),
    ] = None,
    site: Site = DEFAULT_SITE,
    limits: Annotated[
        Literal["emulated", "cgroup"],
        typer.Option(help="emulated: steps are stretched (no root); cgroup: the kernel limits CPU and memory."),
    ] = "emulated",
    broker: Annotated[
        str, typer.Option(help="HOST:PORT of the coordinator's broker; default: the boards find it by mDNS.")
    ] = "",
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Come back at once; end with: edgelam testbed down.")
    ] = False,
    folder: Folder = None,
    json: Json = False,
) -> None:
    """Start virtual boards with real agents; Ctrl-C ends them.

    Example: edgelam testbed up --boards 4 --preset shelf
    """
    options = commands.UpOptions(
        site=site,
        boards=preset(preset_name, boards, link),
        state_dir=folder_of(site, folder),
        coordinator=broker,
        coordinator_http=_ports(site)[1] if broker else "",
        limits=limits,
        detach=detach,
    )
    testbed = commands.up(options)
    for warning in testbed.warnings:
        status_line(f"warning: {warning}")
    if json:
        _print_status(testbed.status())
    else:
        write_text("\n".join(board.text() for board in testbed.boards))
    if detach:
        say = status_line if json else write_text
        say("end them with: edgelam testbed down" + ("" if site == DEFAULT_SITE else f" --site {site}"))
        return
    status_line("boards are up; Ctrl-C ends them")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with testbed:
        while not ended.wait(1.0):
            gone = [board.name for board in testbed.status().boards if board.state == "gone"]
            if len(gone) == len(testbed.boards):
                status_line("all boards have ended")
                raise typer.Exit(int(ExitCode.FAILED))


def _print_status(found: commands.TestbedStatus) -> None:
    print_json({"schema": "edgelam.testbed/1", **msgspec.to_builtins(found)})


@app.command()
def status(site: Site = DEFAULT_SITE, folder: Folder = None, json: Json = False) -> None:
    """Show the boards of a testbed."""
    found = commands.status(folder_of(site, folder))
    if found is None:
        raise UsageError(f"no testbed of site {site!r} is up", try_="edgelam testbed up")
    if json:
        _print_status(found)
        return
    rows = [(board.name, board.state, board.pid, board.is_, board.log) for board in found.boards]
    write_text(table(("board", "state", "pid", "is", "log"), rows, right=(2,)))


@app.command()
def down(site: Site = DEFAULT_SITE, folder: Folder = None, json: Json = False) -> None:
    """End a testbed: no process, no control group, no file of it remains."""
    there = commands.down(folder_of(site, folder))
    if json:
        print_json({"schema": "edgelam.testbed-down/1", "site": site, "was_up": there})
        return
    write_text("the testbed is down" if there else f"no testbed of site {site!r} was up")
