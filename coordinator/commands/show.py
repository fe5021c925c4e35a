"""`edgelam devices` and `edgelam plan`: what there is, and what would be done with it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from coordinator.commands.common import (
    AtLeast,
    AtMost,
    CoordinatorUrl,
    Copies,
    ErrorBudget,
    Json,
    ModelName,
    Precision,
    SiteKeyFile,
    Slots,
    Through,
    WhatFor,
    client,
    model_name,
    print_json,
    status_line,
    write_file,
    write_text,
)
from coordinator.commands.wishes import Engine, Exclude, Load, Pins, Reserve, Weigh, pins_of, weights_of
from coordinator.journal import DeployRequest
from coordinator.planning.absent import AssumedLink, assumed_link
from coordinator.screens.plain import devices_text, plan_text
from coordinator.whatif import read_boards, what_if
from wire.errors import Unreachable, UsageError


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
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[PROFILE]...", help="Further files of --with: a shell's *.json.")
    ] = None,
    precision: Precision = "int4",
    objective: WhatFor = "latency",
    topology: Through = "auto",
    context: Annotated[int, typer.Option(help="Tokens that prompt and answer may have together.")] = 1024,
    slots: Slots = None,
    error_budget: ErrorBudget = 0.0,
    tokens_per_second: Load = None,
    weigh: Weigh = None,
    boards_at_least: AtLeast = 1,
    boards_at_most: AtMost = 64,
    replicas: Copies = 1,
    exclude: Exclude = None,
    pin: Pins = None,
    reserve: Reserve = 10.0,
    engine: Engine = "auto",
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            metavar="PROFILE",
            help="What if there were this board, too? A profile, report, or folder of them; 'pi5.json*3': three of it.",
        ),
    ] = None,
    only_with: Annotated[
        bool, typer.Option("--only-with", help="With the boards of --with alone; needs no coordinator.")
    ] = False,
    link_rate: Annotated[
        float | None, typer.Option(help="Mbit/s: assume this link for boards of --with, not the one they measured.")
    ] = None,
    link_delay: Annotated[float | None, typer.Option(help="Its delay one way, in ms.")] = None,
    accept_expired: Annotated[
        bool, typer.Option("--accept-expired", help="Plan with profiles of --with however old they are.")
    ] = False,
    explain: Annotated[bool, typer.Option(help="Say why each board got its share, and what would change it.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan as JSON to a file.")] = None,
    json: Json = False,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
) -> None:
    """Show where the blocks of MODEL would go, and why; changes nothing. --with plans for boards that are not there.

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
        topology=topology,
        error_budget_percent=error_budget,
        excluded=tuple(exclude or ()),
        replicas=replicas,
        tokens_per_s=tokens_per_second,
        weights=weights_of(weigh),
        pins=pins_of(pin),
        reserve_percent=reserve,
        engine=engine,
    )
    named = [*(with_ or ()), *(more or ())]
    if with_:
        link = _assumed(link_rate, link_delay)
        profiles = read_boards(named, time.time(), accept_expired)
        try:
            with contextlib.nullcontext() if only_with else client(coordinator, site_key_file) as there:
                found = what_if(request, profiles, there, link, status_line)
        except Unreachable as error:
            raise Unreachable(
                error.message, try_=f"{error.try_}; or --only-with: the boards of the files alone"
            ) from None
        document, before = found.document(), found.text_before()
        planned, explanation = document["plan"], list(found.explanation)
    else:
        _refuse_without_with(more, only_with, link_rate, link_delay, accept_expired)
        with client(coordinator, site_key_file) as there:
            answer = there.last("/v1/plan", request, status_line)
        planned, explanation, before = answer["plan"], answer["explanation"], []
        document = {"schema": "edgelam.plan/1", **planned}
    if output is not None:
        write_file(output, msgspec.json.format(msgspec.json.encode(document)))
    if json:
        print_json(document)
    else:
        write_text("\n".join([*before, *(explanation if explain else [plan_text(planned)])]))


def _assumed(rate_mbit_per_s: float | None, delay_ms: float | None) -> AssumedLink | None:
    if rate_mbit_per_s is None and delay_ms is None:
        return None
    if rate_mbit_per_s is None or delay_ms is None:
        raise UsageError(
            "half a link: --link-rate and --link-delay go together", try_="--link-rate 100 --link-delay 1 (Mbit/s, ms)"
        )
    return assumed_link(rate_mbit_per_s * 1e6 / 8, delay_ms / 1e3)


def _refuse_without_with(
    more: list[str] | None, only_with: bool, link_rate: float | None, link_delay: float | None, accept_expired: bool
) -> None:
    """Raise UsageError for what means nothing without --with."""
    given = {
        "--only-with": only_with,
        "--link-rate": link_rate is not None,
        "--link-delay": link_delay is not None,
        "--accept-expired": accept_expired,
    }
    if more:
        raise UsageError(f"one model at a time: what is {more[0]!r}?", try_=f"--with {more[0]}, if it is a profile")
    for option, is_given in given.items():
        if is_given:
            raise UsageError(f"{option} is about boards of --with, and there is none", try_="--with PROFILE")
