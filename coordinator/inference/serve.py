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
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec

from coordinator.inference.patience import first_token_timeout_s
from coordinator.inference.requests import GenerateRequest, Generation, Token, request_meta
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.measured import Key, StageMeasured, caught_up, counters_of, measured
from coordinator.operations import Operations
from coordinator.service import Coordinator
from coordinator.shelf import Prepared
from coordinator.turns import Hold
from wire import frames
from wire.errors import Refused, Unreachable, UsageError
from wire.ids import new_request_id
from wire.messages import StageCounters

COUNTERS_WAIT_S = 4.0
"""How long the end of a request waits for the stages' counters, which come once a second."""
MAX_WAITING = 64
"""Requests that wait for a deployment or for their turn, over all deployments."""


class _Admitted:
    """What a request has got when its turn has come."""

    def __init__(self, record: DeploymentRecord, prepared: Prepared, turn: asyncio.Semaphore) -> None:
        self.record = record
        self.prepared = prepared
        self.turn = turn


class _Answer:
    """What has come so far of one answer."""

    def __init__(self, generation: Generation, before: dict[Key, StageCounters], prepared: Prepared) -> None:
        self.generation = generation
        self.before = before
        """Counters of the stages when it began."""
        self.stop_ids = set(generation.meta.stop_ids)
        self.tokens: list[Token] = []
        self._detokenizer = prepared.tokenizer.detokenizer()
        self._pieces: list[str] = []

    @property
    def complete(self) -> bool:
        return bool(self.tokens) and self.tokens[-1].final

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def add(self, token: Token) -> str:
        """Take the next token; give the text that it completes. A stop token has none."""
        self.tokens.append(token)
        text = "" if token.final and token.id in self.stop_ids else self._detokenizer.push(token.id)
        if token.final:
            text += self._detokenizer.flush()
        self._pieces.append(text)
        return text


class Serving:
    """All live requests of one coordinator."""

    def __init__(self, coordinator: Coordinator, operations: Operations) -> None:
        self._coordinator = coordinator
        self._operations = operations
        self._live: dict[int, Generation] = {}
        self._turns: dict[str, tuple[int, asyncio.Semaphore]] = {}
        """Deployment -> epoch, and one turn per slot of it."""
        self._waiting = 0
        coordinator.on_parcel = self._on_parcel
        coordinator.on_deployment_lost = self.fail_deployment

    @property
    def live(self) -> int:
        """Requests that the stages work on."""
        return len(self._live)

    def _on_parcel(self, parcel: frames.Parcel) -> None:
        generation = self._live.get(parcel.request)
        if generation is not None:
            generation.feed(parcel)

    def fail_deployment(self, name: str, reason: str) -> None:
        """End all requests of a deployment that can't go on."""
        for generation in list(self._live.values()):
            if generation.deployment == name:
                generation.fail(Unreachable(reason, try_="run again: what is missing is planned anew"))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Serve one request; see the module's text for the events. Closing the generator ends it at the stages too."""
        request.sampling()
        if bool(request.prompt) == bool(request.messages):
            raise UsageError("give either a prompt or messages", try_="edgelam run MODEL --prompt TEXT")
        hold = Hold()
        try:
            admitted: list[_Admitted] = []
            async with aclosing(self._admit(request, admitted, hold)) as events:
                async for event in events:
                    yield event
            [got] = admitted
            try:
                answer = await self._begin(request, got)
                async with aclosing(self._run(got.record, answer)) as events:
                    async for event in events:
                        yield event
            finally:
                got.turn.release()
        finally:
            hold.close()
        rows = await self._measured(got.record, answer.before, len(answer.tokens) - 1)
        yield summary(got.record, answer.generation, answer.tokens, answer.text, answer.stop_ids, rows)

    async def _admit(
        self, request: GenerateRequest, admitted: list[_Admitted], hold: Hold
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield status events until a deployment is ready and a turn is there; put both into `admitted`. The caller
        closes `hold` in any case."""
        if self._waiting >= MAX_WAITING:
            raise Refused(f"busy: {MAX_WAITING} requests are waiting", try_="run again in a moment")
        self._waiting += 1
        try:
            while not admitted:
                statuses: asyncio.Queue[str] = asyncio.Queue()
                ensure = self._operations.ensure(deploy_request(request), _into(statuses), hold)
                ensuring = asyncio.ensure_future(ensure)
                try:
                    while not ensuring.done() or not statuses.empty():
                        text = await _either(statuses, ensuring)
                        if text is not None:
                            yield {"event": "status", "text": text}
                    record, prepared = ensuring.result()
                finally:
                    ensuring.cancel()
                turn = self._turn(record)
                await turn.acquire()
                if self._operations.usable(record):
                    admitted.append(_Admitted(record, prepared, turn))
                else:
                    turn.release()
                    hold.release()  # lost while we waited in line
        finally:
            self._waiting -= 1

    def _turn(self, record: DeploymentRecord) -> asyncio.Semaphore:
        """One turn per slot: stages refuse what exceeds their slots, so requests wait here."""
        epoch, turn = self._turns.get(record.name, (-1, asyncio.Semaphore(record.request.slots)))
        if epoch != record.plan.epoch:
            turn = asyncio.Semaphore(record.request.slots)
            in_force = {other.name for other in self._coordinator.records()}
            self._turns = {name: kept for name, kept in self._turns.items() if name in in_force}
            self._turns[record.name] = (record.plan.epoch, turn)
        return turn

    async def _begin(self, request: GenerateRequest, got: _Admitted) -> _Answer:
        """Tokenize the prompt, off the event loop, and make the request."""
        coordinator, plan = self._coordinator, got.record.plan
        prompt_ids = await asyncio.to_thread(prompt_tokens, request, got.prepared, got.record)
        stop_ids = tuple(got.prepared.tokenizer.stop_ids)
        prompts = 1 + sum(other.deployment == plan.deployment for other in self._live.values())
        first_s = first_token_timeout_s(plan, len(prompt_ids), prompts, request.stall_timeout_s)
        meta = request_meta(coordinator.hub.reply_inbox, request, len(prompt_ids), stop_ids, first_s)
        generation = Generation(
            new_request_id(), plan.deployment, plan.epoch, prompt_ids, meta, request.stall_timeout_s, first_s
        )
        return _Answer(generation, counters_of(plan, coordinator.telemetry()), got.prepared)

    async def _run(self, record: DeploymentRecord, answer: _Answer) -> AsyncGenerator[dict[str, Any], None]:
        """Send the prompt and yield its tokens; whatever ends this early also ends the request at the stages."""
        hub, generation = self._coordinator.hub, answer.generation
        first_inbox = record.plan.stages[0].inbox
        self._live[generation.request_id] = generation
        try:
            hub.send(first_inbox, generation.first_parcel(), lambda why: generation.fail(Unreachable(why)))
            yield {
                "event": "start",
                "deployment": record.name,
                "epoch": record.plan.epoch,
                "prompt_tokens": len(generation.prompt_ids),
            }
            while not answer.complete:
                token = await generation.next_token()
                yield {"event": "token", "id": token.id, "text": answer.add(token)}
        finally:
            del self._live[generation.request_id]
            if not answer.complete:
                hub.send(first_inbox, generation.cancel_parcel(), lambda _why: None)

    async def _measured(
        self, record: DeploymentRecord, before: dict[Key, StageCounters], steps: int
    ) -> tuple[StageMeasured, ...]:
        """Wait for the stages' counters to include this request, at most COUNTERS_WAIT_S."""
        coordinator, plan = self._coordinator, record.plan
        if steps > 0:
            await coordinator.changes.wait(
                lambda: caught_up(before, counters_of(plan, coordinator.telemetry()), plan, steps), COUNTERS_WAIT_S
            )
        return measured(plan, before, counters_of(plan, coordinator.telemetry()))


def _into(statuses: asyncio.Queue[str]) -> Callable[[str], None]:
    """Give a function that puts texts into the queue, from any thread."""
    loop = asyncio.get_running_loop()

    def say(text: str) -> None:
        loop.call_soon_threadsafe(statuses.put_nowait, text)

    return say


async def _either(statuses: asyncio.Queue[str], ensuring: asyncio.Future[Any]) -> str | None:
    """The next status, or None when the future is done first."""
    getting = asyncio.ensure_future(statuses.get())
    try:
        await asyncio.wait({getting, ensuring}, return_when=asyncio.FIRST_COMPLETED)
        return getting.result() if getting.done() else None
    finally:
        getting.cancel()


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
