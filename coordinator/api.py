"""The coordinator's HTTP door.

    GET  /v1/status                 site, broker, deployments, counts
    GET  /v1/devices                one row per device
    GET  /v1/profiles/{device}      the device's profile
    GET  /v1/notices                latest notices
    GET  /v1/catalog                models that can be fetched by name
    POST /v1/plan                   DeployRequest -> plan and its explanation (NDJSON: status lines, then the plan)
    POST /v1/candidates             DeployRequest -> the boards that a plan would be made with (NDJSON)
    POST /v1/measure                MeasureRequest -> waits until all boards have measured the model's modules (NDJSON)
    POST /v1/deployments            DeployRequest -> put in force (NDJSON)
    DELETE /v1/deployments/{name}
    POST /v1/generate               GenerateRequest -> NDJSON stream of events
    POST /v1/inputs                 InputsRequest -> what a model that is no language model takes (NDJSON)
    POST /v1/items                  ItemsRequest -> NDJSON stream of events
    GET  /v1/artifacts/{digest}     file by digest, with ranges
    GET  /metrics                   for Prometheus (coordinator.metrics)

Beside it: jobs (coordinator.rounds.door), and a door for programs that speak OpenAI's HTTP (coordinator.openai.door).

NDJSON: one JSON object per line; an error is {"event": "error", "message", "try", "exit_code"}. Plain answers give
errors as the same object with an HTTP status. Bodies are sent as application/json. With a site key, every caller that
is not on this machine must send `Authorization: Bearer KEY`; pages in a browser are kept out (coordinator.guard).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from coordinator.bodies import body_of
from coordinator.calls import MeasureRequest
from coordinator.guard import LOOPBACK_NAMES, Guard
from coordinator.handed import Handed
from coordinator.inference.requests import GenerateRequest
from coordinator.inference.serve import Serving
from coordinator.items.requests import InputsRequest, ItemsRequest, answer_events, inputs_of
from coordinator.items.serve import ItemServing
from coordinator.journal import DeployRequest
from coordinator.lines import Lines, defect, guarded, with_progress
from coordinator.metrics import Metrics, Watched
from coordinator.openai.door import Door
from coordinator.openai.errors import reply_at
from coordinator.operations import Operations
from coordinator.planning.explain import explain
from coordinator.pump import pumped
from coordinator.replies import json_reply
from coordinator.service import Coordinator
from coordinator.view import device_rows, status_row
from models.catalog import entries
from wire.errors import UsageError
from wire.ids import is_digest


class Api:
    """Handlers; one instance per coordinator."""

    def __init__(
        self,
        coordinator: Coordinator,
        operations: Operations,
        serving: Serving,
        items: ItemServing,
    ) -> None:
        self.coordinator = coordinator
        self.operations = operations
        self.serving = serving
        self.items = items
        self.metrics = Metrics(coordinator, serving)

    async def status(self, _request: Request) -> Response:
        return json_reply(status_row(self.coordinator))

    async def devices(self, _request: Request) -> Response:
        return json_reply({"schema": "edgelam.devices/1", "devices": device_rows(self.coordinator)})

    async def profile(self, request: Request) -> Response:
        device = request.path_params["device"]
        profile = self.coordinator.profiles().get(device)
        if profile is None:
            raise UsageError(f"no profile of {device!r}", try_="edgelam devices")
        return json_reply(profile)

    async def notices(self, _request: Request) -> Response:
        return json_reply({"schema": "edgelam.notices/1", "notices": list(self.coordinator.notices)})

    async def catalog(self, _request: Request) -> Response:
        return json_reply({"schema": "edgelam.models/1", "models": [msgspec.to_builtins(entry) for entry in entries()]})

    async def plan(self, request: Request) -> Response:
        wanted = await body_of(request, DeployRequest)

        async def work(progress: Callable[[str], None]) -> dict[str, Any]:
            plan, prepared, candidates = await self.operations.preparing.plan(wanted, progress)
            lines = await asyncio.to_thread(explain, plan, prepared.packed.graph, candidates, time.time())
            return {"event": "plan", "plan": msgspec.to_builtins(plan), "explanation": list(lines)}

        return Lines(with_progress(work))

    async def candidates(self, request: Request) -> Response:
        wanted = await body_of(request, DeployRequest)

        async def work(progress: Callable[[str], None]) -> dict[str, Any]:
            boards = await self.operations.preparing.boards(wanted, progress)
            return {"event": "candidates", "candidates": msgspec.to_builtins(boards)}

        return Lines(with_progress(work))

    async def measure(self, request: Request) -> Response:
        wanted = await body_of(request, MeasureRequest)

        async def work(progress: Callable[[str], None]) -> dict[str, Any]:
            return {"event": "measured", "unmeasured": await self.operations.preparing.measure(wanted, progress)}

        return Lines(with_progress(work))

    async def deploy(self, request: Request) -> Response:
        wanted = await body_of(request, DeployRequest)

        async def work(progress: Callable[[str], None]) -> dict[str, Any]:
            record = await self.operations.deploy(wanted, progress)
            return {"event": "deployed", "plan": msgspec.to_builtins(record.plan)}

        return Lines(with_progress(work))

    async def undeploy(self, request: Request) -> Response:
        await self.operations.remove(request.path_params["name"])
        return json_reply({"removed": request.path_params["name"]})

    async def generate(self, request: Request) -> Response:
        wanted = await body_of(request, GenerateRequest)
        return Lines(pumped(self.metrics.watch(self.serving.generate(wanted), Watched())))

    async def answer_items(self, request: Request) -> Response:
        wanted = await body_of(request, ItemsRequest)
        return Lines(pumped(answer_events(self.items, wanted)))

    async def inputs(self, request: Request) -> Response:
        wanted = await body_of(request, InputsRequest)
        return Lines(with_progress(lambda say: inputs_of(self.operations, self.items.labels, wanted, say)))

    async def artifact(self, request: Request) -> Response:
        digest = request.path_params["digest"]
        path = self.coordinator.artifacts.path_of(digest) if is_digest(digest) else None
        if path is None:
            return json_reply(
                {"event": "error", "message": f"no artifact {digest[:80]}", "try": "", "exit_code": 1}, 404
            )
        return Handed(path, digest, self.coordinator.artifacts.handed)

    def routes(self) -> list[Route]:
        def route(path: str, handler: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
            return Route(path, guarded(handler), methods=[method])

        return [
            route("/v1/status", self.status),
            route("/v1/devices", self.devices),
            route("/v1/profiles/{device}", self.profile),
            route("/v1/notices", self.notices),
            route("/v1/catalog", self.catalog),
            route("/v1/plan", self.plan, "POST"),
            route("/v1/candidates", self.candidates, "POST"),
            route("/v1/measure", self.measure, "POST"),
            route("/v1/deployments", self.deploy, "POST"),
            route("/v1/deployments/{name}", self.undeploy, "DELETE"),
            route("/v1/generate", self.generate, "POST"),
            route("/v1/inputs", self.inputs, "POST"),
            route("/v1/items", self.answer_items, "POST"),
            route("/v1/artifacts/{digest}", self.artifact),
            route("/metrics", self.metrics.page),
        ]


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    words = UsageError(f"{request.method} {request.url.path[:200]}: no such thing here", try_="GET /v1/status")
    return reply_at(request.url.path, words, status)


async def _failed(request: Request, error: Exception) -> Response:
    """Starlette raises the error again afterwards, so the server logs it."""
    return reply_at(request.url.path, defect(error), 500)


def make_app(
    coordinator: Coordinator,
    operations: Operations,
    serving: Serving,
    items: ItemServing,
    site_key: str,
    names: frozenset[str] = LOOPBACK_NAMES,
    more: Sequence[Route] = (),
) -> ASGIApp:
    """The door. `names`: under which names of this machine it is served (coordinator.guard); `more`: paths beside those
    of this module."""
    api = Api(coordinator, operations, serving, items)
    app = Starlette(
        routes=[*api.routes(), *more, *Door(coordinator, operations, serving, items, api.metrics).routes()],
        exception_handlers={HTTPException: _no_such_route, Exception: _failed},
    )
    return Guard(app, site_key, names)
