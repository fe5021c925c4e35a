"""`edgelam devices` and `edgelam plan`: what there is, and what would be done with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from coordinator.commands.common import (
    CoordinatorUrl,
    Json,
    ModelName,
    Precision,
    SiteKeyFile,
    WhatFor,
    client,
    model_name,
    print_json,
    status_line,
    write_file,
    write_text,
)
from coordinator.journal import DeployRequest
from coordinator.screens.plain import devices_text, plan_text


def devices(json: Json = False, coordinator: CoordinatorUrl = None, site_key_file: SiteKeyFile = None) -> None:
    """Show the boards of the site: state, memory, link, engines, what they run."""
    with client(coordinator, site_key_file) as there:
        answer = there.get("/v1/devices")
        notices = there.get("/v1/notices")["notices"]
        site = there.get("/v1/status")["site"]
    if json:
        print_json(answer)
        return
    write_text(devices_text(answer["devices"], site))
    for notice in notices[-5:]:
        write_text(f"{notice['level']}: {notice['text']}" + (f"\n  try: {notice['try_']}" if notice["try_"] else ""))


def plan(
    model: ModelName,
    precision: Precision = "int4",
    objective: WhatFor = "latency",
    context: Annotated[int, typer.Option(help="Tokens that prompt and answer may have together.")] = 1024,
    slots: Annotated[int, typer.Option(help="Requests that may be live at once.")] = 4,
    boards_at_least: Annotated[int, typer.Option(help="Spread over at least this many boards.")] = 1,
    boards_at_most: Annotated[int, typer.Option(help="Use at most this many boards.")] = 64,
    exclude: Annotated[list[str] | None, typer.Option(help="A board to leave out; may be given again.")] = None,
    explain: Annotated[bool, typer.Option(help="Say why each board got its share, and what would change it.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan as JSON to a file.")] = None,
    json: Json = False,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
) -> None:
    """Show where the blocks of MODEL would go, and why; changes nothing.

    Example: edgelam plan smollm2 --boards-at-least 4 --explain
    """
    request = DeployRequest(
        model=model_name(model),
        precision=precision,
        objective=objective,
        context_tokens=context,
        slots=slots,
        boards_at_least=boards_at_least,
        boards_at_most=boards_at_most,
        excluded=tuple(exclude or ()),
    )
    with client(coordinator, site_key_file) as there:
        answer = there.last("/v1/plan", request, status_line)
    document = {"schema": "edgelam.plan/1", **answer["plan"]}
    if output is not None:
        write_file(output, msgspec.json.format(msgspec.json.encode(document)))
    if json:
        print_json(document)
    elif explain:
        write_text("\n".join(answer["explanation"]))
    else:
        write_text(plan_text(answer["plan"]))
