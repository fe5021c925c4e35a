"""`edgelam model list | fetch | show | codecs | cache | remove`: what can be run, and what is kept of it."""

from __future__ import annotations

import os
import sys
from math import exp
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from coordinator.client import Client
from coordinator.commands.common import (
    Json,
    ModelName,
    Precision,
    model_names,
    print_json,
    status_line,
    write_text,
)
from coordinator.config import read_address, state_dir
from coordinator.items.requests import form_of
from coordinator.screens.table import table
from coordinator.shelf import canonical, is_item_model, wire_dtype_of
from models.build.pack import pack
from models.cache import cache_dir
from models.catalog import entries, find, is_cached, resolve
from models.codecs import CodecReport, load_report, report_path, save_report, text_in, usual_text
from models.fetch import fetch
from models.formats.checkpoint import open_checkpoint
from models.items.pack import pack_items
from models.stored import remove, stored
from models.text import Tokenizer
from wire.codecs import payload_bytes
from wire.errors import EdgelamError, Refused, Unreachable, UsageError
from wire.units import bytes_text

app = typer.Typer(
    help="What can be run, and what is kept of it: list, fetch, show, codecs, cache, remove.", no_args_is_help=True
)


@app.command(name="list")
def list_models(json: Json = False) -> None:
    """List the catalog: names, sizes, licences, what is in the cache."""
    rows = [(entry, is_cached(entry, cache_dir())) for entry in entries()]
    if json:
        models = [{**msgspec.to_builtins(entry), "cached": cached} for entry, cached in rows]
        print_json({"schema": "edgelam.models/1", "models": models})
        return
    write_text(
        table(
            ("name", "kind", "size", "licence", "cached", "source"),
            [
                (
                    entry.name,
                    entry.kind,
                    bytes_text(entry.file_bytes),
                    entry.licence,
                    "yes" if cached else "no",
                    entry.source,
                )
                for entry, cached in rows
            ],
            right=(2,),
        )
    )
    write_text("also: a path to a .gguf, safetensors or .onnx, or hf:ORG/NAME")


@app.command(name="fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help="Catalog name or hf:ORG/NAME.", autocompletion=model_names)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
    json: Json = False,
) -> None:
    """Get a model into the cache, checked by digest. Does nothing when it is there.

    Example: edgelam model fetch smollm2
    """
    entry = find(name)
    if entry is not None and not is_cached(entry, cache_dir()) and not yes and sys.stdin.isatty():
        question = f"{entry.source}: {bytes_text(entry.file_bytes)}, licence {entry.licence}. Download?"
        if not typer.confirm(question, err=True):
            raise Refused("not downloaded: you said no")
    path = fetch(name, cache_dir(), status_line)
    if json:
        print_json({"schema": "edgelam.fetched/1", "model": name, "path": str(path)})
    else:
        write_text(str(path))


@app.command()
def show(
    model: ModelName,
    json: Json = False,
) -> None:
    """Show what a model says of itself: family, sizes, licence; of one that is no language model, its parts."""
    if is_item_model(model):
        _show_items(model, json)
        return
    checkpoint = open_checkpoint(resolve(model, cache_dir()), cache_dir())
    facts = {
        "path": str(checkpoint.path),
        "digest": checkpoint.digest,
        "licence": checkpoint.licence,
        **msgspec.to_builtins(checkpoint.config),
    }
    if json:
        print_json({"schema": "edgelam.model/1", **facts})
    else:
        write_text("\n".join(f"{key:>18}  {value}" for key, value in facts.items()))


def _show_items(model: str, json: bool) -> None:
    packed = pack_items(resolve(model, cache_dir()), model, cache_dir())
    graph, config = packed.graph, packed.config
    live = graph.live_bytes()
    if json:
        inputs, outputs = msgspec.to_builtins(config.inputs), msgspec.to_builtins(config.outputs)
        facts = {"inputs": inputs, "outputs": outputs, "most_rows": config.most_rows}
        print_json({"schema": "edgelam.model/1", **facts, "graph": msgspec.to_builtins(graph), "live_bytes": live})
        return
    write_text(f"takes {', '.join(f'{port.name} {form_of(port)}' for port in config.inputs)}")
    write_text(f"gives {', '.join(f'{port.name} {form_of(port)}' for port in config.outputs)}")
    rows = [
        (module.name, bytes_text(module.weight_bytes), f"{module.macs_per_token / 1e6:.1f}", bytes_text(crossing))
        for module, crossing in zip(graph.modules, live[1:], strict=True)
    ]
    write_text(table(("module", "weights", "million products", "crosses behind it"), rows, right=(1, 2, 3)))


MOST_LETTERS = 64
"""Of a token, on the average of a text."""


@app.command(name="codecs")
def measure_codecs(
    model: ModelName,
    precision: Precision = "int4",
    tokens: Annotated[int, typer.Option(help="Tokens of the text to measure on, at most.")] = 2048,
    text: Annotated[Path | None, typer.Option(help="Text to measure on (default: Python's own reference).")] = None,
    seconds: Annotated[float, typer.Option(help="Take fewer tokens rather than longer than this.")] = 600.0,
    again: Annotated[bool, typer.Option("--again", help="Measure anew what was measured before.")] = False,
    json: Json = False,
) -> None:
    """Measure what codecs at the cuts cost MODEL in quality, on this machine; plans with an --error-budget need it.

    Example: edgelam model codecs smollm2
    """
    if tokens < 1 or not seconds > 0:
        raise UsageError("nothing can be measured on no tokens or in no time", try_="--tokens 2048 --seconds 600")
    words = usual_text() if text is None else text_in(text)
    checkpoint = open_checkpoint(resolve(model, cache_dir()), cache_dir())
    try:
        packed = pack(checkpoint, precision, wire_dtype_of(precision), cache_dir())
        packed = msgspec.structs.replace(packed, graph=msgspec.structs.replace(packed.graph, model=canonical(model)))
        report = load_report(packed)
        if report is not None and not again and report.text_digest == words.digest:
            status_line(f"measured before ({report_path(packed)}); --again measures anew")
        else:
            from models.judge import judge

            ids = Tokenizer.from_checkpoint(checkpoint).encode(words.words[: MOST_LETTERS * tokens])[:tokens]
            report = judge(packed, ids, words, len(os.sched_getaffinity(0)), seconds, status_line)
            status_line(f"kept in {save_report(packed, report)}")
    except OSError as error:
        raise EdgelamError(
            f"{model} can't be measured: {error}", try_=f"is there room in {cache_dir()}, and may it be written?"
        ) from None
    if json:
        print_json(report)
    else:
        write_text(_codecs_text(report))


def _codecs_text(report: CodecReport) -> str:
    """A row for each codec and set of cuts."""
    rows = []
    for cost in report.costs:
        everywhere = len(cost.cuts) == report.blocks + 1
        rows.append(
            (
                cost.codec,
                f"{payload_bytes(cost.codec, report.wire_dtype, report.hidden)} B",
                "all" if everywhere else ", ".join(map(str, cost.cuts)),
                f"{100 * (exp(cost.nats) - 1):+.2f} %",
                f"{100 * cost.nats_error:.2f}",
                f"{100 * cost.agreement:.1f} %",
                f"{cost.logit_error:.3f}",
            )
        )
    header = ("codec", "row", "cuts behind block", "perplexity", "+-", "same word", "logits apart")
    plain = payload_bytes("as-is", report.wire_dtype, report.hidden)
    return "\n".join(
        [
            f"{report.model} at {report.precision}: perplexity {report.perplexity:.2f} on {report.tokens} tokens of "
            f"{report.text}; a row has {plain} bytes as it is ({report.wire_dtype})",
            table(header, rows, right=(1, 3, 4, 5, 6)),
        ]
    )


@app.command(name="cache")
def list_cache(json: Json = False) -> None:
    """List what the cache holds: checkpoints, and what was packed from them, with sizes.

    Nothing of it is removed by itself. All can be fetched or packed again.
    """
    found = stored(cache_dir())
    if json:
        rows = [msgspec.to_builtins(entry) for entry in found]
        print_json({"schema": "edgelam.cache/1", "folder": str(cache_dir()), "entries": rows})
        return
    rows_shown = [(entry.name, bytes_text(entry.size_bytes), entry.kind, entry.of) for entry in found]
    write_text(table(("name", "size", "what", "packed from"), rows_shown, right=(1,)) if found else "nothing")
    write_text(f"{bytes_text(sum(entry.size_bytes for entry in found))} in {cache_dir()}")


@app.command(name="remove")
def remove_cached(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="As edgelam model cache lists them.")],
) -> None:
    """Remove checkpoints or packs from the cache.

    Example: edgelam model remove packs/b179c9523d0e6a0f98a330c7562b6827-f32-v1
    """
    if _coordinator_runs():
        raise Refused(
            "a coordinator runs here, and may be handing out what is in the cache", try_="end it first, then run again"
        )
    for name in names:
        try:
            gone = remove(cache_dir(), name)
        except OSError as error:
            raise EdgelamError(
                f"{name} can't be removed ({(error.strerror or str(error)).lower()})", try_=f"who owns {cache_dir()}?"
            ) from None
        write_text(f"removed {gone.name} ({bytes_text(gone.size_bytes)})")


def _coordinator_runs() -> bool:
    address = read_address(state_dir())
    if address is None:
        return False
    try:
        with Client(address.http_url) as there:
            there.get("/v1/status")
    except Unreachable:
        return False  # ended without saying so
    return True
