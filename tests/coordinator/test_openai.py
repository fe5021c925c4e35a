"""The OpenAI door as its clients see it: shapes, streams, errors. What the stages say is written down by the tests.

The official client is used wherever it does not get in the way.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from coordinator.api import make_app
from coordinator.bodies import MAX_BODY_BYTES
from coordinator.hub import Hub
from coordinator.inference.requests import GenerateRequest
from coordinator.openai import door as door_module
from coordinator.openai.bodies import ChatBody, Settings, TextBody
from coordinator.rounds.door import JobsDoor
from coordinator.service import Coordinator
from tests.coordinator.memory_site import SITE, make_coordinator, until
from tests.coordinator.test_serving import FakePrepared, FakeTokenizer
from wire.errors import Busy, EdgelamError, Refused, Unreachable
from wire.memory import MemoryBroker, MemoryTransport

KEY = "a-site-key"
HERE = "http://127.0.0.1:8571"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "tiny", "prompt": "abc"}
Events = list[dict[str, Any]]

START = {"event": "start", "deployment": "tiny", "epoch": 3, "prompt_tokens": 4}


def tokens(*texts: str) -> Events:
    return [{"event": "token", "id": 1, "text": text} for text in texts]


def end(reason: str) -> dict[str, Any]:
    return {"event": "end", "finish_reason": reason}


class ChatTokenizer(FakeTokenizer):
    has_chat_template = True

    def chat(self, messages: Any) -> list[int]:
        return [ord(letter) for message in messages for letter in message["content"]]


class Operations:
    """Knows one model, at any precision."""

    def __init__(self) -> None:
        self.preparing = self
        self.prepared = FakePrepared()
        self.prepared.tokenizer = ChatTokenizer()

    async def prepare(self, _model: str, _precision: str, _progress: Any, _adapters: Any = ()) -> Any:
        return self.prepared


class Script:
    """A Serving that gives the events that a test wrote down; None is a pause until `go_on`."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any] | None] = [START, *tokens("he", "llo"), end("length")]
        self.failure: Exception | None = None
        self.asked: list[GenerateRequest] = []
        self.go_on = asyncio.Event()
        self.closed = 0
        self.live = self.waiting = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(request)
        try:
            for event in self.events:
                if event is None:
                    await self.go_on.wait()
                else:
                    yield event
            if self.failure is not None:
                raise self.failure
        finally:
            self.closed += 1


class House:
    """An app on a coordinator that knows nobody, and clients of it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.serving = Script()
        self.operations = Operations()
        self.app = make_app(coordinator, self.operations, self.serving, None, KEY)  # type: ignore[arg-type]

    def client(self, host: str = "127.0.0.1") -> TestClient:
        return TestClient(self.app, base_url=HERE, client=(host, 40000), raise_server_exceptions=False)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.client().post(path, json=body)

    def ask(self, call: Callable[[openai.AsyncOpenAI], Awaitable[Any]], host: str = "127.0.0.1", key: str = KEY) -> Any:
        return asyncio.run(asked(self.app, call, host, key))


async def asked(
    app: ASGIApp, call: Callable[[openai.AsyncOpenAI], Awaitable[Any]], host: str = "127.0.0.1", key: str = KEY
) -> Any:
    """What the official client gives."""
    transport = httpx2.ASGITransport(app, client=(host, 40000), raise_app_exceptions=False)
    http = httpx2.AsyncClient(transport=transport)
    async with openai.AsyncOpenAI(base_url=f"{HERE}/v1", api_key=key, http_client=http, max_retries=0) as client:
        return await call(client)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setenv("EDGELAM_CACHE", str(tmp_path / "cache"))
    loop = asyncio.new_event_loop()
    hub = Hub(MemoryTransport(MemoryBroker(), "coordinator"), SITE, "c0ffee", loop)
    coordinator = make_coordinator(hub, tmp_path)
    coordinator.journal.open()
    yield House(coordinator)
    coordinator.close()
    loop.close()


def data_of(response: Any) -> list[Any]:
    """The events of a stream; `[DONE]` as it is."""
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    found = [block.removeprefix("data: ") for block in blocks if not block.startswith(":")]
    assert all(block.startswith(("data: ", ":")) and "\n" not in block for block in blocks)
    return [event if event == "[DONE]" else json.loads(event) for event in found]


# Answers.


def test_a_whole_chat_answer(house: House) -> None:
    body = house.post("/v1/chat/completions", CHAT).json()
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "tiny"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert choice["finish_reason"] == "length" and choice["index"] == 0
    assert body["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}


def test_a_whole_completion(house: House) -> None:
    house.serving.events[-1] = end("stop")
    body = house.post("/v1/completions", TEXT).json()
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}]


def test_a_streamed_chat_answer(house: House) -> None:
    first, *pieces, last, done = data_of(house.post("/v1/chat/completions", CHAT | {"stream": True}))
    assert done == "[DONE]"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [piece["choices"][0]["delta"]["content"] for piece in pieces] == ["he", "llo"]
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length"
    assert {chunk["id"] for chunk in (first, *pieces, last)} == {first["id"]}
    assert {chunk["object"] for chunk in (first, *pieces, last)} == {"chat.completion.chunk"}
    assert all("usage" not in chunk for chunk in (first, *pieces, last))


def test_a_streamed_completion(house: House) -> None:
    *pieces, last, _ = data_of(house.post("/v1/completions", TEXT | {"stream": True}))
    assert [piece["choices"][0]["text"] for piece in pieces] == ["he", "llo"]
    assert last["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}


@pytest.mark.parametrize(("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_counts_come_at_the_end_of_a_stream_if_they_are_asked_for(
    path: str, body: dict[str, Any], house: House
) -> None:
    asked_for = body | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, done = data_of(house.post(path, asked_for))
    assert done == "[DONE]" and last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}
    assert all(chunk["usage"] is None for chunk in chunks)


def test_a_stop_string_cuts_the_answer_and_ends_the_request(house: House) -> None:
    house.serving.events = [START, *tokens("one E", "ND", " two"), None]
    body = house.post("/v1/chat/completions", CHAT | {"stop": ["END"]}).json()
    assert body["choices"][0]["message"]["content"] == "one "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 2, "what came after it was never generated"
    assert house.serving.closed == 1
    figures = house.client().get("/metrics").text
    assert 'edgelam_requests_total{outcome="stop"} 1.0' in figures, "not one that was given up"


def test_what_was_held_back_for_a_stop_string_comes_at_the_end(house: House) -> None:
    house.serving.events = [START, *tokens("one E"), end("length")]
    *_, piece, _, _ = data_of(house.post("/v1/completions", TEXT | {"stop": "END", "stream": True}))
    assert piece["choices"][0]["text"] == "E"


def test_events_that_are_not_known_are_comments_that_clients_skip(house: House) -> None:
    pause = {"event": "pause", "reason": "board2 is gone\ndata: {}\n\n", "given": 2}
    resume = {"event": "resume", "pause_s": 1.5, "epoch": 7, "boards": ["board1"], "reason": "board2 is gone"}
    house.serving.events = [
        {"event": "status", "text": "packing"}, START, *tokens("he"), pause, resume, {"event": "new"},
        *tokens("llo"), end("stop"),
    ]  # fmt: skip
    response = house.post("/v1/chat/completions", CHAT | {"stream": True})
    assert ": packing\n\n" in response.text and ": new\n\n" in response.text
    assert ": board2 is gone data: {}\n\n" in response.text
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in data_of(response)[:-1])
    assert said == "hello"
    assert house.post("/v1/chat/completions", CHAT).json()["choices"][0]["message"]["content"] == "hello"


def test_a_quiet_stream_begins_after_a_while_and_shows_that_it_lives(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door_module, "QUIET_S", 0.05)
    monkeypatch.setattr(door_module, "REMARK_PERIOD_S", 0.02)
    house.serving.events.insert(0, None)

    async def play() -> None:
        sent: list[Any] = []
        house.serving.go_on = asyncio.Event()
        work = asyncio.ensure_future(call(house.app, "/v1/chat/completions", CHAT | {"stream": True}, sent))
        await until(lambda: len(sent) > 4, "comments")
        assert sent[0]["status"] == 200 and all(part["body"] == b": waiting\n\n" for part in sent[1:4])
        house.serving.go_on.set()
        await work
        assert sent[-2]["body"].endswith(b"[DONE]\n\n")

    asyncio.run(asyncio.wait_for(play(), 10))


async def call(
    app: ASGIApp, path: str, body: dict[str, Any], sent: list[Any], gone: asyncio.Event | None = None
) -> None:
    """One POST by hand; the client goes away when `gone` is set. `sent` gets what the app sends."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    await app({**scope, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 1)}, receive, send)


def test_the_answer_may_take_what_is_left_of_the_context(house: House) -> None:
    house.post("/v1/completions", TEXT | {"edgelam": {"context_tokens": 64}})
    house.post("/v1/completions", TEXT | {"edgelam": {"context_tokens": 64}, "max_tokens": 61})
    assert [(request.max_tokens, request.context_tokens) for request in house.serving.asked] == [(61, 64)] * 2


# Errors.


def test_a_prompt_beyond_the_context_is_refused_with_openais_code(house: House) -> None:
    for body in (TEXT | {"max_tokens": 62}, TEXT | {"prompt": "x" * 64}):
        response = house.post("/v1/completions", body | {"edgelam": {"context_tokens": 64}})
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
        assert "try:" in error["message"]
    assert not house.serving.asked


def test_a_chat_with_a_model_that_has_no_template_is_refused(house: House) -> None:
    house.operations.prepared.tokenizer = FakeTokenizer()
    error = house.post("/v1/chat/completions", CHAT).json()["error"]
    assert "no chat template" in error["message"] and "/v1/completions" in error["message"]
    assert (error["param"], error["type"]) == ("messages", "invalid_request_error")
    assert house.post("/v1/completions", TEXT).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "kind", "status"),
    [
        (Busy("busy", try_="later"), openai.RateLimitError, 429),
        (Refused("no", try_="later"), openai.BadRequestError, 400),
        (Unreachable("no board", try_="later"), openai.InternalServerError, 503),
        (EdgelamError("broken", try_="later"), openai.InternalServerError, 500),
        (OSError(28, "later: disk"), openai.InternalServerError, 500),
    ],
)
def test_what_is_refused_before_the_first_event_has_its_status(
    failure: Exception, kind: type[openai.APIStatusError], status: int, stream: bool, house: House
) -> None:
    house.serving.events = [{"event": "status", "text": "packing"}]
    house.serving.failure = failure
    with pytest.raises(kind) as raised:
        house.ask(lambda client: client.chat.completions.create(**CHAT, stream=stream))  # type: ignore[call-overload]
    assert raised.value.status_code == status
    assert "later" in raised.value.message
    assert ("retry-after" in raised.value.response.headers) == (status == 429)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event(house: House) -> None:
    house.serving.events = [START, *tokens("he")]
    house.serving.failure = Unreachable("board2 went away", try_="again")
    *chunks, last = data_of(house.post("/v1/chat/completions", CHAT | {"stream": True}))
    assert last["error"]["message"] == "board2 went away (try: again)" and last["error"]["code"] == "unreachable"
    assert chunks[-1]["choices"][0]["delta"] == {"content": "he"}

    async def read(client: openai.AsyncOpenAI) -> None:
        async for _ in await client.chat.completions.create(**CHAT, stream=True):  # type: ignore[call-overload]
            pass

    with pytest.raises(openai.APIError, match="board2 went away"):
        house.ask(read)


def test_an_answer_that_ends_without_its_end_is_an_error(house: House) -> None:
    house.serving.events = [START, *tokens("he")]
    assert house.post("/v1/chat/completions", CHAT).status_code == 500
    *_, last = data_of(house.post("/v1/chat/completions", CHAT | {"stream": True}))
    assert "ended early" in last["error"]["message"]


def test_an_answer_that_ends_before_it_begins_is_an_error_at_once(house: House) -> None:
    house.serving.events = [{"event": "status", "text": "packing"}]
    began_s = time.monotonic()
    [last] = data_of(house.post("/v1/chat/completions", CHAT | {"stream": True}))
    assert "ended early" in last["error"]["message"]
    assert time.monotonic() - began_s < door_module.QUIET_S / 2


def test_a_wrong_field_is_a_bad_request_that_names_it(house: House) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        house.ask(lambda client: client.chat.completions.create(**CHAT, n=2))  # type: ignore[call-overload]
    assert raised.value.param == "n"
    with pytest.raises(openai.BadRequestError) as raised:
        house.ask(lambda client: client.completions.create(model="tiny", prompt=[1, 2, 3]))
    assert raised.value.param == "prompt"
    assert not house.serving.asked


def test_a_body_above_the_cap_is_refused(house: House) -> None:
    response = house.client().post(
        "/v1/completions", content=b" " * (MAX_BODY_BYTES + 1), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400 and str(MAX_BODY_BYTES) in response.json()["error"]["message"]


def test_a_wrong_key_is_an_authentication_error_in_openais_shape(house: House) -> None:
    with pytest.raises(openai.AuthenticationError) as raised:
        house.ask(lambda client: client.models.list(), host="10.0.0.9", key="wrong")
    assert raised.value.code == "invalid_api_key"
    assert house.ask(lambda client: client.models.list(), host="10.0.0.9").data == []
    response = house.client("10.0.0.9").get("/v1/status")
    assert response.status_code == 401 and response.json()["event"] == "error", "our own paths keep our own shape"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/embeddings", 405), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/responses", 404)],
)
def test_what_is_not_served_is_said_in_openais_shape(method: str, path: str, status: int, house: House) -> None:
    response = house.client().request(method, path, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_an_unknown_model_is_not_found(house: House) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        house.ask(lambda client: client.models.retrieve("hf:org/nope"))
    assert raised.value.code == "model_not_found"


# The page that describes it.


def test_every_path_stands_in_the_document_and_no_other(house: House) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
    documented = set(re.findall(r"^\| (GET|POST|DELETE) \| `(\S+)` \|", page, re.MULTILINE))
    routes = [*house.app._app.routes, *JobsDoor(None).routes()]  # type: ignore[attr-defined,arg-type]
    served = {(method, route.path.replace(":path", "")) for route in routes for method in route.methods - {"HEAD"}}
    assert documented == served


def test_every_field_that_is_served_stands_in_the_document() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "http.md").read_text()
    fields = {*ChatBody.__struct_fields__, *TextBody.__struct_fields__} - {"edgelam", "stream_options"}
    assert [field for field in fields if f"`{field}`" not in page] == []
    assert [field for field in Settings.__struct_fields__ if f'"{field}": ' not in page] == []
