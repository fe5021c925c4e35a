"""`edgelam bench`: a hardware benchmark report of the site's boards."""

from __future__ import annotations

import time
from typing import Annotated, Any

import msgspec
import typer

from coordinator.calls import MeasureRequest
from coordinator.client import Client
from coordinator.commands.common import (
    CoordinatorUrl,
    Json,
    Precision,
    SiteKeyFile,
    client,
    model_name,
    model_names,
    status_line,
)
from coordinator.commands.report import AsHtml, AsMarkdown, Output, form_of, give_report
from hwprofiles.profile import Profile
from hwprofiles.report import document
from wire.errors import Degraded, Unreachable, UsageError
from wire.limits import LEAST_SUSTAINED_S, MOST_SUSTAINED_S

NOT_MEASURED = "here, but it has measured nothing yet"


def bench(
    device: Annotated[list[str] | None, typer.Argument(help="Boards; default: all that have measured.")] = None,
    fleet: Annotated[
        bool, typer.Option("--fleet", help="All boards, or exit code 5 and the names of those without a profile.")
    ] = False,
    model: Annotated[
        str,
        typer.Option(
            help="Have the boards measure this model's modules first, if they have not.", autocompletion=model_names
        ),
    ] = "smollm2",
    precision: Precision = "int4",
    again: Annotated[
        bool, typer.Option("--again", help="Have the boards measure all anew, whatever they know: some 30 s each.")
    ] = False,
    sustained: Annotated[
        float,
        typer.Option(
            "--sustained",
            metavar="SECONDS",
            min=0,
            max=MOST_SUSTAINED_S,
            help="Put each board under load for so long (5 to 1800), and report cool and sustained speed.",
        ),
    ] = 0.0,
    as_markdown: AsMarkdown = False,
    as_html: AsHtml = False,
    output: Output = None,
    json: Json = False,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
) -> None:
    """Report what each board measured itself to be: identity, conditions, module times, link, and whether it may be
    believed. --json gives the document with all raw samples, for edgelam report.

    Example: edgelam bench --fleet --html -o shelf.html
    """
    form = form_of(as_markdown, as_html, json, output)
    if 0 < sustained < LEAST_SUSTAINED_S:
        raise UsageError(f"--sustained {sustained:g}: too short to get warm", try_="600, for a report")
    if fleet and device:
        raise UsageError("--fleet means all boards, but some were named", try_="one or the other")
    with client(coordinator, site_key_file) as there:
        wanted = MeasureRequest(
            model=model_name(model),
            precision=precision,
            again=again,
            devices=tuple(device or ()),
            sustained_s=sustained,
        )
        there.last("/v1/measure", wanted, status_line)
        names, missing, doubts = _names(there, device)
        profiles = [_profile(there, name) for name in names]
    report = document.make(profiles, time.time(), dict.fromkeys(missing, NOT_MEASURED) if fleet else None, doubts)
    give_report(report, form, output)
    if report.missing:
        raise Degraded(f"no profile of {', '.join(missing)}", try_="edgelam devices")


def _names(there: Client, wanted: list[str] | None) -> tuple[list[str], list[str], dict[str, str]]:
    """Names of the boards to show: those asked for, which must exist, or all that have a profile; of the others that
    are here; and why profiles of the first are not believed."""
    rows: list[dict[str, Any]] = there.get("/v1/devices")["devices"]
    known = [row["device"] for row in rows]
    for name in wanted or ():
        if name not in known:
            raise UsageError(f"no board {name!r}", try_=f"one of: {', '.join(known) or 'none is here'}")
    without = [row["device"] for row in rows if row["profile"] == "none"]
    names = wanted or [name for name in known if name not in without]
    if not names:
        raise Unreachable("no board has measured itself yet", try_="edgelam devices")
    doubts = {row["device"]: row["profile_doubted"] for row in rows if row.get("profile_doubted")}
    return list(names), without, {name: doubts[name] for name in names if name in doubts}


def _profile(there: Client, name: str) -> Profile:
    return msgspec.convert(there.get(f"/v1/profiles/{name}"), type=Profile)
