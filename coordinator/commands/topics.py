"""`edgelam topics list | tail`: what crosses the broker, readable."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from coordinator.commands.common import CoordinatorUrl, Json, SiteKeyFile, client, print_json, read_site_key, write_text
from coordinator.screens.table import table
from coordinator.screens.wiretap import describe, row
from wire import topics as wire_topics
from wire.errors import Unreachable, UsageError
from wire.ids import SITE_USER, new_boot_id
from wire.limits import DATA_KEEPALIVE_S
from wire.mqtt import MqttTransport
from wire.subscriptions import check_filter
from wire.transport import Inbound, Link

app = typer.Typer(help="What crosses the broker: list, tail.", no_args_is_help=True)
CONNECT_TIMEOUT_S = 10.0


@app.command(name="list")
def list_topics(json: Json = False) -> None:
    """List all topics: who writes, what they hold, quality, retained or not."""
    if json:
        rows = [{**entry._asdict(), "writer": entry.writer.value} for entry in wire_topics.TABLE]
        print_json({"schema": "edgelam.topics/1", "topics": rows})
        return
    write_text(
        table(
            ("topic", "message", "QoS", "retained", "written by", "what"),
            [
                (t.template, t.message, t.qos, "yes" if t.retained else "no", t.writer.value, t.what)
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
    broker: Annotated[str, typer.Option(help="mqtt://HOST:PORT; default: the coordinator's.")] = "",
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document per message on stdout instead of text.")
    ] = False,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
) -> None:
    """Show messages as they pass: control messages as JSON, tensors by kind, dtype, shape and size.

    Example: edgelam topics tail 'edgelam/v1/+/act/#' -n 20
    """
    if topic_filter:
        _check_filter(topic_filter)
    with client(coordinator, site_key_file) as there:
        status = there.get("/v1/status")
    key = read_site_key(site_key_file)
    url = broker or status["mqtt_url"]
    transport = MqttTransport(
        url,
        f"edgelam-tail-{new_boot_id()}",
        keepalive_s=DATA_KEEPALIVE_S,
        username=SITE_USER if key else "",
        password=key,
    )
    shown = 0

    def show(message: Inbound) -> None:
        nonlocal shown
        shown += 1
        print_json(row(message)) if json else write_text(describe(message))

    transport.subscribe(topic_filter or wire_topics.everything(status["site"]), show)
    transport.start()
    started_s = time.monotonic()
    try:
        while (not count or shown < count) and (not seconds or time.monotonic() - started_s < seconds):
            transport.poll(0.25)
            if transport.link is not Link.UP and time.monotonic() - started_s > CONNECT_TIMEOUT_S and not shown:
                raise Unreachable(
                    f"broker {url}: {transport.last_error or 'no answer'}",
                    try_="check --broker; without it the coordinator's is taken" if broker else "edgelam devices",
                )
    finally:
        transport.close()
