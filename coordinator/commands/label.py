"""`edgelam label`: which label texts, windows of readings, or pictures have, by what edgelam tune has taught.

Texts and pictures go through models that lie on boards. Readings don't leave this machine: what tells their labels is
small (models.training.told), and is fetched instead.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import msgspec
import typer

from coordinator.client import Client
from coordinator.commands.common import (
    AtLeast,
    AtMost,
    CoordinatorUrl,
    Copies,
    Json,
    SiteKeyFile,
    Slots,
    Through,
    WhatFor,
    adapter_name,
    client,
    model_name,
    model_names,
    print_json,
    status_line,
    write_text,
)
from coordinator.commands.items import answered, figures_text
from coordinator.items.requests import InputsRequest, ItemsRequest, TensorBody
from coordinator.items.serve import MOST_ITEMS
from coordinator.screens.table import table
from models.lora.adapter import HEAD_FILE
from models.lora.head import Head, read_head
from models.training import images, series
from models.training.data import BadRow
from models.training.images import Picture, fitted
from models.training.told import Told, told
from wire.errors import CorruptData, Degraded, UsageError

ALSO_SHOWN: Final = 3
"""Labels of a sample, the likeliest first."""
MOST_SAID: Final = 5
"""Bad rows that are named, each on a line."""
MOST_PIXEL_BYTES: Final = 2 * 1024 * 1024
"""Of the pictures of one request, whose body has at most twice that (coordinator.bodies) and is in base64."""


def label(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="WHAT...",
            help="MODEL and texts ('-' reads them from stdin, one a line); or files of readings, or pictures: a folder "
            "stands for those in it.",
            autocompletion=model_names,
        ),
    ],
    adapter: Annotated[
        str, typer.Option("--adapter", help="What tells labels: a job of edgelam tune, or a folder with its adapter.")
    ] = "",
    objective: WhatFor = "latency",
    topology: Through = "auto",
    slots: Slots = None,
    boards_at_least: AtLeast = 1,
    boards_at_most: AtMost = 64,
    replicas: Copies = 1,
    json: Json = False,
    coordinator: CoordinatorUrl = None,
    site_key_file: SiteKeyFile = None,
) -> None:
    """Tell which label texts, readings or pictures have, by what edgelam tune has taught.

    Example: edgelam label minilm "library for reading PNG files" --adapter packages

    Example: edgelam label monday.csv tuesday.csv --adapter watch
    """
    request = ItemsRequest(
        model="", adapter=adapter_name(adapter), objective=objective, topology=topology, slots=slots,
        boards_at_least=boards_at_least, boards_at_most=boards_at_most, replicas=replicas,
    )  # fmt: skip
    head = _head_in(request.adapter)
    if head is not None and head.series is not None:  # for which nobody else is needed
        _readings(head, _paths(inputs, series.KINDS), json)
        return
    with client(coordinator, site_key_file) as there:
        head = head or _head_of(there, request.adapter, alone=len(inputs) == 1)
        if head is not None and head.series is not None:
            _readings(head, _paths(inputs, series.KINDS), json)
        elif head is not None and head.images is not None:
            _pictures(there, request, head, _paths(inputs, images.KINDS), json)
        else:
            _texts(there, request, inputs, json)


def _head_in(adapter: str) -> Head | None:
    """The task module in a folder; None where there is none, or no folder is named."""
    path = Path(adapter) / HEAD_FILE
    return read_head(path) if Path(adapter).is_absolute() and path.is_file() else None


def _head_of(there: Client, adapter: str, alone: bool) -> Head | None:
    """The task module of a job. None where there is none: what the coordinator says to that is raised where a single
    input is `alone`, which can't be a model and a text."""
    if not adapter or Path(adapter).is_absolute():
        return None
    try:
        content = there.file(f"/v1/jobs/{adapter}/{HEAD_FILE}")
    except UsageError:
        if alone:
            raise
        return None
    with tempfile.TemporaryDirectory(prefix="edgelam-") as folder:
        path = Path(folder) / HEAD_FILE
        path.write_bytes(content)
        return read_head(path)


def _paths(inputs: Sequence[str], kinds: tuple[str, ...]) -> list[Path]:
    found = [Path(text).expanduser() for text in inputs]
    for path in found:
        if not path.exists():
            raise UsageError(f"{path}: no such file", try_=f"files of {', '.join(kinds)}, without a model before them")
    return found


class _Sample(NamedTuple):
    """`what` it is, as JSON and as the last cells of a row for people; `shares` of the labels."""

    what: dict[str, Any]
    cells: tuple[str, ...]
    shares: Sequence[float]


def _show(
    labels: Sequence[str], samples: Sequence[_Sample], head: tuple[str, ...], kind: str, json: bool, end: dict[str, Any]
) -> None:
    each = [dict(zip(labels, sample.shares, strict=True)) for sample in samples]
    if json:
        found = [
            {**sample.what, "label": max(shares, key=shares.__getitem__), "shares": shares}
            for sample, shares in zip(samples, each, strict=True)
        ]
        print_json({"schema": "edgelam.label/1", kind: found, **end})
        return
    rows = []
    for sample, shares in zip(samples, each, strict=True):
        first, *others = sorted(shares, key=lambda name: -shares[name])[:ALSO_SHOWN]
        also = ", ".join(f"{name} {shares[name]:.0%}" for name in others)
        rows.append((first, f"{shares[first]:.0%}", also, *sample.cells))
    write_text(table(("label", "share", "or else", *head), rows, right=(1,)))


def _texts(there: Client, request: ItemsRequest, inputs: Sequence[str], json: bool) -> None:
    model, *given = inputs
    texts = [line for line in sys.stdin.read().splitlines() if line] if given == ["-"] else given
    if not texts:
        raise UsageError("no texts to tell labels of", try_='edgelam label MODEL "a text" --adapter JOB')
    outputs, end = answered(there, msgspec.structs.replace(request, model=model_name(model), texts=tuple(texts)))
    labels = end.get("labels") or []
    if not labels:
        raise UsageError(f"{model} alone tells no labels", try_="--adapter JOB, of a job with labels (docs/tuning.md)")
    samples = [
        _Sample({"text": text}, (text[:60],), next(iter(output.values())).reshape(-1).tolist())
        for text, output in zip(texts, outputs, strict=True)
    ]
    _show(labels, samples, ("text",), "texts", json, end)
    if not json:
        print(figures_text(end), file=sys.stderr)


def _readings(head: Head, paths: Sequence[Path], json: bool) -> None:
    samples, bad = list[_Sample](), list[BadRow]()
    for path in paths:
        for found in told(path, head):
            if isinstance(found, BadRow):
                bad.append(found)
            else:
                samples.append(_window(found, timed=bool(head.series and head.series.time)))
    for row in bad[:MOST_SAID]:
        status_line(str(row))
    if len(bad) > MOST_SAID:
        status_line(f"and {len(bad) - MOST_SAID} more rows that are none")
    if not samples:
        window = head.series.window if head.series is not None else 0
        raise CorruptData(
            f"{', '.join(map(str, paths))}: nowhere {window} rows behind each other", try_="longer recordings"
        )
    times = ("from", "to") if head.series and head.series.time else ()
    _show(
        head.labels, samples, ("file", "rows", *times), "windows", json, {"labels": head.labels, "bad_rows": len(bad)}
    )


def _window(found: Told, timed: bool) -> _Sample:
    file, first, last = str(found.first.file), found.first, found.last
    what = {"file": file, "first_row": first.number, "last_row": last.number}
    cells = (file, f"{first.number} to {last.number}")
    if not timed:
        return _Sample(what, cells, found.shares.tolist())
    times = (f"{first.time:.10g}", f"{last.time:.10g}")
    return _Sample({**what, "from": first.time, "to": last.time}, (*cells, *times), found.shares.tolist())


def _pictures(there: Client, request: ItemsRequest, head: Head, paths: Sequence[Path], json: bool) -> None:
    assert head.images is not None
    wanted = InputsRequest(model=head.model, adapter=request.adapter)
    [form] = there.last("/v1/inputs", wanted, status_line)["inputs"].values()
    bad, samples = list[BadRow](), list[_Sample]()
    end: dict[str, Any] = {}
    for batch in _batches(paths, head.images.most_pixels, form["shape"], bad):
        items = tuple({"": body} for _, body in batch)
        outputs, end = answered(there, msgspec.structs.replace(request, model=head.model, items=items))
        for (path, _), output in zip(batch, outputs, strict=True):
            shares = next(iter(output.values())).reshape(-1).tolist()
            samples.append(_Sample({"file": str(path)}, (str(path),), shares))
    for row in bad:
        status_line(str(row))
    if not samples:
        raise CorruptData("none of these is a picture", try_=f"files of {', '.join(images.KINDS)}")
    told_of = {"labels": head.labels, "bad": [{"file": row.where, "because": row.because} for row in bad]}
    figures = {key: value for key, value in end.items() if key not in told_of}
    _show(head.labels, samples, ("file",), "pictures", json, {**figures, **told_of})
    if not json:
        print(figures_text(end), file=sys.stderr)
    if bad:
        raise Degraded(f"{len(bad)} of {len(bad) + len(samples)} are no pictures", try_="see above")


def _batches(
    paths: Sequence[Path], most_pixels: int, shape: Sequence[int], bad: list[BadRow]
) -> Iterator[list[tuple[Path, TensorBody]]]:
    """Pictures as they fit into requests; those that are none are put into `bad`."""
    _, _, height, width = shape
    at_once = max(1, min(MOST_ITEMS, MOST_PIXEL_BYTES // (3 * height * width)))
    batch: list[tuple[Path, TensorBody]] = []
    for path in _files(paths):
        found = fitted(Picture(path, 0), most_pixels, width, height)
        if isinstance(found, BadRow):
            bad.append(msgspec.structs.replace(found, where=str(path)))
            continue
        batch.append((path, TensorBody(dtype="u8", shape=tuple(shape), data=found.tobytes())))
        if len(batch) == at_once:
            yield batch
            batch = []
    if batch:
        yield batch


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        try:
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in images.KINDS and file.is_file())
        except OSError as error:
            raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}", try_="another folder") from None
        if not found:
            raise UsageError(f"{path}: no {', '.join(images.KINDS)} in it", try_="one picture at least")
        yield from found
