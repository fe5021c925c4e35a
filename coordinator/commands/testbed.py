"""`edgelam testbed up | status | slow | link | down`: virtual boards on this machine."""

from __future__ import annotations

import shlex
import signal
import threading
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import psutil
import typer

from coordinator.commands.common import Json, print_json, status_line, write_text
from coordinator.config import Address, read_address, state_dir
from coordinator.screens.table import table
from testbed import commands, throttle
from testbed.boards import preset, with_data
from testbed.links import LinkSpec
from testbed.relink import relink
from testbed.state import STATE_FILE
from wire.errors import ExitCode, UsageError
from wire.ids import DEFAULT_SITE, site_option

app = typer.Typer(help="Virtual boards on this machine: up, status, slow, link, down.", no_args_is_help=True)

UpSite = Annotated[
    str, typer.Option("--site", help=f"Site of the coordinator; default: that of the one here, else {DEFAULT_SITE}.")
]
Site = Annotated[
    str, typer.Option("--site", help="Site of the testbed; default: that of the only one that is up, else as for up.")
]
Folder = Annotated[Path | None, typer.Option("--state", help="Folder of the testbed; default in $EDGELAM_STATE.")]


def folder_of(site: str, named: Path | None) -> Path:
    return named or state_dir() / "testbed" / site


def default_site() -> str:
    """The site of the coordinator that runs on this machine, else the default one."""
    address = _coordinator_here()
    return address.site if address is not None else DEFAULT_SITE


def site_that_is_up() -> str:
    """The site of the only testbed that is up (or was left behind) in the usual place, else the default for `up`."""
    sites = [path.parent.name for path in (state_dir() / "testbed").glob(f"*/{STATE_FILE}")]
    return sites[0] if len(sites) == 1 else default_site()


def options_text(site: str, folder: Path | None) -> str:
    """What a printed command needs to mean this testbed."""
    return site_option(site) + (f" --state {shlex.quote(str(folder))}" if folder else "")


def _coordinator_here() -> Address | None:
    address = read_address(state_dir())
    return address if address is not None and psutil.pid_exists(address.pid) else None


def _http_of(site: str) -> str:
    """HOST:PORT of the HTTP door of the coordinator here, if it is this site's; else ''."""
    address = _coordinator_here()
    return address.http_url.removeprefix("http://") if address is not None and address.site == site else ""


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
    site: UpSite = "",
    limits: Annotated[
        Literal["emulated", "cgroup"],
        typer.Option(help="emulated: steps are stretched (no root); cgroup: the kernel limits CPU and memory."),
    ] = "emulated",
    broker: Annotated[
        str, typer.Option(help="mqtt://HOST:PORT of the coordinator's broker; default: the boards find it by mDNS.")
    ] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER: data to be trained on, of each board what is called like it there (pi4.jsonl)."
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", "-d", help="Come back at once; end with: edgelam testbed down.")
    ] = False,
    folder: Folder = None,
    json: Json = False,
) -> None:
    """Start virtual boards with real agents; Ctrl-C ends them.

    Example: edgelam testbed up --boards 4 --preset shelf
    """
    site = site or default_site()
    shelf = preset(preset_name, boards, link)
    for given in data or ():
        name, _, path = given.partition("=")
        shelf = with_data(shelf, name, Path(path).expanduser())
    options = commands.UpOptions(
        site=site,
        boards=shelf,
        state_dir=folder_of(site, folder),
        coordinator=broker,
        coordinator_http=_http_of(site) if broker else "",
        limits=limits,
        detach=detach,
    )
    testbed = commands.up(options)
    for warning in testbed.warnings:
        status_line(f"warning: {warning}")
    if not json:
        write_text("\n".join(board.text() for board in testbed.boards))
    try:
        testbed.await_connected(status_line)
    except BaseException:
        testbed.down()
        raise
    if json:
        _print_status(testbed.status())
    if detach:
        say = status_line if json else write_text
        say(f"end them with: edgelam testbed down{options_text(site, folder)}")
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
def status(site: Site = "", folder: Folder = None, json: Json = False) -> None:
    """Show the boards of a testbed."""
    site = site or site_that_is_up()
    found = commands.status(folder_of(site, folder))
    if found is None:
        raise UsageError(f"no testbed of site {site!r} is up", try_=f"edgelam testbed up{options_text(site, folder)}")
    if json:
        _print_status(found)
        return
    rows = [(board.name, board.state, board.pid, board.is_, board.log) for board in found.boards]
    write_text(table(("board", "state", "pid", "is", "log"), rows, right=(2,)))


@app.command()
def slow(
    board: Annotated[str, typer.Argument(help="Name of the board.")],
    share: Annotated[float, typer.Argument(help="Share of its speed that it has from now on, 0.05 to 1.")],
    site: Site = "",
    folder: Folder = None,
) -> None:
    """Let a board become slow, as when it is too hot, or as fast again as it was.

    Example: edgelam testbed slow pi4 0.3
    """
    throttle.slow(folder_of(site or site_that_is_up(), folder), board, share)
    write_text(f"{board} has {share:g} of its speed")


@app.command()
def link(
    board: Annotated[str, typer.Argument(help="Name of the board.")],
    rate_mbit: Annotated[
        float | None, typer.Option("--rate", help="Mbit/s each way from now on; without it unlimited.")
    ] = None,
    delay_ms: Annotated[float | None, typer.Option("--delay", help="Milliseconds one way; without it none.")] = None,
    jitter_ms: Annotated[float | None, typer.Option("--jitter", help="Most that is added, in milliseconds.")] = None,
    site: Site = "",
    folder: Folder = None,
) -> None:
    """Give a board another link while it runs; without any figure the one that it was brought up with.

    Example: edgelam testbed link pi4 --rate 2 --delay 50
    """
    spec = None
    if (rate_mbit, delay_ms, jitter_ms) != (None, None, None):
        spec = LinkSpec(
            rate_bytes_per_s=None if rate_mbit is None else rate_mbit * 1e6 / 8,
            delay_s=(delay_ms or 0.0) / 1e3,
            jitter_s=(jitter_ms or 0.0) / 1e3,
        )
    given = relink(folder_of(site or site_that_is_up(), folder), board, spec)
    write_text(f"{board} has {given.text()}")


@app.command()
def down(site: Site = "", folder: Folder = None, json: Json = False) -> None:
    """End a testbed: no process, no control group, no file of it remains."""
    site = site or site_that_is_up()
    there = commands.down(folder_of(site, folder))
    if json:
        print_json({"schema": "edgelam.testbed-down/1", "site": site, "was_up": there})
        return
    write_text("the testbed is down" if there else f"no testbed of site {site!r} was up")
