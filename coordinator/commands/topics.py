"""`edgelam topics list | tail`: what crosses the brokers, readable."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.common import (
    CoordinatorUrl,
    Json,
    SiteKeyFile,
    client,
    print_json,
    read_site_key,
    status_line,
    write_text,
)
from coordinator.screens.table import table
from coordinator.screens.wiretap import describe, row
from coordinator.taps import Taps
from wire import topics as wire_topics
from wire.errors import Unreachable, UsageError
from wire.ids import SITE_USER, new_boot_id
from wire.limits import DATA_KEEPALIVE_S
from wire.mqtt import MqttTransport
from wire.subscriptions import check_filter
from wire.transport import Inbound, Link

app = typer.Typer(help="What crosses the brokers: list, tail.", no_args_is_help=True)
CONNECT_TIMEOUT_S = 10.0
LOOK_PERIOD_S = 2.0
"""Boards come and go, and their brokers with them."""


@app.command(name="list")
def list_topics(json: Json = False) -> None:
    """List all topics: who writes, what they hold, quality, retained or not."""
    if json:
        rows = [
            {**entry._asdict(), "writer": entry.writer.value, "tells": entry.tells.value} for entry in wire_topics.TABLE
        ]
        print_json({"schema": "edgelam.topics/1", "topics": rows})
        return
    write_text(
        table(
            ("topic", "message", "QoS", "retained", "written by", "what", "of a board's data"),
            [
                (t.template, t.message, t.qos, "yes" if t.retained else "no", t.writer.value, t.what, t.tells.value)
                for t in wire_topics.TABLE
            ],
        )
    )


def _check_filter(topic_filter: str) -> None:
    try:
        check_filter(topic_filter)
    except ValueError:
        raise UsageError(
            f"{topic_filter!r} is no topic filter of MQTT",
            try_="'+' for a whole level, '#' for all levels from here and so at the end: 'edgelam/v1/+/act/#'",
        ) from None


@app.command()
def tail(
    topic_filter: Annotated[str, typer.Argument(help="MQTT filter; default: everything of the site.")] = "",
    count: Annotated[int, typer.Option("--count", "-n", help="End after so many messages; 0 = never.")] = 0,
    seconds: Annotated[float, typer.Option(help="End after so long; 0 = never.")] = 0.0,
    broker: Annotated[
        str, typer.Option(help="mqtt://HOST:PORT, and no other; default: the coordinator's and those of the boards.")
    ] = "",
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document per message on stdout instead of text.")
    ] = False,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
) -> None:
    """Show messages as they pass: control messages as JSON, tensors by kind, dtype, shape and size.

    Messages that cross a board's own broker begin with that board's name. To show them, each is sent here, too, over
    that board's link.

    Example: edgelam topics tail 'edgelam/v1/+/act/#' -n 20
    """
    if topic_filter:
        _check_filter(topic_filter)
    with client(coordinator, site_key_file) as there:
        status = there.get("/v1/status")
    key = read_site_key(site_key_file)
    url = broker or status["mqtt_url"]
    shown = 0

    def connect(url: str) -> MqttTransport:
        name = f"edgelam-tail-{new_boot_id()}"
        user = SITE_USER if key else ""
        return MqttTransport(url, name, keepalive_s=DATA_KEEPALIVE_S, username=user, password=key)

    def show(message: Inbound, device: str) -> None:
        nonlocal shown
        if count and shown >= count:
            return
        shown += 1
        if json:
            print_json({**row(message), "broker_of": device or None})
        else:
            write_text(f"{device}: {describe(message)}" if device else describe(message))

    taps = Taps(url, topic_filter or wire_topics.everything(status["site"]), connect, show)
    started_s = looked_s = time.monotonic()
    told: set[str] = set()
    try:
        if not broker:
            taps.follow(_brokers_of_boards(coordinator, site_key_file))
        while (not count or shown < count) and (not seconds or time.monotonic() - started_s < seconds):
            taps.poll(0.25)
            now_s = time.monotonic()
            if taps.site.link is not Link.UP and now_s - started_s > CONNECT_TIMEOUT_S and not shown:
                raise Unreachable(
                    f"broker {url}: {taps.site.last_error or 'no answer'}",
                    try_="check --broker; without it the coordinator's is taken" if broker else "edgelam devices",
                )
            if not broker and now_s - looked_s >= LOOK_PERIOD_S:
                looked_s = now_s
                with contextlib.suppress(Unreachable):
                    taps.follow(_brokers_of_boards(coordinator, site_key_file))
                for device, why in taps.unreached().items():
                    if device not in told:
                        told.add(device)
                        status_line(f"the broker of {device} is not heard: {why}")
    finally:
        taps.close()


def _brokers_of_boards(coordinator: str | None, site_key_file: Path | None) -> dict[str, str]:
    """Device -> address of its own broker."""
    with client(coordinator, site_key_file) as there:
        devices = there.get("/v1/devices")["devices"]
    return {row["device"]: row["data_broker"] for row in devices if row["data_broker"] and row["state"] != "offline"}
