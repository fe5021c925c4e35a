"""OpenAI's HTTP, answered by the boards.

    GET  /v1/models                 what a request may name
    GET  /v1/models/{id:path}       one of them; ids may hold slashes
    POST /v1/chat/completions       a conversation -> its next message
    POST /v1/completions            a text -> how it goes on
    POST /v1/embeddings             texts -> vectors

A model that is in force is asked as it is deployed; the field `edgelam` chooses other settings. Whatever ends a request
before anything was sent is told by its HTTP status, later by an event in the error's shape, without `[DONE]` behind it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from contextlib import aclosing
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from coordinator.asked import checked
from coordinator.bodies import read_body
from coordinator.inference.requests import GenerateRequest
from coordinator.inference.serve import Serving, deploy_request, encoded
from coordinator.items.serve import ItemServing
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.metrics import Metrics, Watched
from coordinator.openai.answers import Finished, Item, Opened, Piece, Remark, Shape, event
from coordinator.openai.bodies import ChatBody, Settings, TextBody, decoded
from coordinator.openai.cut import Cut
from coordinator.openai.embeddings import embedded, read_embeddings
from coordinator.openai.errors import BadParameter, openai_body, openai_reply
from coordinator.openai.offered import offered, offered_as
from coordinator.operations import Operations
from coordinator.pump import Pump
from coordinator.replies import json_reply
from coordinator.service import Coordinator
from coordinator.shelf import canonical
from models.cache import cache_dir
from wire.errors import EdgelamError

T = TypeVar("T")

QUIET_S: Final = 45.0
"""How long a stream waits for its first event before it begins: what is refused until then is refused with its HTTP
status. A site without boards is known after 21 s (coordinator.operations); proxies give up on silence after 60 s."""
REMARK_PERIOD_S: Final = 15.0
"""Silence in a stream after which a comment says that it lives."""
MOST_TOKENS: Final = 100_000
"""What a GenerateRequest may ask for."""
CLIENT_GONE: Final = 499
"""nginx's status for a client that left; nobody reads it."""


class Ask(Struct, frozen=True, kw_only=True):
    """A request as it was understood. `request.max_tokens` counts only if `most_tokens` is given; else the answer may
    be as long as the context lets it."""

    request: GenerateRequest
    most_tokens: int | None
    stops: tuple[str, ...]
    stream: bool
    with_usage: bool

    @property
    def chat(self) -> bool:
        return bool(self.request.messages)


class Door:
    """Handlers; one instance per coordinator."""

    def __init__(
        self,
        coordinator: Coordinator,
        operations: Operations,
        serving: Serving,
        items: ItemServing,
        metrics: Metrics,
    ) -> None:
        self._coordinator = coordinator
        self._operations = operations
        self._serving = serving
        self._items = items
        self._metrics = metrics

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", _guarded(self.models), methods=["GET"]),
            Route("/v1/models/{id:path}", _guarded(self.model), methods=["GET"]),
            Route("/v1/chat/completions", _guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", _guarded(self.complete), methods=["POST"]),
            Route("/v1/embeddings", _guarded(self.embed), methods=["POST"]),
        ]

    async def models(self, _request: Request) -> Response:
        found = await asyncio.to_thread(offered, self._coordinator.records(), cache_dir())
        return json_reply({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        name = request.path_params["id"]
        return json_reply(await asyncio.to_thread(offered_as, name, self._coordinator.records(), cache_dir()))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, ask_of(decoded(await read_body(request), ChatBody), self._records()))

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, ask_of(decoded(await read_body(request), TextBody), self._records()))

    async def embed(self, request: Request) -> Response:
        body = read_embeddings(await read_body(request))
        if body.edgelam is not None and body.edgelam.adapter:
            raise BadParameter(f"{body.model} takes no adapter", param="edgelam", try_="leave the adapter out")
        wanted = settings(body.model, body.edgelam or Settings(), self._records())
        found = await unless_gone(request, embedded(self._items, body, wanted))
        return Response(status_code=CLIENT_GONE) if found is None else json_reply(found)

    def _records(self) -> list[DeploymentRecord]:
        return self._coordinator.records()

    async def _answer(self, request: Request, ask: Ask) -> Response:
        watched = Watched()
        pump = Pump(items(self._metrics.watch(self._events(ask), watched), ask.stops, watched))
        shape = Shape("chat" if ask.chat else "text", ask.request.model, time.time(), ask.with_usage)
        try:
            work = opened(pump) if ask.stream else whole(pump)
            first = await unless_gone(request, work)
        except BaseException:
            await pump.close()
            raise
        if first is None:
            await pump.close()
            return Response(status_code=CLIENT_GONE)
        if ask.stream:
            return EventStream(first, pump, shape)
        *texts, end = first
        assert isinstance(end, Finished)
        return json_reply(shape.whole("".join(item.text for item in texts if isinstance(item, Piece)), end))

    async def _events(self, ask: Ask) -> AsyncGenerator[dict[str, Any], None]:
        """The events of the request, after its prompt was measured against the context."""
        request = await self._fitted(ask)
        async with aclosing(self._serving.generate(request)) as events:
            async for found in events:
                yield found

    async def _fitted(self, ask: Ask) -> GenerateRequest:
        """The request with its number of tokens; raise BadParameter if they don't fit the context."""
        request = ask.request
        checked(deploy_request(request))
        prepared = await self._operations.preparing.prepare(request.model, request.precision, lambda _text: None)
        if ask.chat and not prepared.tokenizer.has_chat_template:
            raise BadParameter(
                f"{request.model} has no chat template", param="messages", try_="POST /v1/completions with a prompt"
            )
        prompt = len(await asyncio.to_thread(encoded, request, prepared))
        left = request.context_tokens - prompt
        if left < (ask.most_tokens or 1):
            new = f" and {ask.most_tokens} new ones" if ask.most_tokens else ""
            fitting = f"max_tokens of at most {left}, " if left > 0 else ""
            raise BadParameter(
                f"a prompt of {prompt} tokens{new} exceeds the context of {request.context_tokens}",
                param="messages" if ask.chat else "prompt",
                code="context_length_exceeded",
                try_=f"{fitting}a shorter prompt, or a larger context_tokens in the field edgelam",
            )
        return msgspec.structs.replace(request, max_tokens=ask.most_tokens or min(left, MOST_TOKENS))


def ask_of(body: ChatBody | TextBody, records: Iterable[DeploymentRecord]) -> Ask:
    """What a body asks for, on the deployment that is in force for its model, if there is one."""
    wanted = settings(body.model, body.edgelam or Settings(), records)
    chat = isinstance(body, ChatBody)
    request = GenerateRequest(
        **{name: getattr(wanted, name) for name in DeployRequest.__struct_fields__ if name != "adapters"},
        prompt=body.text() if isinstance(body, TextBody) else "",
        messages=tuple(message.plain() for message in body.messages) if isinstance(body, ChatBody) else (),
        raw=not chat,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        seed=secrets.randbits(63) if body.seed is None else body.seed % 2**63,
        speculate=(body.edgelam and body.edgelam.speculate) or "auto",
        adapter=(body.edgelam and body.edgelam.adapter) or "",
    )
    return Ask(
        request=request,
        most_tokens=body.most_tokens,
        stops=body.stops,
        stream=bool(body.stream),
        with_usage=body.with_usage,
    )


def settings(model: str, given: Settings, records: Iterable[DeploymentRecord]) -> DeployRequest:
    """How the model is in force, else by default, with what is given in place of that."""
    name = canonical(model)
    in_force = (record.request for record in records if record.request.model == name)
    base = next(in_force, None) or DeployRequest(model=name)
    deploys = [field for field in given.__struct_fields__ if field in DeployRequest.__struct_fields__]
    changes = {field: value for field in deploys if (value := getattr(given, field)) is not None}
    return msgspec.structs.replace(base, **changes)


async def items(
    events: AsyncGenerator[dict[str, Any], None], stops: tuple[str, ...], watched: Watched
) -> AsyncGenerator[Item, None]:
    """The events of coordinator.inference.serve as items of an answer, cut at the first stop string: there the request
    is ended at the stages too. An event that is not known here becomes a remark."""
    cut = Cut(stops)
    prompt_tokens = tokens = 0
    async with aclosing(events):
        async for found in events:
            kind = found["event"]
            if kind == "start" and not prompt_tokens:
                prompt_tokens = found["prompt_tokens"]
                yield Opened()
            elif kind == "token":
                tokens += 1
                if text := cut.push(found["text"]):
                    yield Piece(text)
                if cut.found:
                    watched.outcome = "stop"
                    yield Finished("stop", prompt_tokens, tokens)
                    return
            elif kind == "end":
                if text := cut.flush():
                    yield Piece(text)
                yield Finished(found["finish_reason"], prompt_tokens, tokens)
                return
            else:
                yield Remark(str(found.get("text") or found.get("reason") or kind))


async def opened(pump: Pump[Item]) -> list[Item]:
    """What has come when the stages begin, or after QUIET_S; raise what was refused until then."""
    deadline_s = time.monotonic() + QUIET_S
    came: list[Item] = []
    while (left_s := deadline_s - time.monotonic()) > 0:
        item = await pump.next(left_s)
        if item is not None:
            came.append(item)
            if not isinstance(item, Remark):
                break
        elif pump.over:
            break
    return came


async def whole(pump: Pump[Item]) -> list[Item]:
    """All of the answer; raise what ended it early."""
    came: list[Item] = []
    while not came or not isinstance(came[-1], Finished):
        came += await _more(pump)
    return came


async def _more(pump: Pump[Item]) -> list[Item]:
    item = await pump.next(REMARK_PERIOD_S)
    if item is None and pump.over:
        raise EdgelamError("the answer ended early", try_="ask again")
    return [] if item is None else [item]


class EventStream(StreamingResponse):
    """Items as server-sent events. However it ends, the work behind it ends with it."""

    def __init__(self, came: list[Item], pump: Pump[Item], shape: Shape) -> None:
        self._pump = pump
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._encoded(came, shape), media_type="text/event-stream", headers=headers)

    async def _encoded(self, came: list[Item], shape: Shape) -> AsyncGenerator[bytes, None]:
        try:
            while True:
                for item in came or [Remark("waiting")]:
                    yield shape.streamed(item)
                    if isinstance(item, Finished):
                        return
                came = await _more(self._pump)
        except EdgelamError as error:
            yield event(openai_body(error))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._pump.close()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; it is cancelled, and None given, if the client goes away first. The body has been read, so
    nothing else can come from the client."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait({working, leaving})


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def run(request: Request) -> Response:
        try:
            return await handler(request)
        except EdgelamError as error:
            return openai_reply(error)

    return run
