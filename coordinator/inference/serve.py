"""Requests through deployments: from text to tokens to text, with what was measured at the end.

`generate` yields events, each a plain dict that goes to the client as one JSON line:
    {"event": "status", "text"}            while models are packed, weights travel, stages load
    {"event": "start", "deployment", "epoch", "boards", "prompt_tokens", "guesses", "adapter"}
    {"event": "token", "id", "text"}       text that is safe to show; '' while a character is incomplete
    {"event": "pause", "reason", "given"}  a board, a stage or the broker was lost after so many tokens
    {"event": "resume", "pause_s", "epoch", "boards", "reason"}    the next token is there
    {"event": "end", ...}                  figures, see coordinator.inference.answer
Errors are raised.

After a loss that is not the request's own fault the same is deployed again, on what is left, and a new request begins
behind the tokens that were given: stages keep nothing that the requester has not. A client sees a pause. A client that
lost its coordinator goes on in the same way: it asks for the same, with what it was `given`
(coordinator.inference.resuming).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec

from coordinator.adapters import AdapterShelf
from coordinator.asked import checked
from coordinator.inference.answer import Answer
from coordinator.inference.patience import Pace, first_token_timeout_s
from coordinator.inference.progress import OutOfTime, with_status
from coordinator.inference.requests import (
    GenerateRequest,
    Generation,
    Token,
    guesses_for,
    replayed,
    request_meta,
)
from coordinator.inference.watch import Watch
from coordinator.journal import DeploymentRecord, DeployRequest
from coordinator.losses import Interrupted, Lost
from coordinator.measured import StageMeasured, caught_up, counters_of, measured
from coordinator.operations import Operations
from coordinator.planning.guessing import guessing_of
from coordinator.planning.plan import Plan
from coordinator.service import Coordinator
from coordinator.shelf import Prepared
from coordinator.turns import Hold, Seat
from wire import frames
from wire.errors import Busy, Degraded, EdgelamError, Unreachable, UsageError
from wire.ids import new_request_id

COUNTERS_WAIT_S = 4.0
"""How long the end of a request waits for the stages' counters, which come once a second."""

MAX_WAITING = 64
"""Requests that wait for a deployment or for their turn, over all deployments."""

RETRY_S = 0.5
"""Between two tries to go on after a loss: what is missing (a board, memory) may be there again by then."""

ONE_STAGE = 1
"""Position of a CLOSE that is for its receiver alone (agent.workers.ring)."""


class _Place(NamedTuple):
    """Where a request runs once its turn has come."""

    record: DeploymentRecord
    prepared: Prepared


class Serving:
    """All live requests of one coordinator."""

    def __init__(self, coordinator: Coordinator, operations: Operations, adapters: AdapterShelf) -> None:
        self._coordinator = coordinator
        self._operations = operations
        self._adapters = adapters
        self._live: dict[int, Generation] = {}
        self._turns: dict[str, tuple[int, asyncio.Semaphore]] = {}
        """Deployment -> epoch, and one turn per slot of it."""
        self._paces: dict[str, tuple[int, Pace]] = {}
        """Deployment -> epoch, and how fast it gives tokens."""
        self._waiting = 0
        coordinator.on_parcel = self._on_parcel
        coordinator.on_deployment_lost = self.fail_deployment
        coordinator.on_deployment_removed = self.end_deployment

    @property
    def live(self) -> int:
        """Requests that the stages work on."""
        return len(self._live)

    @property
    def waiting(self) -> int:
        """Requests that wait for a deployment or for their turn."""
        return self._waiting

    def why_stay(self, name: str) -> str:
        """Why the answers that run on a deployment can't go on elsewhere for no need; '' if they can."""
        for generation in self._live.values():
            if generation.deployment == name and generation.stays_because:
                return generation.stays_because
        return ""

    def _on_parcel(self, parcel: frames.Parcel) -> None:
        generation = self._live.get(parcel.request)
        if generation is not None:
            generation.feed(parcel)

    def fail_deployment(self, name: str, reason: str) -> None:
        """What a deployment was doing is lost: its requests go on elsewhere, if they may."""
        for generation in list(self._live.values()):
            if generation.deployment == name:
                generation.fail(Lost(reason, try_="run again: what is missing is planned anew"))

    def end_deployment(self, name: str, reason: str) -> None:
        """Somebody wants this deployment no more: its requests end."""
        for generation in list(self._live.values()):
            if generation.deployment == name:
                generation.fail(Unreachable(reason, try_="run again: it is deployed anew"))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[dict[str, Any], None]:
        """Serve one request; see the module's text for the events. Closing the generator ends it at the stages too."""
        request.sampling()
        if bool(request.prompt) == bool(request.messages):
            raise UsageError("give either a prompt or messages", try_="edgelam run MODEL --prompt TEXT")
        if request.adapter:
            request = msgspec.structs.replace(request, adapter=await self._adapters.find(request.adapter))
        hold, seat = Hold(), Seat()
        try:
            prompts: list[list[int]] = []
            placed: list[_Place] = []
            async with aclosing(self._admit(request, prompts, placed, seat, hold)) as events:
                async for event in events:
                    yield event
            answer = self._answer(request, placed[-1], prompts[0])
            while not answer.complete:
                loss: list[Interrupted] = []
                async with aclosing(self._run(request, placed[-1], answer, loss)) as events:
                    async for event in events:
                        yield event
                if loss:
                    async with aclosing(self._recover(request, answer, loss[0], placed, seat, hold)) as events:
                        async for event in events:
                            yield event
        finally:
            seat.leave()
            hold.close()
        record = placed[-1].record
        yield {**answer.summary(record, await self._measured(record, answer)), "adapter": request.adapter}

    async def _admit(
        self, request: GenerateRequest, prompts: list[list[int]], placed: list[_Place], seat: Seat, hold: Hold
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield status events until a deployment is ready and a turn is there; put prompt and place into the lists. The
        caller closes `hold` and leaves the `seat` in any case. A prompt that can't be served is refused before any
        deployment is changed for it."""
        if self._waiting >= MAX_WAITING:
            raise Busy(f"busy: {MAX_WAITING} requests are waiting", try_="run again in a moment")
        self._waiting += 1
        try:
            async with aclosing(with_status(lambda say: self._prompt(request, say), prompts)) as events:
                async for event in events:
                    yield event
            # Who had a part of the answer already is owed the rest, as after any other loss.
            until_s = time.monotonic() + request.recovery_timeout_s if request.given else None
            async with aclosing(self._find_place(request, placed, seat, hold, until_s)) as events:
                async for event in events:
                    yield event
        finally:
            self._waiting -= 1

    async def _find_place(
        self, request: GenerateRequest, placed: list[_Place], seat: Seat, hold: Hold, until_s: float | None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Have a deployment ready and a turn on it, and append both to `placed`. With `until_s` it is tried until then
        in spite of errors; without, only what is lost on the way to readiness is tried again."""
        wanted, found = deploy_request(request), len(placed)
        missing: EdgelamError | None = None
        while len(placed) == found:
            ensured: list[_Place] = []
            try:
                ensuring = with_status(self._ensuring(wanted, hold, until_s is not None), ensured, until_s)
                async with aclosing(ensuring) as events:
                    async for event in events:
                        yield event
            except (UsageError, Degraded):
                raise
            except EdgelamError as error:
                if until_s is None and isinstance(error, Interrupted) and request.recoveries_at_most:
                    until_s = time.monotonic() + request.recovery_timeout_s
                if isinstance(error, OutOfTime) and missing is not None:
                    raise missing from None
                if until_s is None or time.monotonic() + RETRY_S >= until_s:
                    raise
                missing = error
                yield {"event": "status", "text": f"{error.message}; trying again"}
                await asyncio.sleep(RETRY_S)
                continue
            [place] = ensured
            await seat.take(self._turn(place.record))
            if self._operations.usable(place.record):
                placed.append(place)
            else:
                seat.leave()
                hold.release()  # lost while we waited in line

    def _ensuring(
        self, wanted: DeployRequest, hold: Hold, in_haste: bool
    ) -> Callable[[Callable[[str], None]], Awaitable[_Place]]:
        async def ensure(say: Callable[[str], None]) -> _Place:
            return _Place(*await self._operations.ensure(wanted, say, hold, in_haste))

        return ensure

    async def _recover(
        self,
        request: GenerateRequest,
        answer: Answer,
        loss: Interrupted,
        placed: list[_Place],
        seat: Seat,
        hold: Hold,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Yield events until there is a place to go on at; raise the loss if there may be, or is, none."""
        if answer.recoveries >= request.recoveries_at_most:
            raise loss
        again, now_s = answer.paused, time.monotonic()
        answer.lost(loss.message, now_s)
        if again:
            yield {"event": "status", "text": loss.message}
        else:
            yield {"event": "pause", "reason": loss.message, "given": len(answer.tokens)}
        try:
            finding = self._find_place(request, placed, seat, hold, now_s + request.recovery_timeout_s)
            async with aclosing(finding) as events:
                async for event in events:
                    yield event
        except (UsageError, Degraded):
            raise
        except EdgelamError as error:
            because = "" if error.message == loss.message else f": {error.message}"
            raise Unreachable(
                f"{loss.message}; the answer could not go on within {request.recovery_timeout_s:.0f} s{because}",
                try_=error.try_ or loss.try_,
            ) from None

    async def _prompt(self, request: GenerateRequest, say: Callable[[str], None]) -> list[int]:
        """Tokenize the prompt, off the event loop; raise UsageError if it can't be served."""
        checked(deploy_request(request))
        prepared = await self._operations.preparing.prepare(request.model, request.precision, say)
        return await asyncio.to_thread(prompt_tokens, request, prepared)

    def _turn(self, record: DeploymentRecord) -> asyncio.Semaphore:
        """One turn per slot: stages refuse what exceeds their slots, so requests wait here."""
        epoch, turn = self._turns.get(record.name, (-1, asyncio.Semaphore(record.plan.slots)))
        if epoch != record.plan.epoch:
            turn = asyncio.Semaphore(record.plan.slots)
            in_force = {other.name for other in self._coordinator.records()}
            self._turns = {name: kept for name, kept in self._turns.items() if name in in_force}
            self._turns[record.name] = (record.plan.epoch, turn)
        return turn

    def _pace(self, plan: Plan) -> Pace:
        """What was measured of a deployment in this epoch."""
        epoch, pace = self._paces.get(plan.deployment, (-1, None))
        if pace is None or epoch != plan.epoch:
            pace = Pace(plan, pace)
            in_force = {other.name for other in self._coordinator.records()}
            self._paces = {name: kept for name, kept in self._paces.items() if name in in_force}
            self._paces[plan.deployment] = (plan.epoch, pace)
        return pace

    def _running(self, name: str) -> int:
        """Requests that run on a deployment."""
        return sum(generation.deployment == name for generation in self._live.values())

    def _answer(self, request: GenerateRequest, place: _Place, prompt_ids: list[int]) -> Answer:
        stop_ids = () if request.ignore_stop else tuple(place.prepared.tokenizer.stop_ids)
        now_s, last = time.monotonic(), len(request.given) - 1
        given = [
            Token(id_, index, now_s, index == last and (id_ in stop_ids or index + 1 == request.max_tokens))
            for index, id_ in enumerate(request.given)
        ]
        return Answer(prompt_ids, place.prepared, stop_ids, given, request.guesses if given else None)

    def _begin(self, request: GenerateRequest, plan: Plan, answer: Answer) -> Generation:
        """Make the request to the stages: prompt and what was given of the answer, and how much may still come."""
        coordinator, rows = self._coordinator, answer.rows
        prompts = 1 + self._running(plan.deployment)
        given = len(answer.tokens)
        if answer.guesses is None:
            answer.guesses = guesses_for(request, len(answer.prompt_ids), guessing_of(plan).pays)
        replay = replayed(request, answer.guesses, given)
        first_s = first_token_timeout_s(plan, len(rows), prompts, request.stall_timeout_s, replay)
        reply, stop_ids = coordinator.hub.reply_inbox, answer.stop_ids
        meta = request_meta(reply, request, len(rows), stop_ids, first_s, answer.guesses, given)
        generation = Generation(
            new_request_id(), plan.deployment, plan.epoch, rows, meta, request.stall_timeout_s, first_s
        )
        if request.exact:
            generation.stays_because = "an answer is to be exact"
        elif answer.recoveries >= request.recoveries_at_most:
            generation.stays_because = "an answer has no recovery left"
        answer.begins(generation, counters_of(plan, coordinator.telemetry()))
        return generation

    async def _run(
        self, request: GenerateRequest, place: _Place, answer: Answer, loss: list[Interrupted]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send the prompt and yield its tokens; what interrupts them is put into `loss`. Whatever ends this early also
        ends the request at the stages."""
        hub, record = self._coordinator.hub, place.record
        generation = self._begin(request, record.plan, answer)
        self._live[generation.request_id] = generation
        watch = Watch(
            self._coordinator, record.plan, generation, self._pace(record.plan), lambda: self._running(record.name)
        )
        try:
            first = generation.first_parcel()
            hub.send(record.plan.stages[0].inbox, first, lambda why: generation.fail(Lost(why)))
            if not answer.pauses:
                yield {
                    "event": "start",
                    "deployment": record.name,
                    "epoch": record.plan.epoch,
                    "boards": _boards(record.plan),
                    "prompt_tokens": len(answer.prompt_ids),
                    "guesses": msgspec.to_builtins(answer.guesses),
                    "adapter": request.adapter,
                }
            while not answer.complete:
                token = await watch.next_token()
                resumes = answer.paused
                text = answer.add(token)
                if resumes:
                    yield _resumed(record.plan, answer)
                yield {"event": "token", "id": token.id, "text": text}
        except Interrupted as error:
            loss.append(error)
        finally:
            del self._live[generation.request_id]
            if not answer.complete:
                self._close(record.plan, generation)

    def _close(self, plan: Plan, generation: Generation) -> None:
        """End a request at all its stages: round the ring, and at each of them, since the ring may be broken."""
        hub = self._coordinator.hub
        for stage in plan.stages:
            parcel = generation.cancel_parcel(ONE_STAGE if stage.stage else 0)
            hub.send(stage.inbox, parcel, lambda _why: None)

    async def _measured(self, record: DeploymentRecord, answer: Answer) -> tuple[StageMeasured, ...]:
        """Wait for the stages' counters to include this request, at most COUNTERS_WAIT_S."""
        coordinator, plan, before, steps = self._coordinator, record.plan, answer.before, answer.least_rows
        if steps > 0:
            await coordinator.changes.wait(
                lambda: caught_up(before, counters_of(plan, coordinator.telemetry()), plan, steps), COUNTERS_WAIT_S
            )
        return measured(plan, before, counters_of(plan, coordinator.telemetry()))


def _resumed(plan: Plan, answer: Answer) -> dict[str, Any]:
    pause = answer.pauses[-1]
    return {
        "event": "resume",
        "pause_s": pause.pause_s,
        "epoch": plan.epoch,
        "boards": _boards(plan),
        "reason": pause.reason,
    }


def _boards(plan: Plan) -> list[str]:
    return list(dict.fromkeys(stage.device for stage in plan.stages))


def deploy_request(request: GenerateRequest) -> DeployRequest:
    fields = (name for name in DeployRequest.__struct_fields__ if name != "adapters")
    adapters = (request.adapter,) if request.adapter else ()
    return DeployRequest(**{name: getattr(request, name) for name in fields}, adapters=adapters)


def prompt_tokens(request: GenerateRequest, prepared: Prepared) -> list[int]:
    """Token ids of the prompt; raise UsageError if there is none or it does not fit the context."""
    ids = encoded(request, prepared)
    limit = request.context_tokens
    if request.given and max(request.given) >= prepared.packed.graph.vocabulary:
        raise UsageError(
            f"{max(request.given)} was given, the model has {prepared.packed.graph.vocabulary} tokens",
            try_="the tokens of an answer of this model",
        )
    if len(ids) + request.max_tokens > limit:
        raise UsageError(
            f"prompt of {len(ids)} tokens and {request.max_tokens} new ones exceed the context of {limit}",
            try_=f"--max-tokens {max(1, limit - len(ids))}, a shorter prompt, or --context",
        )
    return ids


def encoded(request: GenerateRequest, prepared: Prepared) -> list[int]:
    """Token ids of the prompt, however many; raise UsageError if there is none."""
    tokenizer = prepared.tokenizer
    if request.messages:
        ids = tokenizer.chat(list(request.messages))
    elif request.raw or not tokenizer.has_chat_template:
        ids = tokenizer.encode(request.prompt)
    else:
        ids = tokenizer.chat([{"role": "user", "content": request.prompt}])
    if not ids:
        raise UsageError("the prompt has no tokens", try_="a prompt of at least one word")
    return list(ids)
