"""`edgelam model list | fetch | show`: what can be run, and getting it."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from coordinator.commands.common import Json, print_json, status_line, write_text
from coordinator.screens.table import table
from models.cache import cache_dir
from models.catalog import entries, find, is_cached, resolve
from models.fetch import fetch
from models.formats.checkpoint import open_checkpoint
from wire.errors import Refused
from wire.units import bytes_text

app = typer.Typer(help="What can be run: list, fetch, show.", no_args_is_help=True)


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
            ("name", "size", "licence", "cached", "source"),
            [
                (entry.name, bytes_text(entry.file_bytes), entry.licence, "yes" if cached else "no", entry.source)
                for entry, cached in rows
            ],
            right=(1,),
        )
    )
    write_text("also: a path to a .gguf or safetensors, or hf:ORG/NAME")


@app.command(name="fetch")
def fetch_model(
    name: Annotated[str, typer.Argument(help="Catalog name or hf:ORG/NAME.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")] = False,
) -> None:
    """Get a model into the cache, checked by digest. Does nothing when it is there.

    Example: edgelam model fetch smollm2
    """
    entry = find(name)
    if entry is not None and not is_cached(entry, cache_dir()) and not yes and sys.stdin.isatty():
        question = f"{entry.source}: {bytes_text(entry.file_bytes)}, licence {entry.licence}. Download?"
        if not typer.confirm(question):
            raise Refused("not downloaded: you said no")
    path = fetch(name, cache_dir(), status_line)
    write_text(str(path))


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="Catalog name, path or hf:ORG/NAME.")],
    json: Json = False,
) -> None:
    """Show what a checkpoint says of itself: family, sizes, licence."""
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
