"""`edgelam bench`: hardware profiles of the site's boards, as tables or Markdown."""

from __future__ import annotations

import shutil
from pathlib import Path
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
    print_json,
    status_line,
    write_file,
    write_text,
)
from hwprofiles.profile import Profile
from hwprofiles.report.render import markdown, plain
from wire.errors import Unreachable, UsageError


def bench(
    device: Annotated[list[str] | None, typer.Argument(help="Boards; default: all.")] = None,
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
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Markdown instead of plain tables.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write to a file instead of stdout.")] = None,
    json: Json = False,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
) -> None:
    """Show what each board measured itself to be: identity, conditions, module times, link; raw samples with --json.

    Example: edgelam bench --markdown -o boards.md
    """
    with client(coordinator, site_key_file) as there:
        wanted = MeasureRequest(model=model_name(model), precision=precision, again=again, devices=tuple(device or ()))
        there.last("/v1/measure", wanted, status_line)
        profiles = [_profile(there, name) for name in _names(there, device)]
    if json:
        text = msgspec.json.encode({"schema": "edgelam.bench/1", "profiles": profiles}).decode()
    elif as_markdown:
        text = "\n\n".join(markdown(profile) for profile in profiles)
    else:
        width = shutil.get_terminal_size((100, 24)).columns
        text = "\n\n".join(plain(profile, width) for profile in profiles)
    if output is not None:
        write_file(output, (text + "\n").encode())
    elif json:
        print_json(msgspec.Raw(text.encode()))
    else:
        write_text(text)


def _names(there: Client, wanted: list[str] | None) -> list[str]:
    """Names of the boards to show: those asked for, which must exist, or all that have a profile."""
    rows: list[dict[str, Any]] = there.get("/v1/devices")["devices"]
    known = [row["device"] for row in rows]
    for name in wanted or ():
        if name not in known:
            raise UsageError(f"no board {name!r}", try_=f"one of: {', '.join(known) or 'none is here'}")
    names = wanted or [row["device"] for row in rows if row["profile"] != "none"]
    if not names:
        raise Unreachable("no board has measured itself yet", try_="edgelam devices")
    return list(names)


def _profile(there: Client, name: str) -> Profile:
    return msgspec.convert(there.get(f"/v1/profiles/{name}"), type=Profile)
