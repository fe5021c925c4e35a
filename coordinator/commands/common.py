"""What all commands share: options, JSON output, status lines."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from coordinator.client import Client
from wire.errors import UsageError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]
CoordinatorUrl = Annotated[
    str | None,
    typer.Option("--coordinator", help="URL of the coordinator; default: $EDGELAM_COORDINATOR, else the one here."),
]
SiteKeyFile = Annotated[
    Path | None,
    typer.Option("--site-key-file", help="File with the site key, for a coordinator on another machine."),
]


def read_site_key(path: Path | None) -> str:
    """The key in a file ($EDGELAM_SITE_KEY_FILE by default); '' when none is named."""
    named = path or (Path(value) if (value := os.environ.get("EDGELAM_SITE_KEY_FILE")) else None)
    if named is None:
        return ""
    try:
        return named.read_text().strip()
    except OSError as error:
        raise UsageError(f"site key {named}: {error.strerror}", try_="check --site-key-file") from None


def client(url: str | None, key_file: Path | None = None) -> Client:
    return Client(url, read_site_key(key_file))


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def status_line(text: str) -> None:
    """A line for people about what is going on; never on stdout."""
    print(f"... {text}", file=sys.stderr, flush=True)


def write_text(text: str, end: str = "\n") -> None:
    """Print on stdout whatever its encoding can do; the rest becomes '?'."""
    encoding = sys.stdout.encoding or "ascii"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding) + end)
    sys.stdout.flush()
