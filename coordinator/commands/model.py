"""`edgelam model list | fetch | show | cache | remove`: what can be run, getting it, and what is kept of it."""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
import typer

from coordinator.client import Client
from coordinator.commands.common import Json, print_json, status_line, write_text
from coordinator.config import read_address, state_dir
from coordinator.screens.table import table
from models.cache import cache_dir
from models.catalog import entries, find, is_cached, resolve
from models.fetch import fetch
from models.formats.checkpoint import open_checkpoint
from models.stored import remove, stored
from wire.errors import EdgelamError, Refused, Unreachable
from wire.units import bytes_text

app = typer.Typer(
    help="What can be run, and what is kept of it: list, fetch, show, cache, remove.", no_args_is_help=True
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
