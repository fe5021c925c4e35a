"""One request from prompt to last token, as the requester sees it.

The requester keeps prompt and tokens so far; stages keep only their KV cache. Tokens arrive as parcels with the
request's id; each is counted once, in order of position: a token that comes twice is dropped, one that comes too
early means that an answer was lost on the way, and the request fails with a clear error rather than with a hole.
"""

from __future__ import annotations

import asyncio
import time

import msgspec
import numpy as np
from msgspec import Struct

from wire import frames
from wire.errors import EdgelamError, PeerError, Refused, Unreachable, UsageError
from wire.messages import InboxAddress, RequestMeta, Sampling, StageError
from wire.tensors import Dtype


class GenerateRequest(Struct, frozen=True, kw_only=True):
    """Body of POST /v1/generate. Either `prompt` or `messages`; `raw` sends the prompt without the chat template."""

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
    boards_at_least: int = 1
    boards_at_most: int = 64
    stall_timeout_s: float = 30.0
    """Between two tokens. The first one may take longer, by the plan (coordinator.inference.patience)."""

    def sampling(self) -> Sampling:
        """Checked sampling parameters; raise UsageError naming the one out of range."""
        checks = (
            ("max_tokens", 1 <= self.max_tokens <= 100_000, "1 to 100000"),
            ("temperature", 0 <= self.temperature <= 100, "0 to 100; 0 is greedy"),
            ("top_k", 0 <= self.top_k <= 1_000_000, "0 or more; 0 is off"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", 0 <= self.seed < 2**63, "0 to 2^63 - 1"),
            ("stall_timeout_s", 0 < self.stall_timeout_s <= 3600, "above 0, at most 3600"),
        )
        for name, fine, rule in checks:
            if not fine:
                raise UsageError(f"{name} {getattr(self, name)} is out of range", try_=rule)
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed)


class Token(Struct, frozen=True):
    """One generated token: id, index in the answer, and when it arrived (monotonic)."""

    id: int
    index: int
    arrived_s: float
    final: bool


class Generation:
    """A live request. `feed` takes what arrives; `tokens` yields until the final token or an error."""

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
        self._queue: asyncio.Queue[Token | EdgelamError] = asyncio.Queue()
        self._next_index = 0
        self.finished = False

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

    def cancel_parcel(self) -> frames.Parcel:
        return frames.Parcel(kind=frames.Kind.CLOSE, epoch=self.epoch, request=self.request_id, position=0)

    def feed(self, parcel: frames.Parcel) -> None:
        """Take a parcel that carries this request's id."""
        if self.finished or parcel.epoch != self.epoch:
            return
        if parcel.kind is frames.Kind.ERROR:
            self.fail(_stage_error(parcel.meta))
        elif parcel.kind is frames.Kind.TOKENS and parcel.tensor is not None:
            self._feed_token(parcel, parcel.tensor)

    def _feed_token(self, parcel: frames.Parcel, tensor: frames.Tensor) -> None:
        index = parcel.position - len(self.prompt_ids)
        due = index <= self._next_index and index < self.meta.max_new_tokens
        if not due or tensor.dtype is not Dtype.I32 or tensor.shape != (1,):
            self.fail(PeerError(f"the head sent token {index} where token {self._next_index} was due"))
            return
        if index < self._next_index:
            return
        self._next_index += 1
        self.finished = bool(parcel.flags & frames.FLAG_FINAL)
        self._queue.put_nowait(Token(int(tensor.array()[0]), index, time.monotonic(), self.finished))

    def fail(self, error: EdgelamError) -> None:
        """End the request with an error; later parcels are ignored."""
        if not self.finished:
            self.finished = True
            self._queue.put_nowait(error)

    async def next_token(self) -> Token:
        """Wait for the next token; raise the request's error, or Unreachable after `stall_timeout_s` of silence
        (`first_timeout_s` before the first one)."""
        timeout_s = self.stall_timeout_s if self._next_index else self.first_timeout_s
        try:
            item = await asyncio.wait_for(self._queue.get(), timeout_s)
        except asyncio.TimeoutError:
            self.finished = True
            raise Unreachable(
                f"no token came for {timeout_s:.0f} s (after {self._next_index} tokens)",
                try_="edgelam devices shows which board is silent; then run again",
            ) from None
        if isinstance(item, EdgelamError):
            raise item
        return item


def _stage_error(meta: bytes) -> EdgelamError:
    try:
        told = msgspec.json.decode(meta, type=StageError)
    except (msgspec.DecodeError, msgspec.ValidationError):
        return PeerError("a stage reported an error that can't be read")
    where = f"stage {told.stage} on {told.device}"
    if told.code == "busy":
        return Refused(f"{where} is busy: {told.text}", try_="run again in a moment, or deploy with more slots")
    if told.code == "too-long":
        return Refused(f"{where}: {told.text}", try_="a shorter prompt, or a larger --context")
    return EdgelamError(f"{where} failed ({told.code}): {told.text}", try_="run again; edgelam devices shows the state")


def request_meta(
    reply: InboxAddress,
    request: GenerateRequest,
    prompt_tokens: int,
    stop_ids: tuple[int, ...],
    first_timeout_s: float,
) -> RequestMeta:
    """What every stage must know; raise UsageError for sampling parameters out of range. Stages keep a silent request
    at least as long as its requester waits for it."""
    return RequestMeta(
        reply=reply,
        sampling=request.sampling(),
        prompt_tokens=prompt_tokens,
        max_new_tokens=request.max_tokens,
        stop_ids=() if request.ignore_stop else stop_ids,
        idle_timeout_s=max(60.0, request.stall_timeout_s, first_timeout_s),
    )
