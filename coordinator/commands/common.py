"""What all commands share: options, JSON output, status lines."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from coordinator.client import Client
from coordinator.planning.plan import Objective, Topology
from models.catalog import entries
from wire.errors import ExitCode, UsageError


def model_names(incomplete: str) -> list[str]:
    """Names and aliases of the catalog that begin so, for the shell."""
    names = [name for entry in entries() for name in (entry.name, *entry.aliases)]
    return [name for name in names if name.startswith(incomplete)]


ModelName = Annotated[
    str,
    typer.Argument(help="Catalog name, path to a .gguf, safetensors or .onnx, or hf:REPO.", autocompletion=model_names),
]
Precision = Annotated[Literal["int4", "int8", "f32"], typer.Option(help="Precision of the model's weights.")]
WhatFor = Annotated[
    Objective,
    typer.Option(help="latency: a token soon; ttft: the first one; throughput: many in little time; docs/plans.md."),
]
Slots = Annotated[
    int | None, typer.Option(help="Requests answered at once; the rest wait (default: as many as go well, up to 8).")
]
AtLeast = Annotated[int, typer.Option(help="Spread over at least this many boards.")]
AtMost = Annotated[int, typer.Option(help="Use at most this many boards.")]
Copies = Annotated[
    int,
    typer.Option(
        "--replicas",
        help="Copies of each stage: with 2, another board has it loaded too, and takes over after a loss at once.",
    ),
]
Through = Annotated[
    Topology,
    typer.Option(
        "--topology",
        help="central: activations go through the site's broker; direct: through boards' own; auto: as measured.",
    ),
]
ErrorBudget = Annotated[
    float,
    typer.Option(
        "--error-budget",
        help="By how many per cent codecs at the cuts may raise perplexity; 0: hidden states cross as they are.",
    ),
]

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
        key = named.read_text(encoding="ascii").strip()
    except OSError as error:
        raise UsageError(f"site key {named}: {error.strerror}", try_="check --site-key-file") from None
    except UnicodeDecodeError:
        key = ""
    if not key.isprintable() or not key:
        raise UsageError(f"site key {named}: not one line of ASCII text", try_="check --site-key-file")
    return key


def model_name(text: str) -> str:
    """A model as the coordinator should hear it: a path means a file here, wherever the coordinator was started."""
    path = Path(text).expanduser()
    return str(path.resolve()) if path.exists() else text


def adapter_name(text: str) -> str:
    """An adapter as the coordinator should hear it: a job by its name; what has a slash, or begins with a dot or ~, is
    a folder here."""
    return str(Path(text).expanduser().resolve()) if "/" in text or text.startswith((".", "~")) else text


def client(url: str | None, key_file: Path | None = None) -> Client:
    return Client(url, read_site_key(key_file))


def print_json(value: Any) -> None:
    """One JSON document on stdout; in ASCII where stdout can't do more."""
    data = msgspec.json.encode(value)
    text = data.decode()
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(msgspec.json.decode(data))
    _out(text + "\n")


def status_line(text: str) -> None:
    """A line for people about what is going on; never on stdout."""
    print(f"... {printable(text)}", file=sys.stderr, flush=True)


def aside(text: str) -> None:
    """A status line in the middle of an answer: on a terminal it gets a line of its own, and is dim."""
    below = "\n" if sys.stdout.isatty() else ""
    dim, plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else ("", "")
    print(f"{below}{dim}... {printable(text)}{plain}", file=sys.stderr, flush=True)


def write_text(text: str, end: str = "\n") -> None:
    """Print on stdout whatever its encoding can do; the rest becomes '?'."""
    encoding = sys.stdout.encoding or "ascii"
    _out(printable(text).encode(encoding, "replace").decode(encoding) + end)


def printable(text: str) -> str:
    """Text that a terminal shows and does not obey: boards and models write some of what we print. Control characters
    but line ends and tabs become '?'."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "?" for c in text)


def write_file(path: Path, data: bytes) -> None:
    """Write a file that the user named; raise UsageError if that can't be done."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise UsageError(
            f"can't write {path}: {(error.strerror or str(error)).lower()}", try_="another --output"
        ) from None


def _out(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away: nobody's error. Keep the interpreter from flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(int(ExitCode.OK)) from None
