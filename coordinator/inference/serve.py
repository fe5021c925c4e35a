"""Requests through deployments: from text to tokens to text, with what was measured at the end.

`generate` yields events, each a plain dict that goes to the client as one JSON line:
    {"event": "status", "text"}            while models are packed, weights travel, stages load
    {"event": "start", "deployment", "epoch", "prompt_tokens"}
    {"event": "token", "id", "text"}       text that is safe to show; '' while a character is incomplete
    {"event": "end", ...}                  figures, see `summary`
Errors are raised.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec

from coordinator.inference.requests import GenerateRequest, Generation, Token, request_meta
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.measured import StageMeasured, caught_up, counters_of, measured
from coordinator.operations import Operations
from coordinator.service import Coordinator
from coordinator.shelf import Prepared
from wire import frames
from wire.errors import Refused, Unreachable, UsageError
from wire.ids import new_request_id

COUNTERS_WAIT_S = 4.0
"""How long the end of a request waits for the stages' counters, which come once a second."""
MAX_QUEUED = 64


class Serving:
    """All live requests of one coordinator."""

    def __init__(self, coordinator: Coordinator, operations: Operations) -> None:
        self._coordinator = coordinator
        self._operations = operations
        self._live: dict[int, Generation] = {}
        self._turns: dict[tuple[str, int], asyncio.Semaphore] = {}
        self._queued = 0
        coordinator.on_parcel = self._on_parcel
        coordinator.on_deployment_lost = self.fail_deployment

    def _on_parcel(self, parcel: frames.Parcel) -> None:
        generation = self._live.get(parcel.request)
        if generation is not None:
            generation.feed(parcel)

    def fail_deployment(self, name: str, reason: str) -> None:
        """End all requests of a deployment that can't go on."""
        for generation in list(self._live.values()):
            if generation.deployment == name:
                generation.fail(Unreachable(reason, try_="run again: the plan is made anew without that board"))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[dict[str, Any]]:
        """Serve one request; see the module's text for the events."""
        request.sampling()
        if self._queued >= MAX_QUEUED:
            raise Refused(f"busy: {MAX_QUEUED} requests are waiting", try_="run again in a moment")
        statuses: asyncio.Queue[str] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def say(text: str) -> None:
            loop.call_soon_threadsafe(statuses.put_nowait, text)

        ensuring = asyncio.ensure_future(self._operations.ensure(deploy_request(request), say))
        try:
            while not ensuring.done() or not statuses.empty():
                text = await _either(statuses, ensuring)
                if text is not None:
                    yield {"event": "status", "text": text}
            record, prepared = ensuring.result()
        finally:
            ensuring.cancel()
        prompt_ids = prompt_tokens(request, prepared, record)
        turn = self._turns.setdefault((record.name, record.plan.epoch), asyncio.Semaphore(record.request.slots))
        self._queued += 1
        try:
            await turn.acquire()
        finally:
            self._queued -= 1
        try:
            async for event in self._run(request, record, prepared, prompt_ids):
                yield event
        finally:
            turn.release()

    async def _run(
        self, request: GenerateRequest, record: DeploymentRecord, prepared: Prepared, prompt_ids: list[int]
    ) -> AsyncIterator[dict[str, Any]]:
        coordinator, plan = self._coordinator, record.plan
        meta = request_meta(coordinator.hub.reply_inbox, request, len(prompt_ids), tuple(prepared.tokenizer.stop_ids))
        generation = Generation(new_request_id(), record.name, plan.epoch, prompt_ids, meta, request.stall_timeout_s)
        before = counters_of(plan, coordinator.telemetry())
        first_inbox = plan.stages[0].inbox
        self._live[generation.request_id] = generation
        detokenizer = prepared.tokenizer.detokenizer()
        stop_ids = set(meta.stop_ids)
        tokens: list[Token] = []
        pieces: list[str] = []
        coordinator.hub.send(first_inbox, generation.first_parcel(), lambda why: generation.fail(Unreachable(why)))
        yield {"event": "start", "deployment": record.name, "epoch": plan.epoch, "prompt_tokens": len(prompt_ids)}
        try:
            while not tokens or not tokens[-1].final:
                token = await generation.next_token()
                tokens.append(token)
                stopped = token.final and token.id in stop_ids
                text = "" if stopped else detokenizer.push(token.id)
                if token.final:
                    text += detokenizer.flush()
                pieces.append(text)
                yield {"event": "token", "id": token.id, "text": text}
        finally:
            del self._live[generation.request_id]
            if not generation.finished or not tokens or not tokens[-1].final:
                coordinator.hub.send(first_inbox, generation.cancel_parcel(), lambda _why: None)
        rows = await self._measured(record, before, len(tokens) - 1)
        yield summary(record, generation, tokens, "".join(pieces), stop_ids, rows)

    async def _measured(
        self, record: DeploymentRecord, before: dict[Any, Any], steps: int
    ) -> tuple[StageMeasured, ...]:
        """Wait for the stages' counters to include this request, at most COUNTERS_WAIT_S."""
        coordinator, plan = self._coordinator, record.plan
        if steps > 0:
            await coordinator.changes.wait(
                lambda: caught_up(before, counters_of(plan, coordinator.telemetry()), plan, steps), COUNTERS_WAIT_S
            )
        return measured(plan, before, counters_of(plan, coordinator.telemetry()))


async def _either(statuses: asyncio.Queue[str], ensuring: asyncio.Future[Any]) -> str | None:
    """The next status, or None when the future is done first."""
    getting = asyncio.ensure_future(statuses.get())
    await asyncio.wait({getting, ensuring}, return_when=asyncio.FIRST_COMPLETED)
    if getting.done():
        return getting.result()
    getting.cancel()
    return None


def deploy_request(request: GenerateRequest) -> DeployRequest:
    return DeployRequest(
        model=request.model,
        precision=request.precision,
        objective=request.objective,
        context_tokens=request.context_tokens,
        boards_at_least=request.boards_at_least,
        boards_at_most=request.boards_at_most,
    )


def prompt_tokens(request: GenerateRequest, prepared: Prepared, record: DeploymentRecord) -> list[int]:
    """Token ids of the prompt; raise UsageError if there is none or it does not fit the context."""
    if bool(request.prompt) == bool(request.messages):
        raise UsageError("give either a prompt or messages", try_="edgelam run MODEL --prompt TEXT")
    tokenizer = prepared.tokenizer
    if request.messages:
        ids = tokenizer.chat(list(request.messages))
    elif request.raw or not tokenizer.has_chat_template:
        ids = tokenizer.encode(request.prompt)
    else:
        ids = tokenizer.chat([{"role": "user", "content": request.prompt}])
    limit = record.plan.context_tokens
    if not ids:
        raise UsageError("the prompt has no tokens", try_="a prompt of at least one word")
    if len(ids) + request.max_tokens > limit:
        raise UsageError(
            f"prompt of {len(ids)} tokens and {request.max_tokens} new ones exceed the deployment's context of {limit}",
            try_=f"--max-tokens {max(1, limit - len(ids))}, a shorter prompt, or --context",
        )
    return list(ids)


def summary(
    record: DeploymentRecord,
    generation: Generation,
    tokens: list[Token],
    text: str,
    stop_ids: set[int],
    rows: tuple[StageMeasured, ...],
) -> dict[str, Any]:
    """The last event: figures of this request. Rates are over decode steps; None where there were too few."""
    first_s, last_s = tokens[0].arrived_s, tokens[-1].arrived_s
    steps = len(tokens) - 1
    token_s = (last_s - first_s) / steps if steps > 0 and last_s > first_s else None
    hops = [row.sent_bytes_per_token for row in rows]
    known = [value for value in hops if value is not None]
    return {
        "event": "end",
        "text": text,
        "token_ids": [token.id for token in tokens],
        "finish_reason": "stop" if tokens[-1].id in stop_ids else "length",
        "prompt_tokens": len(generation.prompt_ids),
        "time_to_first_token_s": first_s - generation.started_s,
        "token_s": token_s,
        "tokens_per_s": 1.0 / token_s if token_s else None,
        "predicted_token_s": record.plan.predicted_token_s,
        "bytes_per_token": sum(known) if len(known) == len(hops) else None,
        "deployment": record.name,
        "epoch": record.plan.epoch,
        "stages": [msgspec.to_builtins(row) for row in rows],
    }
