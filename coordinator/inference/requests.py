"""One request from prompt to last token, as the requester sees it.

The requester keeps prompt and tokens so far; stages keep only their KV cache. Tokens arrive as parcels with the
request's id; each is counted once, in order of position: a token that comes twice is dropped, one that comes too
early means that an answer was lost on the way, and the request fails with a clear error rather than with a hole.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Annotated, Final

import msgspec
import numpy as np
from msgspec import Meta, Struct

from coordinator.losses import Lost
from wire import frames
from wire.errors import Busy, EdgelamError, PeerError, Refused, Unreachable, UsageError
from wire.limits import MAX_DIM, MAX_DRAFTS
from wire.messages import InboxAddress, Inquiry, RequestMeta, Sampling, StageError, Standing, decode
from wire.tensors import Dtype

SPECULATE: Final = ("off", "auto", *map(str, range(1, MAX_DRAFTS + 1)))

MOST_TOKENS: Final = 100_000
"""Of an answer."""

MOST_ANSWERS = 256
"""Answers that are taken after a question: more than a plan has stages, twice."""


class Guesses(Struct, frozen=True):
    """How tokens are guessed for one answer, over all its losses: `most` in a round, 0: none."""

    most: Annotated[int, Meta(ge=0, le=MAX_DRAFTS)] = 0
    padded: bool = False
    """In steps of two rows or more."""


class GenerateRequest(Struct, frozen=True, kw_only=True):
    """Body of POST /v1/generate. Either `prompt` or `messages`; `raw` sends the prompt without the chat template.

    It has all fields of a DeployRequest but the adapters: they choose the deployment that answers.
    """

    model: str
    prompt: str = ""
    messages: tuple[dict[str, str], ...] = ()
    raw: bool = False
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    ignore_stop: bool = False
    """Go on after a stop token (for measurements)."""
    precision: str = "int4"
    objective: str = "latency"
    context_tokens: int = 1024
    slots: int | None = None
    """Requests at once; None: as many as go well on the boards."""
    replicas: int = 1
    """Copies of each stage; with 2, another board holds it loaded and takes over after a loss."""
    boards_at_least: int = 1
    boards_at_most: int = 64
    topology: str = "auto"
    excluded: tuple[str, ...] = ()
    pins: tuple[tuple[str, str], ...] = ()
    error_budget_percent: float = 0.0
    """By how much codecs at the cuts may raise the model's perplexity. Not with `exact`."""
    tokens_per_s: float | None = None
    """With objective throughput: the load that must be carried."""
    weights: tuple[tuple[str, float], ...] = ()
    """(objective, weight) pairs, with objective weighted."""
    reserve_percent: float = 10.0
    """Of each board's usable memory, that stays free."""
    engine: str = "auto"
    """What all stages shall run on; auto: each board on what it is fastest with."""
    adapter: str = ""
    """A job (its adapter as it is now), a folder in PEFT's layout on the coordinator's machine, or the id that `start`
    said; '' is none."""
    stall_timeout_s: float = 30.0
    """Between two tokens. The first one may take longer, by the plan (coordinator.inference.patience)."""
    recoveries_at_most: int = 8
    """How often the answer may go on after a loss; 0: a loss ends it."""
    recovery_timeout_s: float = 60.0
    """From a loss until the answer goes on."""
    exact: bool = False
    """After a loss compute what was given again as it was computed before, token by token: slower, and the answer is
    the one that it would have been without the loss."""
    given: Annotated[tuple[Annotated[int, Meta(ge=0, lt=MAX_DIM)], ...], Meta(max_length=MOST_TOKENS)] = ()
    """What the client has of this answer already, from a coordinator that was lost: the rest is behind it."""
    guesses: Guesses | None = None
    """With `given`: as the answer's `start` said."""
    speculate: str = "auto"
    """Guess tokens from prompt and answer, and have several confirmed in one round of the stages: 'off'; a number, the
    most in a round, in steps of two rows or more; 'auto', where the plan says that it pays, and also steps of one row
    where a guess is not likely enough."""

    def sampling(self) -> Sampling:
        """Checked sampling parameters; raise UsageError naming the one out of range, or two that contradict."""
        checks = (
            ("max_tokens", 1 <= self.max_tokens <= MOST_TOKENS, f"1 to {MOST_TOKENS}"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100; 0 is greedy"),
            ("top_k", 0 <= self.top_k <= 1_000_000, "0 or more; 0 is off"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            ("stall_timeout_s", 0 < self.stall_timeout_s <= 3600, "above 0, at most 3600"),
            ("recoveries_at_most", 0 <= self.recoveries_at_most <= 1000, "0 to 1000; 0 is none"),
            ("recovery_timeout_s", 0 < self.recovery_timeout_s <= 3600, "above 0, at most 3600"),
        )
        if self.speculate not in SPECULATE:
            raise UsageError(f"speculate {self.speculate!r} is not known", try_=f"off, auto, or 1 to {MAX_DRAFTS}")
        for name, fine, rule in checks:
            if not fine:
                raise UsageError(f"{name} {getattr(self, name)} is out of range", try_=rule)
        if len(self.given) > self.max_tokens:
            raise UsageError(
                f"{len(self.given)} tokens were given, of {self.max_tokens}", try_="max_tokens counts those given, too"
            )
        if self.exact and self.error_budget_percent:
            raise UsageError(
                f"exact, and an error budget of {self.error_budget_percent:g} %: a coded answer depends on the cuts",
                try_="an error budget of 0, or without exact",
            )
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


class Token(Struct, frozen=True):
    """One generated token: id, index in the answer, and when it arrived (monotonic)."""

    id: int
    index: int
    arrived_s: float
    final: bool


class Generation:
    """A live request. `feed` takes what arrives, `next` gives it: tokens, and answers to what was asked."""

    def __init__(
        self,
        request_id: int,
        deployment: str,
        epoch: int,
        prompt_ids: list[int],
        meta: RequestMeta,
        stall_timeout_s: float,
        first_timeout_s: float | None = None,
    ) -> None:
        self.request_id = request_id
        self.deployment = deployment
        self.epoch = epoch & 0xFFFFFFFF
        """As frames carry it."""
        self.prompt_ids = prompt_ids
        self.meta = meta
        self.stall_timeout_s = stall_timeout_s
        self.first_timeout_s = stall_timeout_s if first_timeout_s is None else first_timeout_s
        """For the first token: the prompt goes through all stages before it."""
        self.started_s = time.monotonic()
        self._items: deque[Token | Standing | EdgelamError] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._next_index = 0
        self._unanswered = 0
        """Answers that may still come to what was asked."""
        self.finished = False
        self.stays_because = ""
        """Why it is not to be moved to other boards while nothing is lost."""

    def first_parcel(self) -> frames.Parcel:
        """The prompt, with what every stage must know in front of it."""
        return frames.Parcel(
            kind=frames.Kind.TOKENS,
            epoch=self.epoch,
            request=self.request_id,
            position=0,
            flags=frames.FLAG_FINAL,
            tensor=frames.Tensor.of(np.asarray(self.prompt_ids, dtype=np.int32)),
            meta=msgspec.json.encode(self.meta),
        )

    def cancel_parcel(self, stages: int = 0) -> frames.Parcel:
        """For the receiver and those behind it: so many in all, 0 is all of the ring."""
        return frames.Parcel(kind=frames.Kind.CLOSE, epoch=self.epoch, request=self.request_id, position=stages)

    def inquiry_parcel(self, number: int) -> frames.Parcel:
        """For a stage: how does the request stand?"""
        self._unanswered = MOST_ANSWERS
        return frames.Parcel(
            kind=frames.Kind.INQUIRY,
            epoch=self.epoch,
            request=self.request_id,
            meta=msgspec.json.encode(Inquiry(reply=self.meta.reply, number=number)),
        )

    def feed(self, parcel: frames.Parcel) -> None:
        """Take a parcel that carries this request's id."""
        if self.finished or parcel.epoch != self.epoch:
            return
        if parcel.kind is frames.Kind.ERROR:
            self.fail(stage_error(parcel.meta))
        elif parcel.kind is frames.Kind.TOKENS and parcel.tensor is not None:
            self._feed_token(parcel, parcel.tensor)
        elif parcel.kind is frames.Kind.STANDING and self._unanswered:
            self._unanswered -= 1
            with contextlib.suppress(PeerError):  # An answer that can't be read is none.
                self._put(decode(parcel.meta, Standing, "standing"))

    def _feed_token(self, parcel: frames.Parcel, tensor: frames.Tensor) -> None:
        index = parcel.position - len(self.prompt_ids)
        most = 1 + self.meta.speculate
        several = tensor.dtype is Dtype.I32 and len(tensor.shape) == 1 and 1 <= tensor.shape[0] <= most
        if not several or index > self._next_index or index + tensor.shape[0] > self.meta.max_new_tokens:
            self.fail(PeerError(f"the head sent token {index} where token {self._next_index} was due"))
            return
        tokens, now_s = tensor.array().tolist(), time.monotonic()
        for place, token in enumerate(tokens, index):
            if place == self._next_index:
                self._next_index += 1
                self.finished = parcel.final and place == index + len(tokens) - 1
                self._put(Token(token, place, now_s, self.finished))

    def fail(self, error: EdgelamError) -> None:
        """End the request with an error; later parcels are ignored."""
        if not self.finished:
            self.finished = True
            self._put(error)

    @property
    def timeout_s(self) -> float:
        """For the next token: `stall_timeout_s`, but `first_timeout_s` for the first one."""
        return self.stall_timeout_s if self._next_index else self.first_timeout_s

    def _put(self, item: Token | Standing | EdgelamError) -> None:
        self._items.append(item)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self, wait_s: float) -> Token | Standing | None:
        """Wait for what comes next; None if nothing came in time. Raises the request's error. One waits at a time.

        coordinator.changes says why there is no asyncio.wait_for here.
        """
        if not self._items:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(max(0.0, wait_s), self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, EdgelamError):
            raise item
        return item

    def timed_out(self) -> Unreachable:
        """Nothing may come any more; the error to raise."""
        timeout_s, self.finished = self.timeout_s, True
        return Unreachable(
            f"no token came for {timeout_s:.0f} s (after {self._next_index} tokens)",
            try_="edgelam devices shows which board is silent; then run again",
        )


def stage_error(meta: bytes) -> EdgelamError:
    try:
        told = msgspec.json.decode(meta, type=StageError)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return PeerError("a stage reported an error that can't be read")
    where = f"stage {told.stage} on {told.device}"
    if told.code == "busy":
        return Busy(f"{where} is busy: {told.text}", try_="run again in a moment, or deploy with more slots")
    if told.code == "too-long":
        return Refused(f"{where}: {told.text}", try_="a shorter prompt, or a larger --context")
    if told.code in ("deadline", "stopped"):
        return Lost(f"{where} could not go on: {told.text}", try_="edgelam devices shows the state; then run again")
    return EdgelamError(f"{where} failed ({told.code}): {told.text}", try_="run again; edgelam devices shows the state")


def guesses_for(request: GenerateRequest, prompt_tokens: int, pays: bool) -> Guesses:
    """Decide as the request says, or, where it leaves it to the plan, by whether it pays there. A prompt of one token
    is a step of one row, so nothing is guessed behind it."""
    if prompt_tokens < 2 or request.speculate == "off":
        return Guesses()
    if request.speculate != "auto":
        return Guesses(int(request.speculate), True)
    return Guesses(MAX_DRAFTS, request.exact) if pays else Guesses()


def replayed(request: GenerateRequest, guesses: Guesses, given_tokens: int) -> int:
    """How many of the tokens given must be computed one by one to be computed as they were. What was computed in steps
    of two rows or more is computed again as a prompt is, to the bit."""
    return given_tokens if request.exact and not guesses.padded else 0


def request_meta(
    reply: InboxAddress,
    request: GenerateRequest,
    prompt_tokens: int,
    stop_ids: tuple[int, ...],
    first_timeout_s: float,
    guesses: Guesses,
    given_tokens: int = 0,
) -> RequestMeta:
    """What every stage must know; raise UsageError for sampling parameters out of range. Stages keep a silent request
    at least as long as its requester waits for it. `given_tokens` of the answer are in the prompt already."""
    return RequestMeta(
        reply=reply,
        sampling=request.sampling(),
        prompt_tokens=prompt_tokens,
        max_new_tokens=request.max_tokens - given_tokens,
        replay_tokens=replayed(request, guesses, given_tokens),
        alone=request.exact,
        speculate=guesses.most,
        padded=guesses.padded,
        stop_ids=stop_ids,
        idle_timeout_s=max(60.0, request.stall_timeout_s, first_timeout_s),
        adapter=request.adapter,
    )
