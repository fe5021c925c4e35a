"""Jobs over HTTP:

    POST /v1/jobs                   coordinator.rounds.job.Job -> begin to train (NDJSON: what happens, until its end)
    GET  /v1/jobs                   one row per job
    POST /v1/jobs/{name}/follow     what happens in it (NDJSON)
    POST /v1/jobs/{name}/stop       end it where it stands -> its row
    POST /v1/jobs/{name}/resume     go on there -> its row
    GET  /v1/jobs/{name}/rounds     its rounds (coordinator.rounds.report)
    GET  /v1/jobs/{name}/{file}     a file of its adapter

As the other paths of the coordinator's door (coordinator.api).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.bodies import body_of
from coordinator.lines import Lines, guarded, with_progress
from coordinator.replies import json_reply
from coordinator.rounds.job import Job
from coordinator.rounds.jobfile import checked
from coordinator.rounds.tuning import Tuning


class JobsDoor:
    """Handlers; one instance per coordinator."""

    def __init__(self, tuning: Tuning) -> None:
        self._tuning = tuning

    async def begin(self, request: Request) -> Response:
        job = checked(await body_of(request, Job))
        return Lines(self._begun(job))

    async def _begun(self, job: Job) -> AsyncGenerator[dict[str, Any], None]:
        async def work(progress: Callable[[str], None]) -> dict[str, Any]:
            await self._tuning.begin(job, progress)
            return {"event": "begun", "job": job.name}

        async with aclosing(with_progress(work)) as events:
            async for event in events:
                yield event
        async with aclosing(self._tuning.follow(job.name)) as events:
            async for event in events:
                yield event

    async def all(self, _request: Request) -> Response:
        return json_reply({"schema": "edgelam.jobs/1", "jobs": self._tuning.rows()})

    async def follow(self, request: Request) -> Response:
        return Lines(self._tuning.follow(request.path_params["name"]))

    async def stop(self, request: Request) -> Response:
        return json_reply(await self._tuning.stop(request.path_params["name"]))

    async def resume(self, request: Request) -> Response:
        return json_reply(self._tuning.resume(request.path_params["name"]))

    async def rounds(self, request: Request) -> Response:
        return json_reply(msgspec.to_builtins(self._tuning.report(request.path_params["name"])))

    async def file(self, request: Request) -> Response:
        name, file = request.path_params["name"], request.path_params["file"]
        return Response(self._tuning.file(name, file), media_type="application/octet-stream")

    def routes(self) -> list[Route]:
        def route(path: str, handler: Callable[[Request], Awaitable[Response]], method: str = "GET") -> Route:
            return Route(path, guarded(handler), methods=[method])

        return [
            route("/v1/jobs", self.begin, "POST"),
            route("/v1/jobs", self.all),
            route("/v1/jobs/{name}/follow", self.follow, "POST"),
            route("/v1/jobs/{name}/stop", self.stop, "POST"),
            route("/v1/jobs/{name}/resume", self.resume, "POST"),
            route("/v1/jobs/{name}/rounds", self.rounds),
            route("/v1/jobs/{name}/{file}", self.file),
        ]
