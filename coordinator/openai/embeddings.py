"""POST /v1/embeddings: texts -> vectors, as OpenAI's clients ask for them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from coordinator.items.figures import figures
from coordinator.items.live import Item
from coordinator.items.serve import Answers, ItemServing
from coordinator.items.texts import text_items
from coordinator.journal import DeployRequest
from coordinator.openai.bodies import MAX_NAME_CHARS, Settings
from coordinator.openai.errors import BadParameter
from coordinator.shelf import Prepared
from models.items.manifest import views
from models.items.pack import PackedItems
from models.items.words import MAX_TEXT_CHARS

MOST_TEXTS: Final = 1024
"""In one request; OpenAI takes 2048."""

Text = Annotated[str, Meta(min_length=1, max_length=MAX_TEXT_CHARS)]


class EmbeddingsBody(Struct, frozen=True, kw_only=True):
    """Token ids in place of text are ids of OpenAI's vocabularies, which no model here has."""

    model: Annotated[str, Meta(min_length=1, max_length=MAX_NAME_CHARS)]
    input: Text | Annotated[list[Text], Meta(min_length=1, max_length=MOST_TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    edgelam: Settings | None = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


def read_embeddings(data: bytes) -> EmbeddingsBody:
    """The body, checked; raise BadParameter."""
    try:
        return msgspec.json.decode(data, type=EmbeddingsBody)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        param = "input" if "input" in str(error) else None
        raise BadParameter(f"the request can't be read: {error}", param=param) from None


async def embedded(serving: ItemServing, body: EmbeddingsBody, request: DeployRequest) -> dict[str, Any]:
    """Give the answer in OpenAI's shape, with figures under `edgelam`."""

    def make(prepared: Prepared, packed: PackedItems) -> Sequence[Item]:
        if body.dimensions not in (None, packed.config.outputs[0].shape[-1]):
            raise BadParameter(
                f"vectors of {body.dimensions} are not possible: {request.model} gives "
                f"{packed.config.outputs[0].shape[-1]}",
                param="dimensions",
            )
        return text_items(prepared, packed, body.texts)

    answers = await serving.run(request, make, lambda _text: None)
    as_text = body.encoding_format == "base64"
    rows = sum(result.rows for result in answers.results)
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.tobytes()).decode() if as_text else vector.tolist(),
            }
            for index, vector in enumerate(vectors(answers))
        ],
        "model": request.model,
        "usage": {"prompt_tokens": rows, "total_tokens": rows},
        "edgelam": figures(answers),
    }


def vectors(answers: Answers) -> list[Any]:
    """float32 [width] of each text."""
    [port] = answers.packed.config.outputs
    return [views([port], result.rows, result.data)[port.name] for result in answers.results]
