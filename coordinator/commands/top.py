"""`edgelam top`: the live screen."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coordinator.client import Client
from coordinator.commands.common import CoordinatorUrl, Json, SiteKeyFile, client, print_json, printable, write_text
from coordinator.screens.top import (
    DEVICE_COLUMNS,
    Snapshot,
    columns_for,
    deployment_lines,
    device_rows,
    headline,
    notice_lines,
    plain,
)

PERIOD_S = 1.0
NARROW = 60
"""Below this width a table is squeezed into ambiguity: plain lines instead."""


def take(there: Client) -> Snapshot:
    """One look at the coordinator."""
    return Snapshot(
        taken_s=time.monotonic(),
        status=there.get("/v1/status"),
        devices=tuple(there.get("/v1/devices")["devices"]),
        notices=tuple(there.get("/v1/notices")["notices"]),
    )


def drawing(now: Snapshot, before: Snapshot | None, width: int) -> Group:
    """The screen for rich: default colours, state in words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    chosen = columns_for(width)
    for index in chosen:
        column = DEVICE_COLUMNS[index]
        table.add_column(column.title, justify="right" if column.right else "left", no_wrap=index == 0)
    for row in device_rows(now, before):
        table.add_row(*(Text(printable(row[index])) for index in chosen))
    lines = [Text(printable(line)) for line in (*deployment_lines(now, before), *notice_lines(now))]
    return Group(Text(headline(now), style="bold"), Text(""), table, Text(""), *lines, Text("Ctrl-C to leave"))


def top(
    once: Annotated[bool, typer.Option("--once", help="Print one screen and end.")] = False,
    as_plain: Annotated[bool, typer.Option("--plain", help="Plain lines, no live screen.")] = False,
    json: Json = False,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
) -> None:
    """Watch devices, deployments and tokens/s."""
    console = Console()
    live = console.is_terminal and not as_plain and os.environ.get("TERM") != "dumb" and console.width >= NARROW
    with client(coordinator, site_key_file) as there:
        before = None
        now = take(there)
        if json:
            print_json({"schema": "edgelam.top/1", **msgspec.structs.asdict(now)})
            return
        if once:
            time.sleep(PERIOD_S)
            write_text(plain(take(there), now, console.width if console.is_terminal else 120))
            return
        if not live:
            while True:
                write_text(plain(now, before, console.width if console.is_terminal else 120))
                sys.stdout.flush()
                time.sleep(PERIOD_S)
                before, now = now, take(there)
        with Live(drawing(now, before, console.width), console=console, auto_refresh=False, screen=True) as screen:
            while True:
                time.sleep(PERIOD_S)
                before, now = now, take(there)
                screen.update(drawing(now, before, console.width), refresh=True)
