"""`edgelam embed` and `edgelam infer`: items through a model that is no language model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import typer

from coordinator.client import Client
from coordinator.commands.common import (
    AtLeast,
    AtMost,
    CoordinatorUrl,
    Copies,
    Json,
    ModelName,
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
from coordinator.items.requests import ItemsRequest, TensorBody, tensor_of
from coordinator.screens.table import table
from models.items.manifest import DTYPES
from wire.errors import Unreachable, UsageError
from wire.units import bytes_text, seconds_text

MAX_INPUT_BYTES: Final = 4 * 1024 * 1024
"""More does not fit a request (coordinator.bodies)."""
SHOWN: Final = 5
"""Largest numbers of an output that are shown."""
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def embed(
    model: ModelName,
    texts: Annotated[list[str], typer.Argument(help="Texts; '-' reads them from stdin, one a line.")],
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
    """Turn texts into vectors with a sentence encoder, and show how alike they are.

    Example: edgelam embed minilm "A cat sat on the mat." "The kitten lay on a rug."
    """
    given = [line for line in sys.stdin.read().splitlines() if line] if texts == ["-"] else texts
    request = ItemsRequest(
        model=model_name(model), texts=tuple(given), objective=objective, topology=topology, slots=slots,
        boards_at_least=boards_at_least, boards_at_most=boards_at_most, replicas=replicas,
    )  # fmt: skip
    with client(coordinator, site_key_file) as there:
        outputs, end = answered(there, request)
    if end.get("labels"):
        raise UsageError(f"{model} tells labels, and makes no vectors", try_="edgelam label")
    vectors = [next(iter(output.values())).reshape(-1) for output in outputs]
    if json:
        print_json({"schema": "edgelam.embed/1", "vectors": [vector.tolist() for vector in vectors], **end})
        return
    names = [str(number + 1) for number in range(len(vectors))]
    rows = [
        (name, *(f"{float(one @ other):.3f}" for other in vectors), text[:60])
        for name, one, text in zip(names, vectors, given, strict=True)
    ]
    write_text(table(("", *names, "text"), rows, right=tuple(range(1, len(names) + 1))))
    print(figures_text(end), file=sys.stderr)


def infer(
    model: ModelName,
    inputs: Annotated[
        list[Path], typer.Option("--input", "-i", help="An item: .npy for a model with one input, else .npz.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all outputs to a .npz.")] = None,
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
    """Run tensors through MODEL, an .onnx file or an image net, planned and deployed first if need be.

    Example: edgelam infer vit --input picture.npy
    """
    request = ItemsRequest(
        model=model_name(model),
        items=tuple(_read(path) for path in inputs),
        objective=objective,
        topology=topology,
        slots=slots,
        boards_at_least=boards_at_least,
        boards_at_most=boards_at_most,
        replicas=replicas,
    )
    with client(coordinator, site_key_file) as there:
        outputs, end = answered(there, request)
    if output is not None:
        write_file(
            output, _npz({f"{i}/{name}": value for i, item in enumerate(outputs) for name, value in item.items()})
        )
    if json:
        found = [{name: value.tolist() for name, value in item.items()} for item in outputs]
        print_json({"schema": "edgelam.infer/1", "outputs": found, **end})
        return
    for path, item in zip(inputs, outputs, strict=True):
        for name, value in item.items():
            write_text(f"{path}: {name} {_NAMES[value.dtype]} {list(value.shape)}: {_largest(value)}")
    print(figures_text(end), file=sys.stderr)


def answered(there: Client, request: ItemsRequest) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The outputs of each item, and the figures."""
    outputs: list[dict[str, Any]] = []
    end: dict[str, Any] = {}
    for event in there.stream("/v1/items", request):
        if event.get("event") == "status":
            status_line(event["text"])
        elif event.get("event") == "item":
            outputs.append({name: tensor_of(body) for name, body in event["outputs"].items()})
        elif event.get("event") == "end":
            end = {key: value for key, value in event.items() if key != "event"}
    if not end:
        raise Unreachable("the coordinator ended the answer early", try_="run again")
    return outputs, end


def figures_text(end: dict[str, Any]) -> str:
    """What it took beside what was promised, for people."""
    rate, promised = end["items_per_s"] or 0.0, end["predicted_items_per_s"] or 0.0
    lines = [
        f"{end['items']} items: {seconds_text(end['item_s'])} each (predicted {seconds_text(end['predicted_item_s'])} "
        f"alone), {rate:.1f} a second (a full pipeline: {promised:.1f})"
    ]
    for stage in end["stages"]:
        took, sent = stage["measured_compute_s"], stage["sent_bytes_per_item"]
        measured = seconds_text(took) if took is not None else "not measured"
        lines.append(
            f"  {stage['device']}: {measured} (predicted {seconds_text(stage['predicted_compute_s'])}), "
            f"sends {bytes_text(int(sent or 0))} an item"
        )
    return "\n".join(lines)


def _read(path: Path) -> dict[str, TensorBody]:
    """The tensors of a file, '' for the only input of a model; raise UsageError."""
    try:
        if path.stat().st_size > MAX_INPUT_BYTES:
            raise UsageError(
                f"{path}: {bytes_text(path.stat().st_size)}", try_=f"at most {bytes_text(MAX_INPUT_BYTES)}"
            )
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else {"": loaded}
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or 'no numpy file'}", try_="a .npy or .npz file") from None
    except (ValueError, EOFError) as error:
        raise UsageError(f"{path}: {error}", try_="a .npy or .npz file that numpy wrote") from None
    return {name: _tensor(path, array) for name, array in arrays.items()}


def _tensor(path: Path, array: Any) -> TensorBody:
    little = array.dtype.newbyteorder("<")
    name = _NAMES.get(little)
    if name is None:
        raise UsageError(f"{path} holds {array.dtype}", try_=f"one of {', '.join(map(str, DTYPES.values()))}")
    return TensorBody(dtype=name, shape=array.shape, data=array.astype(little, copy=False).tobytes())  # type: ignore[arg-type]


def _npz(arrays: dict[str, Any]) -> bytes:
    import io

    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _largest(value: Any) -> str:
    """'79: 0.998, 175: 0.001', the places and values of the largest numbers."""
    flat = value.reshape(-1)
    best = np.argsort(flat.astype(np.float64))[::-1][:SHOWN]
    return ", ".join(f"{place}: {float(flat[place]):.4g}" for place in best)
