"""The HTTP door: every route answers in one shape, errors too, and nobody gets in from outside without the site key."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from starlette.testclient import TestClient

from coordinator import api
from coordinator.api import make_app
from coordinator.bodies import MAX_BODY_BYTES
from coordinator.client import raise_told
from coordinator.guard import door_names
from coordinator.hub import Hub
from coordinator.inference.requests import GenerateRequest
from coordinator.journal import DeployRequest
from coordinator.lines import Lines, with_progress
from coordinator.planning.planner import Candidate
from coordinator.rounds import door as jobs
from coordinator.service import Coordinator
from tests.coordinator.memory_site import SITE, make_coordinator
from tests.coordinator.plans import plan_of
from tests.coordinator.test_deployments import record_of
from tests.planning import boards
from wire import topics
from wire.errors import CorruptData, Degraded, EdgelamError, Refused, Unreachable, UsageError
from wire.memory import MemoryBroker, MemoryTransport
from wire.messages import DeviceState, encode

KEY = "a-site-key"
HERE = "http://127.0.0.1:8571"
NAMES = frozenset({"localhost", "shelf", "shelf.local"})
FAILURES = (
    (UsageError, 400), (Refused, 409), (Unreachable, 503), (Degraded, 503), (CorruptData, 500), (EdgelamError, 500),
)  # fmt: skip


class Prepared(NamedTuple):
    packed: Any


class Packed(NamedTuple):
    graph: Any


class FakeOperations:
    """Says what it is asked; raises `failure` if there is one."""

    def __init__(self) -> None:
        self.preparing = self
        self.failure: BaseException | None = None
        self.asked: list[Any] = []
        self.candidates = [boards.board("a"), boards.board("b")]
        self.graph = boards.graph(4)

    def _take(self, what: Any, progress: Callable[[str], None] = lambda _text: None) -> None:
        self.asked.append(what)
        progress("first")
        progress("second")
        if self.failure is not None:
            raise self.failure

    async def plan(self, request: DeployRequest, progress: Callable[[str], None]) -> Any:
        from coordinator.planning.planner import make_plan

        self._take(request, progress)
        plan = make_plan(self.graph, self.candidates, boards.request(), boards.address)
        return plan, Prepared(Packed(self.graph)), self.candidates

    async def boards(self, request: DeployRequest, progress: Callable[[str], None]) -> Any:
        self._take(request, progress)
        return self.candidates

    async def measure(self, request: DeployRequest, progress: Callable[[str], None]) -> list[str]:
        self._take(request, progress)
        return ["b"]

    async def deploy(self, request: DeployRequest, progress: Callable[[str], None]) -> Any:
        self._take(request, progress)
        return record_of(plan_of("a", "b"))

    async def remove(self, name: str) -> None:
        self._take(name)


class FakeServing:
    def __init__(self) -> None:
        self.asked: list[GenerateRequest] = []
        self.failure: BaseException | None = None
        self.closed = 0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(request)
        try:
            yield {"event": "start", "deployment": "tiny", "epoch": 3, "prompt_tokens": 1}
            if self.failure is not None:
                raise self.failure
            yield {"event": "token", "id": 1, "text": "é\n"}
            yield {"event": "end", "finish_reason": "stop"}
        finally:
            self.closed += 1


class Door:
    """An app on a coordinator that knows one board, and clients from anywhere."""

    def __init__(self, coordinator: Coordinator, key: str) -> None:
        self.coordinator = coordinator
        self.operations = FakeOperations()
        self.serving = FakeServing()
        self.app = make_app(coordinator, self.operations, self.serving, None, key, NAMES)  # type: ignore[arg-type]

    def client(self, host: str = "127.0.0.1", key: str = "") -> TestClient:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        return TestClient(self.app, base_url=HERE, client=(host, 40000), headers=headers, raise_server_exceptions=False)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    loop = asyncio.new_event_loop()
    hub = Hub(MemoryTransport(MemoryBroker(), "coordinator"), SITE, "c0ffee", loop)
    made = make_coordinator(hub, tmp_path)
    made.journal.open()
    state = DeviceState(state="online", boot="ab", since_unix=0.0)
    made._on_message(topics.STATE.on(SITE, "pi5"), encode(state))
    made._on_message(topics.PROFILE.on(SITE, "pi5"), msgspec.json.encode(boards.profile("pi5")))
    yield made
    made.close()
    loop.close()


@pytest.fixture
def door(coordinator: Coordinator) -> Door:
    return Door(coordinator, "")


def lines(response: Any) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in response.text.splitlines()]


def assert_error(body: dict[str, Any], kind: type[EdgelamError]) -> None:
    assert set(body) == {"event", "message", "try", "exit_code"}
    assert body["event"] == "error"
    assert body["exit_code"] == int(kind.exit_code)
    with pytest.raises(EdgelamError) as raised:
        raise_told(body)
    assert raised.value.message


# Routes.


def test_status_devices_notices_and_models_name_their_schema(door: Door) -> None:
    client = door.client()
    status = client.get("/v1/status").json()
    assert (status["schema"], status["site"], status["devices_known"]) == ("edgelam.status/1", SITE, 1)
    devices = client.get("/v1/devices").json()
    assert devices["schema"] == "edgelam.devices/1"
    assert [row["device"] for row in devices["devices"]] == ["pi5"]
    assert client.get("/v1/notices").json()["schema"] == "edgelam.notices/1"
    models = client.get("/v1/catalog").json()
    assert models["schema"] == "edgelam.models/1"
    assert any("smollm2" in model["aliases"] for model in models["models"])


def test_a_profile_is_given_as_it_came(door: Door) -> None:
    response = door.client().get("/v1/profiles/pi5")
    assert msgspec.json.decode(response.content, type=boards.Profile) == boards.profile("pi5")


def test_a_device_without_profile_is_the_callers_mistake(door: Door) -> None:
    response = door.client().get("/v1/profiles/nobody")
    assert response.status_code == 400
    assert_error(response.json(), UsageError)


def test_a_plan_comes_after_its_status_lines_with_an_explanation(door: Door) -> None:
    first, second, last = lines(door.client().post("/v1/plan", json={"model": "tiny"}))
    assert first == {"event": "status", "text": "first"} and second["text"] == "second"
    assert last["event"] == "plan" and last["plan"]["stages"]
    assert all(isinstance(line, str) for line in last["explanation"])


def test_candidates_are_given_as_the_planner_sees_them(door: Door) -> None:
    last = lines(door.client().post("/v1/candidates", json={"model": "tiny"}))[-1]
    assert last["event"] == "candidates"
    assert msgspec.convert(last["candidates"], type=list[Candidate]) == door.operations.candidates


def test_measuring_names_who_did_not(door: Door) -> None:
    assert lines(door.client().post("/v1/measure", json={"model": "tiny"}))[-1] == {
        "event": "measured",
        "unmeasured": ["b"],
    }


def test_a_deployment_is_made_and_removed(door: Door) -> None:
    client = door.client()
    last = lines(client.post("/v1/deployments", json={"model": "tiny", "boards_at_least": 2}))[-1]
    assert last["event"] == "deployed" and last["plan"]["deployment"] == "tiny"
    assert client.delete("/v1/deployments/tiny").json() == {"removed": "tiny"}
    assert door.operations.asked == [DeployRequest(model="tiny", boards_at_least=2), "tiny"]


def test_an_answer_streams_as_lines(door: Door) -> None:
    events = lines(door.client().post("/v1/generate", json={"model": "tiny", "prompt": "x"}))
    assert [event["event"] for event in events] == ["start", "token", "end"]
    assert events[1]["text"] == "é\n"
    assert door.serving.asked == [GenerateRequest(model="tiny", prompt="x")]
    assert door.serving.closed == 1


def test_every_documented_route_is_there_and_no_other(door: Door) -> None:
    documented = {
        (method, path)
        for line in f"{api.__doc__}\n{jobs.__doc__}".splitlines()
        if line.startswith("    ") and (words := line.split()) and words[0] in ("GET", "POST", "DELETE")
        for method, path in [words[:2]]
    }
    routes = [
        *api.Api(door.coordinator, None, None, None).routes(),  # type: ignore[arg-type]
        *jobs.JobsDoor(None).routes(),  # type: ignore[arg-type]
    ]
    served = {(method, route.path) for route in routes for method in (route.methods or ()) if method != "HEAD"}
    assert served == documented


# Errors.


@pytest.mark.parametrize(("kind", "status"), FAILURES)
def test_a_plain_answer_gives_an_error_with_its_status(kind: type[EdgelamError], status: int, door: Door) -> None:
    door.operations.failure = kind("no", try_="yes")
    response = door.client().delete("/v1/deployments/tiny")
    assert response.status_code == status
    assert_error(response.json(), kind)


@pytest.mark.parametrize("path", ["/v1/plan", "/v1/candidates", "/v1/measure", "/v1/deployments"])
@pytest.mark.parametrize(("kind", "_status"), FAILURES)
def test_a_stream_ends_with_its_error(path: str, kind: type[EdgelamError], _status: int, door: Door) -> None:
    door.operations.failure = kind("no", try_="yes")
    *before, last = lines(door.client().post(path, json={"model": "tiny"}))
    assert [event["event"] for event in before] == ["status", "status"]
    assert_error(last, kind)


def test_an_error_in_the_middle_of_an_answer_is_its_last_line(door: Door) -> None:
    door.serving.failure = Unreachable("gone", try_="again")
    start, last = lines(door.client().post("/v1/generate", json={"model": "tiny", "prompt": "x"}))
    assert start["event"] == "start"
    assert_error(last, Unreachable)
    assert door.serving.closed == 1


@pytest.mark.parametrize("path", ["/v1/plan", "/v1/deployments", "/v1/generate"])
def test_an_error_that_nobody_foresaw_is_told_and_logged(
    path: str, door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    door.operations.failure = door.serving.failure = OSError(28, "No space left on device")
    with caplog.at_level(logging.ERROR):
        last = lines(door.client().post(path, json={"model": "tiny", "prompt": "x"}))[-1]
    assert_error(last, EdgelamError)
    assert "No space left" in last["message"] and "log" in last["try"]
    assert any(entry.exc_info for entry in caplog.records)


def test_an_unforeseen_error_of_a_plain_answer_has_the_same_shape(door: Door) -> None:
    door.operations.failure = OSError(28, "No space left on device")
    response = door.client().delete("/v1/deployments/tiny")
    assert response.status_code == 500
    assert_error(response.json(), EdgelamError)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v2/status", 404), ("POST", "/v1/status", 405), ("GET", "/v1/generate", 405)],
)
def test_a_wrong_address_has_the_shape_of_an_error(method: str, path: str, status: int, door: Door) -> None:
    response = door.client().request(method, path)
    assert response.status_code == status
    assert_error(response.json(), UsageError)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"null", b"{}", b'{"model": 3}', b'{"model": null}', b"\xff\xfe",
        b'{"model": "x", "precision": 4}', b'{"model": "x", "more": ' + b"[" * 200_000, b'{"model": "\\ud800"}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/plan", "/v1/measure", "/v1/deployments", "/v1/generate"])
def test_a_body_that_is_no_request_is_refused(path: str, body: bytes, door: Door) -> None:
    response = door.client().post(path, content=body)
    assert response.status_code == 400, response.text
    assert_error(response.json(), UsageError)
    assert not door.operations.asked and not door.serving.asked


@pytest.mark.parametrize("context", [b'"4"', b"1e999", b"4.5"])
@pytest.mark.parametrize("path", ["/v1/plan", "/v1/deployments", "/v1/generate"])
def test_a_number_that_is_none_is_refused(path: str, context: bytes, door: Door) -> None:
    response = door.client().post(path, content=b'{"model": "x", "prompt": "y", "context_tokens": ' + context + b"}")
    assert response.status_code == 400, response.text
    assert_error(response.json(), UsageError)
    assert not door.operations.asked and not door.serving.asked


def test_a_body_above_the_cap_is_refused_and_one_at_the_cap_is_read(door: Door) -> None:
    client = door.client()
    frame = b'{"model": "tiny", "prompt": ""}'
    whole = frame[:-2] + b"x" * (MAX_BODY_BYTES - len(frame)) + frame[-2:]
    assert len(whole) == MAX_BODY_BYTES
    assert lines(client.post("/v1/generate", content=whole))[-1]["event"] == "end"
    response = client.post("/v1/generate", content=whole + b" ")
    assert response.status_code == 400
    assert_error(response.json(), UsageError)


def test_a_body_without_end_is_refused_at_the_cap(door: Door) -> None:
    read = 0
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 65536
        return {"type": "http.request", "body": bytes(65536), "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/plan", "headers": headers, "query_string": b""}
    asyncio.run(door.app(scope | {"client": ("127.0.0.1", 1), "server": ("h", 1)}, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 400
    assert read <= MAX_BODY_BYTES + 2 * 65536


# Artifacts.

DATA = bytes(range(256)) * 40


@pytest.fixture
def artifact(coordinator: Coordinator) -> str:
    return f"/v1/artifacts/{coordinator.artifacts.add_bytes(DATA, 'block.onnx').digest}"


def test_an_artifact_is_given_whole(door: Door, artifact: str) -> None:
    response = door.client().get(artifact)
    assert response.status_code == 200
    assert artifact.endswith(hashlib.sha256(response.content).hexdigest())
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["etag"].strip('"') == artifact.rpartition("/")[2]


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [("0-9", 0, 10), ("100-", 100, len(DATA)), ("-7", len(DATA) - 7, len(DATA)), ("5-999999", 5, len(DATA))],
)
def test_an_artifact_is_given_in_ranges(asked: str, first: int, end: int, door: Door, artifact: str) -> None:
    response = door.client().get(artifact, headers={"Range": f"bytes={asked}"})
    assert response.status_code == 206
    assert response.content == DATA[first:end]
    assert response.headers["content-range"] == f"bytes {first}-{end - 1}/{len(DATA)}"


def test_the_bytes_that_boards_fetch_are_counted(door: Door, artifact: str, coordinator: Coordinator) -> None:
    client = door.client()
    client.get(artifact)
    client.get(artifact, headers={"Range": "bytes=0-9"})
    client.get("/v1/status")
    assert coordinator.artifacts.handed_bytes == len(DATA) + 10


def test_an_interrupted_fetch_goes_on_only_with_the_same_file(door: Door, artifact: str) -> None:
    client = door.client()
    etag = client.get(artifact).headers["etag"]
    rest = client.get(artifact, headers={"Range": "bytes=100-", "If-Range": etag})
    assert (rest.status_code, rest.content) == (206, DATA[100:])
    other = client.get(artifact, headers={"Range": "bytes=100-", "If-Range": '"another"'})
    assert (other.status_code, other.content) == (200, DATA)


@pytest.mark.parametrize(("asked", "status"), [("bytes=99999-", 416), ("bytes=9-3", 400), ("bytes=a-b", 400)])
def test_a_range_that_is_none_is_refused(asked: str, status: int, door: Door, artifact: str) -> None:
    assert door.client().get(artifact, headers={"Range": asked}).status_code == status


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:" + "0" * 64, "sha256:xyz", "x", "sha256:" + "A" * 64, "..%2f..%2fjournal.sqlite", "a" * 5000,
        "%00", "sha256:" + "0" * 64 + "%0a",
    ],
)  # fmt: skip
def test_a_digest_that_is_not_known_or_none_is_not_found(digest: str, door: Door, artifact: str) -> None:
    response = door.client().get(f"/v1/artifacts/{digest}")
    assert response.status_code == 404
    assert response.json()["event"] == "error"
    assert len(response.text) < 500


# Who may come in.


def test_on_loopback_no_key_is_needed(coordinator: Coordinator) -> None:
    door = Door(coordinator, KEY)
    for host in ("127.0.0.1", "127.8.8.8", "::1"):
        assert door.client(host).get("/v1/status").status_code == 200


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1], KEY.upper()])
@pytest.mark.parametrize("host", ["10.0.0.9", "192.0.2.1", "fe80::1", "not-an-address", "127.0.0.1.evil.example"])
def test_from_elsewhere_nobody_comes_in_without_the_key(host: str, key: str, coordinator: Coordinator) -> None:
    door = Door(coordinator, KEY)
    for method, path in [("GET", "/v1/status"), ("POST", "/v1/generate"), ("GET", "/v1/artifacts/x"), ("GET", "/")]:
        response = door.client(host, key).request(method, path)
        assert response.status_code == 401
        assert_error(response.json(), Refused)
    assert not door.serving.asked


def test_from_elsewhere_the_key_opens(coordinator: Coordinator) -> None:
    assert Door(coordinator, KEY).client("10.0.0.9", KEY).get("/v1/status").status_code == 200


def test_a_key_in_another_dress_does_not_open(coordinator: Coordinator) -> None:
    client = Door(coordinator, KEY).client("10.0.0.9")
    for value in (KEY, f"Basic {KEY}", f"bearer {KEY}", f"Bearer  {KEY}"):
        assert client.get("/v1/status", headers={"Authorization": value}).status_code == 401
    assert client.get(f"/v1/status?key={KEY}", headers={"X-Forwarded-For": "127.0.0.1"}).status_code == 401


def test_without_a_key_the_door_listens_on_loopback_only_so_everyone_is_local(door: Door) -> None:
    assert door.client("127.0.0.1").get("/v1/status").status_code == 200


# Pages in a browser.


def visit(door: Door, **headers: str) -> Any:
    """What a browser on this machine sends for a page: the answer to a request that would run a prompt."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return door.client().post("/v1/generate", json={"model": "tiny", "prompt": "x"}, headers=sent)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8571", "127.0.0.1", "localhost:8571", "LOCALHOST", "[::1]:8571", "192.168.7.2:8571", "10.0.0.9:80",
        "shelf:8571", "Shelf.local", "shelf.local.:8571", "[fe80::1]:8571",
    ],
)  # fmt: skip
def test_the_door_opens_under_every_address_and_every_name_of_this_machine(host: str, door: Door) -> None:
    assert visit(door, host=host).status_code == 200
    assert visit(door, host=host, origin=f"http://{host}").status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8571", "127.0.0.1.evil.example:8571", "localhost.evil.example", "shelf.evil",
        "me@127.0.0.1", "127.0.0.1@evil.example", "", ":8571", "127.0.0.1:x", "127.0.0.1/..", "[::1", "x" * 5000,
        "2130706433",
    ],
)  # fmt: skip
def test_a_name_that_somebody_pointed_at_this_machine_does_not_open(host: str, door: Door) -> None:
    for response in (visit(door, host=host), visit(door, host=host, origin=f"http://{host}")):
        assert response.status_code == 403
        assert_error(response.json(), Refused)
        assert len(response.text) < 500
    assert door.client().get("/v1/devices", headers={"Host": host}).status_code == 403
    assert not door.serving.asked


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example", "null", "http://127.0.0.1:3000", "http://127.0.0.1", "http://localhost:8571", "file://",
        "https://evil.example:8571", "127.0.0.1:8571", "", "http://127.0.0.1:8571.evil.example", "data://127.0.0.1:8571",
    ],
)  # fmt: skip
def test_a_page_of_another_site_can_not_drive_the_coordinator(origin: str, door: Door) -> None:
    response = visit(door, origin=origin)
    assert response.status_code == 403
    assert_error(response.json(), Refused)
    assert door.client().delete("/v1/deployments/tiny", headers={"Origin": origin}).status_code == 403
    assert not door.serving.asked and not door.operations.asked


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
)
def test_what_a_browser_says_of_a_requests_origin_is_heeded(site: str, status: int, door: Door) -> None:
    assert door.client().get("/v1/status", headers={"Sec-Fetch-Site": site}).status_code == status


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "application/jsonp"],
)
def test_what_a_form_can_send_is_no_request(kind: str, door: Door) -> None:
    body = b'{"model": "tiny", "prompt": "x"}'
    response = door.client().post("/v1/generate", content=body, headers={"Content-Type": kind})
    assert response.status_code == 415
    assert_error(response.json(), UsageError)
    assert not door.serving.asked


def test_json_may_name_its_encoding(door: Door) -> None:
    assert visit(door, content_type="Application/JSON; charset=utf-8").status_code == 200


def test_a_preflight_gets_no_leave(door: Door) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    response = door.client().options("/v1/generate", headers=asked)
    assert response.status_code == 403
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_who_sends_the_site_key_may_use_any_name(coordinator: Coordinator) -> None:
    door = Door(coordinator, KEY)
    named = {"Host": "coordinator.lan:8571"}
    assert door.client("10.0.0.9", KEY).get("/v1/status", headers=named).status_code == 200
    assert door.client("127.0.0.1").get("/v1/status", headers=named).status_code == 403


def test_the_names_of_this_machine_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Shelf.example.org")
    assert door_names("0.0.0.0") >= {"localhost", "shelf", "shelf.local", "shelf.example.org"}
    monkeypatch.setattr("socket.gethostname", lambda: "")
    assert "" not in door_names("127.0.0.1") and ".local" not in door_names("127.0.0.1")


# Clients that go away.


@pytest.mark.parametrize("where", ["in the middle of a wait", "while a line is being sent"])
def test_a_client_that_goes_away_closes_its_events_at_once(where: str) -> None:
    closed: list[str] = []

    async def inner() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield {"event": "start"}
            await asyncio.sleep(3600)
        finally:
            closed.append("inner")

    async def scenario() -> None:
        gone = asyncio.Event()

        async def receive() -> dict[str, Any]:
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                gone.set()
                if where == "while a line is being sent":
                    await asyncio.sleep(3600)

        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        await asyncio.wait_for(Lines(inner())(scope, receive, send), 5)  # type: ignore[arg-type]
        assert closed == ["inner"], "before the response is over, not when the garbage collector comes"

    asyncio.run(scenario())


def test_a_client_that_goes_away_stops_the_work_behind_its_status_lines() -> None:
    ended: list[str] = []

    async def work(progress: Callable[[str], None]) -> dict[str, Any]:
        progress("working")
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append("work")
        return {}

    async def scenario() -> None:
        events = with_progress(work)
        assert await anext(events) == {"event": "status", "text": "working"}
        await events.aclose()
        await asyncio.sleep(0.01)
        assert ended == ["work"]

    asyncio.run(scenario())
