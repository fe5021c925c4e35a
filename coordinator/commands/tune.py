"""`edgelam tune JOB.toml`, and what can be done with a job: status, follow, stop, resume, adapter, report."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from msgspec import Struct

from coordinator.client import Client
from coordinator.commands.common import (
    CoordinatorUrl,
    Json,
    SiteKeyFile,
    aside,
    client,
    model_name,
    print_json,
    status_line,
    write_file,
    write_text,
)
from coordinator.rounds.job import with_models
from coordinator.rounds.jobfile import load_job
from coordinator.rounds.report import JobReport, csv_of, part_of, plots_of
from coordinator.rounds.store import FILES
from coordinator.screens.table import table
from hwprofiles.report.page import page
from hwprofiles.report.render import markdown_of, plain_of
from wire.errors import ExitCode, Unreachable, UsageError
from wire.modalities import Told, accuracy_by
from wire.units import bytes_text, seconds_text

VERBS = ("status", "follow", "stop", "resume", "adapter", "report")
REPORT_FORMS = (".html", ".md", ".csv", ".json")


class Nothing(Struct, frozen=True):
    """A body that says nothing."""


def tune(
    job: Annotated[str, typer.Argument(help=f"A job file (docs/tuning.md), or: {', '.join(VERBS)}.")],
    name: Annotated[str, typer.Argument(help="Of which job, after one of these words.")] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the adapter; for a report: FILE.html, .md, .csv or .json."),
    ] = None,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
    json: Json = False,
) -> None:
    """Fine-tune a model with LoRA on the boards' own data.

    The job goes on when this command is ended: edgelam tune follow JOB shows it again.

    Example: edgelam tune notes.toml --output adapter/
    """
    if job in VERBS and not Path(job).is_file():
        with client(coordinator, site_key_file) as there:
            _verb(there, job, name, output, json)
        return
    if name:
        raise UsageError(f"{job!r} is none of {', '.join(VERBS)}", try_="edgelam tune JOB.toml, or edgelam tune status")
    wanted = load_job(Path(job))
    wanted = with_models(wanted, model_name)
    with client(coordinator, site_key_file) as there:
        _follow(there, "/v1/jobs", wanted, wanted.name, output, json)


def _verb(there: Client, verb: str, name: str, output: Path | None, json: bool) -> None:
    if output is not None and verb not in ("follow", "adapter", "report"):
        raise UsageError(f"edgelam tune {verb} gives no adapter", try_="without --output")
    if json and verb == "adapter":
        raise UsageError("edgelam tune adapter writes files", try_="without --json")
    if verb == "status":
        _status(there, name, json)
        return
    if not name:
        raise UsageError(f"edgelam tune {verb}: of which job?", try_="edgelam tune status lists them")
    if verb == "follow":
        _follow(there, f"/v1/jobs/{name}/follow", Nothing(), name, output, json)
    elif verb == "adapter":
        _fetch(there, name, output or Path(name))
    elif verb == "report":
        _report(there, name, output, json)
    else:
        row = there.post(f"/v1/jobs/{name}/{verb}")
        if json:
            print_json(row)
        else:
            write_text(_row_text(row))


def _status(there: Client, name: str, json: bool) -> None:
    found = there.get("/v1/jobs")
    rows = [row for row in found["jobs"] if not name or row["job"] == name]
    if name and not rows:
        raise UsageError(f"no job {name!r}", try_="edgelam tune status lists them")
    if json:
        print_json({**found, "jobs": rows})
    elif not rows:
        write_text("no jobs; edgelam tune JOB.toml begins one")
    else:
        head = ("job", "model", "state", "round", "held out", "epsilon", "updates", "sent", "waits for")
        lines = [
            (
                row["job"],
                row["model"],
                row["state"],
                f"{row['round']} of {row['rounds']}",
                _losses(row),
                _spent(row) or "-",
                "masked" if row.get("secure") else "plain",
                bytes_text(row["sent_bytes"]),
                row["waits_for"] or row["because"] or "-",
            )
            for row in rows
        ]
        write_text(table(head, lines))
        for row in rows:
            if row.get("uncovered"):
                write_text(f"{row['job']}: {row['uncovered']}")


def _follow(there: Client, path: str, body: Struct, name: str, output: Path | None, json: bool) -> None:
    rounds: list[dict[str, Any]] = []
    end: dict[str, Any] = {}
    begun = isinstance(body, Nothing)
    try:
        for event in there.stream(path, body):
            kind = event.get("event")
            if kind == "begun":
                begun = True
                status_line(f"job {name} has begun; it goes on if this command is ended")
            elif kind == "status":
                status_line(event["text"])
            elif kind == "refused":
                status_line(f"round {event['round']}: {event['device']}: {event['because']}")
            elif kind == "round":
                rounds.append(event)
                if not json:
                    write_text(round_text(event))
            elif kind == "end":
                end = event
    except KeyboardInterrupt:
        if begun:
            aside(f"job {name} goes on: edgelam tune follow {name}, edgelam tune stop {name}")
        raise
    if not end:
        raise Unreachable("the coordinator ended the answer early", try_=f"edgelam tune follow {name}")
    if json:
        print_json({"schema": "edgelam.job/1", **{key: end[key] for key in end if key != "event"}, "each": rounds})
    else:
        write_text(_row_text(end))
    if end["state"] != "done":
        raise typer.Exit(int(ExitCode.FAILED))
    if output is not None:
        _fetch(there, name, output)


def _fetch(there: Client, name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: {(error.strerror or str(error)).lower()}", try_="another --output") from None
    found = there.get("/v1/jobs")["jobs"]
    for file in next((row["files"] for row in found if row["job"] == name), FILES):
        write_file(folder / file, there.file(f"/v1/jobs/{name}/{file}"))
    status_line(f"adapter in {folder}")


def _report(there: Client, name: str, output: Path | None, json: bool) -> None:
    if output is not None and output.suffix not in REPORT_FORMS:
        raise UsageError(f"--output {output}: in which form?", try_=f"a name that ends in {', '.join(REPORT_FORMS)}")
    if output is not None and json and output.suffix != ".json":
        raise UsageError(f"--json, and --output {output}", try_="one of them")
    document = msgspec.convert(there.get(f"/v1/jobs/{name}/rounds"), type=JobReport)
    if output is None:
        if json:
            print_json(msgspec.to_builtins(document))
        else:
            write_text(plain_of(part_of(document), shutil.get_terminal_size().columns), end="")
        return
    forms = {
        ".html": lambda: page([part_of(document)], [plots_of(document)]),
        ".md": lambda: markdown_of(part_of(document)),
        ".csv": lambda: csv_of(document),
        ".json": lambda: msgspec.json.format(msgspec.json.encode(document)).decode() + "\n",
    }
    write_file(output, forms[output.suffix]().encode())
    status_line(f"report in {output}")


def round_text(event: dict[str, Any]) -> str:
    """'round 3: loss 3.412, held out 3.388 (perplexity 29.6), 4 boards, 12.1 s, 14.7 MB'."""
    devices = event["devices"]
    counted = [device for device, found in devices.items() if not found["refused"]]
    trained, judged = event["loss"], event["held_out_loss"]
    parts = [
        f"loss {trained:.3f}" if trained is not None else "",
        _held_out(judged, event.get("held_out_accuracy")),
        *(f"{name} {right:.1%} right" for name, right in _by_modality(devices).items()),
        _epsilons([found["epsilon"] for found in devices.values() if found["epsilon"] is not None]),
        f"{event['lost']:.2%} had no rank" if event.get("lost") else "",
        f"{len(counted)} of {len(devices)} boards",
        _time(event),
        bytes_text(event["down_bytes"] + event["up_bytes"]),
    ]
    left_out = [f"{device}: {found['refused']}" for device, found in devices.items() if found["refused"]]
    what = f"round {event['round']}" if event["trained"] else "at the end"
    return f"{what}: {', '.join(part for part in parts if part)}" + "".join(f"\n  {line}" for line in left_out)


def _by_modality(devices: dict[str, Any]) -> dict[str, float]:
    """Modality -> share of its held-out labels that were told right."""
    told = [found.get("by_modality", {}) for found in devices.values() if not found["refused"]]
    return accuracy_by([msgspec.convert(one, type=dict[str, Told]) for one in told])


def _time(event: dict[str, Any]) -> str:
    """'12.1 s (planned 11.8 s)'"""
    took, expected = seconds_text(event["wall_s"]), event["expected_s"]
    return took if expected is None else f"{took} (planned {seconds_text(expected)})"


def _row_text(row: dict[str, Any]) -> str:
    because = f": {row['because']}" if row["because"] else ""
    spent = _spent(row)
    return (
        f"job {row['job']} {row['state']}{because}; {row['round']} of {row['rounds']} rounds, held out {_losses(row)}"
        + (f", epsilon {spent}" if spent else "")
        + (f" ({row['uncovered']})" if row.get("uncovered") else "")
        + (", updates masked" if row.get("secure") else "")
    )


def _spent(row: dict[str, Any]) -> str:
    """'1.2 of 4': of the board that has told most."""
    return "" if row["epsilon"] is None else f"{row['epsilon']:.3g} of {row['most_epsilon']:g}"


def _epsilons(spent: list[float]) -> str:
    """'epsilon 1.21', or from the least to the most of the boards; '' where a job is not private."""
    if not spent:
        return ""
    least, most = f"{min(spent):.3g}", f"{max(spent):.3g}"
    return f"epsilon {least}" if least == most else f"epsilon {least} to {most}"


def _held_out(loss: float | None, right: float | None) -> str:
    """'held out 3.388 (perplexity 29.6)', or of labels 'held out 0.712 (81.3 % right)'."""
    if loss is None:
        return ""
    return f"held out {loss:.3f} " + (
        f"(perplexity {math.exp(min(loss, 700)):.4g})" if right is None else f"({right:.1%} right)"
    )


def _losses(row: dict[str, Any]) -> str:
    """What became of the loss, and of the share of labels that are told right."""
    first, last = row["first_held_out_loss"], row["held_out_loss"]
    if first is None:
        return "-"
    right = row["held_out_accuracy"]
    return f"{first:.3f} -> {last:.3f}" + ("" if right is None else f", {right:.1%} right")
