"""`edgelam up`: the coordinator in the foreground, until Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from coordinator.commands.common import Precision, model_names, print_json
from coordinator.config import Address, state_dir
from coordinator.runner import Options, serve
from wire.ids import DEFAULT_SITE


def up(
    site: Annotated[str, typer.Option(help="Name of the site: boards of other sites are not seen.")] = DEFAULT_SITE,
    listen: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets boards on the network in, with the site key.")
    ] = "127.0.0.1",
    mqtt_port: Annotated[int, typer.Option(help="Port of the broker; 0: 8570 if free, else any.")] = 0,
    http_port: Annotated[int, typer.Option(help="Port of the HTTP door; 0: 8571 if free, else any.")] = 0,
    broker: Annotated[str, typer.Option(help="Use this broker (mqtt://HOST:PORT) and start none.")] = "",
    model: Annotated[
        list[str] | None,
        typer.Option(help="Have boards measure MODEL at once; may be given again.", autocompletion=model_names),
    ] = None,
    precision: Precision = "int4",
    replan: Annotated[
        Literal["on", "off"], typer.Option(help="Whether blocks move away from boards that became too slow.")
    ] = "on",
    state: Annotated[Path | None, typer.Option(help="State folder; default $EDGELAM_STATE.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more.")] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Once it can be reached, print where, as one JSON document on stdout.")
    ] = False,
) -> None:
    """Start broker, coordinator and HTTP door; boards find it by mDNS.

    Example: edgelam up --model smollm2
    Boards on the network: edgelam up --listen 0.0.0.0 (prints what to give the boards)
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname).1s %(name)s: %(message)s"
    )
    for noisy in ("uvicorn.access", "asyncio", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    options = Options(
        site=site,
        listen=listen,
        mqtt_port=mqtt_port,
        http_port=http_port,
        broker_url=broker,
        models=tuple(model or ()),
        precision=precision,
        state=state or state_dir(),
        replan=replan == "on",
    )

    def ready(address: Address) -> None:
        if json:
            print_json({"schema": "edgelam.up/1", **msgspec.to_builtins(address)})

    asyncio.run(serve(options, ready))
