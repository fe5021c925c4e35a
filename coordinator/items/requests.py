"""POST /v1/items: texts or tensors in, tensors out, one event each, and figures at the end.

    {"event": "status", "text"}                  while the model is packed, weights travel, stages load
    {"event": "item", "index", "outputs"}        in the order of the items; tensors as below
    {"event": "end", ..., "labels"}              coordinator.items.figures; whose shares come out, of labels
A tensor is {"dtype": "f32", "shape": [1, 3, 224, 224], "data": its bytes in base64}, little-endian, row by row.

POST /v1/inputs: which tensors a model takes; `inputs_of` has the form.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from msgspec import Meta, Struct

from coordinator.inference.progress import with_status
from coordinator.items.figures import figures
from coordinator.items.labels import Labels, Say
from coordinator.items.live import Item
from coordinator.items.serve import MOST_ITEMS, Answers, ItemServing, item_model
from coordinator.items.texts import text_items
from coordinator.journal import DeployRequest
from coordinator.operations import Operations
from coordinator.shelf import Prepared
from models.items.manifest import DTYPES, MAX_PORT_RANK, MAX_PORTS, ROWS, DtypeName, Port, bundle, views
from models.items.pack import PackedItems
from models.items.words import MAX_TEXT_CHARS
from wire.errors import UsageError
from wire.limits import MAX_DIM

FORMS: Final = "dtype, shape and data of each input"


class TensorBody(Struct, frozen=True, kw_only=True):
    dtype: DtypeName
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=MAX_DIM)], ...], Meta(max_length=MAX_PORT_RANK)]
    data: bytes


class InputsRequest(Struct, frozen=True, kw_only=True):
    """What a model, or what it becomes with an adapter, takes."""

    model: str
    adapter: str = ""


class ItemsRequest(Struct, frozen=True, kw_only=True):
    """Either `texts` or `items`; of these each has a tensor for each input ('' names the only one). The other fields
    are a DeployRequest's."""

    model: str
    adapter: str = ""
    """Of a job, or a folder: the encoder, or the net that takes pictures, tells labels with it."""
    texts: Annotated[tuple[Annotated[str, Meta(max_length=MAX_TEXT_CHARS)], ...], Meta(max_length=MOST_ITEMS)] = ()
    items: Annotated[
        tuple[Annotated[dict[str, TensorBody], Meta(max_length=MAX_PORTS)], ...], Meta(max_length=MOST_ITEMS)
    ] = ()
    objective: str = "latency"
    slots: int | None = None
    replicas: int = 1
    boards_at_least: int = 1
    boards_at_most: int = 64
    topology: str = "auto"
    excluded: tuple[str, ...] = ()
    pins: tuple[tuple[str, str], ...] = ()

    def deploy(self) -> DeployRequest:
        shared = set(self.__struct_fields__) & set(DeployRequest.__struct_fields__)
        return DeployRequest(**{name: getattr(self, name) for name in shared})


async def inputs_of(operations: Operations, labels: Labels, request: InputsRequest, say: Say) -> dict[str, Any]:
    """{"event": "inputs", "inputs": {name: {"dtype", "shape"}}, "labels"}; a size of 0 is that of the item's rows.
    Raises what packing raises, Refused for a language model."""
    async with AsyncExitStack() as stack:
        model = request.model
        if request.adapter:
            model = await stack.enter_async_context(labels.model_with(model, request.adapter, say))
        config = item_model(await operations.preparing.prepare(model, "f32", say)).config
    inputs = {port.name: {"dtype": port.dtype, "shape": port.shape} for port in config.inputs}
    return {"event": "inputs", "inputs": inputs, "labels": config.labels}


async def answer_events(serving: ItemServing, request: ItemsRequest) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a request; see the module's text."""
    if bool(request.texts) == bool(request.items):
        raise UsageError("give either texts or items", try_="edgelam embed, or edgelam infer")

    def make(prepared: Prepared, packed: PackedItems) -> Sequence[Item]:
        if request.texts:
            return text_items(prepared, packed, request.texts)
        return [item_of(packed, index, item) for index, item in enumerate(request.items)]

    async def run(say: Say) -> Answers:
        wanted = request.deploy()
        if not request.adapter:
            return await serving.run(wanted, make, say)
        async with serving.labels.model_with(request.model, request.adapter, say) as model:
            return await serving.run(msgspec.structs.replace(wanted, model=model), make, say)

    came: list[Answers] = []
    async with aclosing(with_status(run, came)) as events:
        async for event in events:
            yield event
    [answers] = came
    ports = answers.packed.config.outputs
    for index, result in enumerate(answers.results):
        tensors = views(ports, result.rows, result.data)
        outputs = {
            port.name: TensorBody(dtype=port.dtype, shape=port.dims(result.rows), data=tensors[port.name].tobytes())
            for port in ports
        }
        yield {"event": "item", "index": index, "outputs": msgspec.to_builtins(outputs)}
    yield {"event": "end", **figures(answers), "labels": list(answers.packed.config.labels)}


def item_of(packed: PackedItems, index: int, given: dict[str, TensorBody]) -> Item:
    """Check the tensors of an item against the model's inputs; raise UsageError for what does not fit."""
    ports = packed.config.inputs
    if set(given) == {""} and len(ports) == 1:
        given = {ports[0].name: given[""]}
    if set(given) != {port.name for port in ports}:
        names = ", ".join(port.name for port in ports)
        raise UsageError(f"item {index} has {', '.join(sorted(given)) or 'no inputs'}", try_=f"its inputs are: {names}")
    rows = _rows(packed, index, given)
    tensors = {}
    for port in ports:
        tensor = given[port.name]
        if tensor.dtype != port.dtype or tensor.shape != port.dims(rows):
            raise UsageError(
                f"item {index}: {port.name} is {tensor.dtype} {list(tensor.shape)}", try_=f"it must be {form_of(port)}"
            )
        if len(tensor.data) != port.size_bytes(rows):
            raise UsageError(
                f"item {index}: {port.name} has {len(tensor.data)} bytes, {port.size_bytes(rows)} are due", try_=FORMS
            )
        tensors[port.name] = np.frombuffer(tensor.data, DTYPES[port.dtype]).reshape(tensor.shape)
    return Item(bundle(ports, rows, tensors), rows)


def form_of(port: Port) -> str:
    """'f32 [1, 3, 224, 224]'."""
    return f"{port.dtype} [{', '.join('rows' if dim == ROWS else str(dim) for dim in port.shape)}]"


def _rows(packed: PackedItems, index: int, given: dict[str, TensorBody]) -> int:
    """How many rows an item has: what its inputs have where the model leaves a size open; 1 where it leaves none."""
    found = {
        size
        for port in packed.config.inputs
        if len(port.shape) == len(given[port.name].shape)
        for dim, size in zip(port.shape, given[port.name].shape, strict=True)
        if dim == ROWS
    }
    rows = max(found, default=1)
    if len(found) > 1 or rows > packed.config.most_rows:
        raise UsageError(
            f"item {index} has {' and '.join(map(str, sorted(found)))} rows", try_=f"1 to {packed.config.most_rows}"
        )
    return rows


def tensor_of(body: dict[str, Any]) -> Any:
    """The array of a tensor in an event, for clients; raise UsageError if it is none."""
    try:
        tensor = msgspec.convert(body, TensorBody)
        if len(tensor.data) != math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize:
            raise ValueError(f"{len(tensor.data)} bytes")
        return np.frombuffer(tensor.data, DTYPES[tensor.dtype]).reshape(tensor.shape)
    except (msgspec.ValidationError, ValueError) as error:
        raise UsageError(
            f"the coordinator sent no tensor: {error}", try_="the same edgelam version at both ends"
        ) from None
