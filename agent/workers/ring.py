"""What one stage does with the parcels of its ring. No sockets and no engine of its own: both are given.

    requester --TOKENS(prompt, meta)--> first --HIDDEN(meta on the first chunk)--> .. --> head --TOKENS--> requester
                                          ^                                                |
                                          +------------------TOKENS(1 id)------------------+

A prompt is cut into chunks, so that all stages work at once; FLAG_FINAL marks its last one, upon which the head draws
the first token. The head sends each token to the requester and to the first stage; the last one only to the requester,
with FLAG_FINAL. After each prefill chunk decode steps have the right of way for as long as the chunk took: a long
prompt slows the answers under way at most to half, and they don't starve it.

CLOSE frees a request everywhere. Its `position` is the number of stages still to visit, the receiver included; 0, as
requesters send it, means: all that follow, if you know the request. A stage that can't go on with a request tells the
requester with an ERROR and sends a CLOSE round the ring. Parcels of another epoch are dropped and counted: the
requester keeps prompt and tokens and begins again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from agent.orders import is_inbox
from agent.workers.requests import Live, Made, Tally, Unit, chunks_of
from agent.workers.stretch import Stretch
from models.engine.base import ContextFull, EngineFailed, NoSlot, StageEngine
from wire.channel import Backlogged, Delivery
from wire.errors import PeerError
from wire.frames import FLAG_FINAL, Dtype, Kind, Parcel, Tensor
from wire.messages import RequestMeta, Sampling, StageError, StageOrder, decode
from wire.transport import NotConnected

HIDDEN_DTYPE: Final = {"f32": Dtype.F32, "f16": Dtype.F16, "bf16": Dtype.BF16}

MAX_NEXT_BACKLOG_BYTES: Final = 256 * 1024
"""No further prefill chunk while so much waits for the next stage's credit: decode steps would queue behind it."""

REMEMBERED_CLOSED: Final = 1024
"""Parcels of a request that was closed a moment ago may still be under way; they are no error."""


class Sender(Protocol):
    """Where parcels go. Both methods raise NotConnected or Backlogged."""

    @property
    def next_backlog_bytes(self) -> int: ...

    @property
    def next_bytes(self) -> int:
        """Bytes of frames that went to the next stage so far."""

    def to_next(self, parcel: Parcel) -> None: ...

    def to_requester(self, topic: str, parcel: Parcel) -> None: ...


class StageWork:
    """`draw(logits, sampling, position)` gives a token; `done(delivery)` returns credit to a sender."""

    def __init__(
        self,
        order: StageOrder,
        engine: StageEngine,
        sender: Sender,
        done: Callable[[Delivery], None],
        draw: Callable[[Any, Sampling, int], int],
        stretch: Stretch,
        site: str,
        device: str,
    ) -> None:
        self.order = order
        self.tally = Tally()
        self.last_refusal = ""
        self.made: Made | None = None
        """A step that was made before its rows were filed (agent.workers.ahead)."""
        self._engine = engine
        self._sender = sender
        self._done = done
        self._draw = draw
        self._stretch = stretch
        self._site = site
        self._device = device
        self._dtype = HIDDEN_DTYPE[order.wire_dtype]
        self._live: dict[int, Live] = {}
        self._closed: OrderedDict[int, None] = OrderedDict()
        self._decode: deque[Unit] = deque()
        self._prefill: deque[Unit] = deque()
        self._decode_first_s = 0.0
        """Seconds that decode steps may still take before the next prefill chunk."""

    @property
    def live(self) -> int:
        """Requests that hold a slot."""
        return len(self._live)

    @property
    def ended(self) -> int:
        """Requests that had a slot and have it no more."""
        return self.tally.requests - len(self._live)

    @property
    def runnable(self) -> bool:
        """Whether `work` would make a step now."""
        return bool(self._decode) or (bool(self._prefill) and self._room_ahead())

    def foreseen(self) -> Live | None:
        """The request whose next row is all that can come next, as far as one can tell, and whose step would not be its
        last; its rows until now were run. None if there is more than one request, or none that far."""
        if len(self._live) != 1 or self._decode or self._prefill or self.order.stages == 1:
            return None
        [live] = self._live.values()
        if live.run != live.filed or live.run <= live.prompt_tokens or live.run + 1 >= self.order.context_tokens:
            return None
        if self.order.head and live.run + 2 - live.prompt_tokens >= live.max_new_tokens:
            return None
        return live

    def parcel_of_row(self, live: Live, tensor: Tensor) -> Parcel:
        """What goes to the next stage after the step over row `live.run`: hidden states, or the head's token."""
        kind, position = (Kind.TOKENS, live.run + 1) if self.order.head else (Kind.HIDDEN, live.run)
        return Parcel(kind, self.order.epoch, live.request, position, 0, tensor)

    def tensor(self, result: Any) -> Tensor:
        """Hidden states as they travel."""
        return Tensor.bf16(result) if self._dtype is Dtype.BF16 else Tensor.of(result)

    def accept(self, delivery: Delivery, now_s: float) -> None:
        """File a parcel that arrived, or refuse it. Never raises for what came from the network."""
        parcel = delivery.parcel
        kept = False
        if parcel.epoch != self.order.epoch & 0xFFFFFFFF:
            self.tally.stale += 1
        elif parcel.kind is Kind.CLOSE:
            self._on_close(parcel)
        elif parcel.kind is (Kind.TOKENS if self.order.embedding else Kind.HIDDEN) and parcel.tensor is not None:
            kept = self._on_rows(delivery, parcel, parcel.tensor, now_s)
        else:
            self._refuse(f"{parcel.kind.name} is not for this stage")
        if not kept:
            self._done(delivery)

    def work(self, now_s: float) -> bool:
        """Make one step; False if there was none to make."""
        prefill = bool(self._prefill) and self._room_ahead()
        if self._decode and (self._decode_first_s > 0 or not prefill):
            unit = self._decode.popleft()
        elif prefill:
            unit = self._prefill.popleft()
        else:
            return False
        try:
            self._step(unit, now_s)
        finally:
            if unit.delivery is not None:
                self._done(unit.delivery)
        return True

    def tick(self, now_s: float) -> None:
        """Free requests whose next rows did not come in time. Call every second or so."""
        waiting = {unit.live.request for unit in (*self._decode, *self._prefill)}
        for live in list(self._live.values()):
            if live.request not in waiting and now_s - live.seen_s > live.idle_timeout_s:
                self.tally.idle += 1
                self._free(live.request)

    def adopt(self, order: StageOrder) -> None:
        """Take a new epoch: all requests of the old one are dropped."""
        self.drop_all()
        self._closed.clear()
        self.order = order

    def drop_all(self) -> None:
        """Free all slots, as after a lost connection: parcels under way are gone, the requesters begin again."""
        self.made = None
        for request in list(self._live):
            self._free(request)
        for unit in (*self._decode, *self._prefill):
            if unit.delivery is not None:
                self._done(unit.delivery)
        self._decode.clear()
        self._prefill.clear()

    # Arrivals.

    def _on_rows(self, delivery: Delivery, parcel: Parcel, tensor: Tensor, now_s: float) -> bool:
        """File rows; True if the delivery is kept until they were run."""
        live = self._open(parcel, now_s) if parcel.meta else self._live.get(parcel.request)
        if live is None:
            if not parcel.meta and parcel.request not in self._closed:
                self._refuse(f"rows from {parcel.position} of a request that is not known")
            return False
        rows, problem = self._checked_rows(parcel, tensor)
        if parcel.position != live.filed:
            problem = f"rows from {parcel.position} came, rows from {live.filed} were due"
        if problem:
            self._refuse(problem)
            self._fail(live.reply, live.request, "protocol", problem)
            return False
        live.seen_s = now_s
        count = tensor.shape[0]
        if live.filed + count > self.order.context_tokens:
            text = f"{live.filed + count} tokens, the deployment holds {self.order.context_tokens} per request"
            self._fail(live.reply, live.request, "too-long", text)
            return False
        live.filed += count
        if self.order.embedding and parcel.meta:
            self._file_prompt(live, rows, parcel.meta)
            return False
        final = parcel.final or live.filed > live.prompt_tokens
        self._file(Unit(live, rows, count, final, delivery, parcel.meta))
        return True

    def _checked_rows(self, parcel: Parcel, tensor: Tensor) -> tuple[Any, str]:
        """The rows as the engine wants them, or what is wrong with them."""
        if self.order.embedding:
            if tensor.dtype is not Dtype.I32 or len(tensor.shape) != 1:
                return None, f"token ids as {tensor.dtype.name} {tensor.shape}, they are I32 [n]"
            ids = tensor.array()
            least, most = (int(ids[0]),) * 2 if len(ids) == 1 else (int(ids.min()), int(ids.max()))
            if least < 0 or most >= self.order.vocabulary:
                return None, f"a token id is not in 0 to {self.order.vocabulary - 1}"
            if len(ids) > 1 and not parcel.meta:
                return None, "more than one token without meta"
            return ids.astype(np.int64), ""
        if tensor.dtype is not self._dtype or len(tensor.shape) != 2 or tensor.shape[1] != self.order.hidden:
            wanted = f"{self._dtype.name} [n, {self.order.hidden}]"
            return None, f"hidden states as {tensor.dtype.name} {tensor.shape}, they are {wanted}"
        return tensor.array(), ""

    def _open(self, parcel: Parcel, now_s: float) -> Live | None:
        """Take a slot for a new request; None if it can't be taken, and then the requester knows."""
        try:
            meta = decode(parcel.meta, RequestMeta, "request")
        except PeerError as error:
            self._refuse(error.message)
            return None
        if not is_inbox(meta.reply.topic, self._site) or meta.reply.broker:
            self._refuse(f"{meta.reply.topic!r} is not an inbox of this site")
            return None
        if parcel.position != 0:
            self._refuse(f"a request begins at row 0, not {parcel.position}")
            self._fail(meta.reply.topic, parcel.request, "protocol", "a request begins at row 0")
            return None
        self._free(parcel.request)
        if self.order.embedding and parcel.tensor is not None and parcel.tensor.shape[0] != meta.prompt_tokens:
            text = f"meta says {meta.prompt_tokens} prompt tokens, {parcel.tensor.shape[0]} came"
            self._fail(meta.reply.topic, parcel.request, "protocol", text)
            return None
        if meta.prompt_tokens > self.order.context_tokens:
            text = f"{meta.prompt_tokens} prompt tokens, the deployment holds {self.order.context_tokens} per request"
            self._fail(meta.reply.topic, parcel.request, "too-long", text)
            return None
        try:
            slot = self._engine.open()
        except NoSlot:
            text = f"all {self.order.slots} slots of stage {self.order.stage} are taken"
            self._fail(meta.reply.topic, parcel.request, "busy", text)
            return None
        except EngineFailed as error:
            self._fail(meta.reply.topic, parcel.request, "engine", error.message)
            return None
        self.tally.requests += 1
        self._closed.pop(parcel.request, None)
        live = Live(
            parcel.request, slot, meta.reply.topic, meta.sampling, meta.prompt_tokens, meta.max_new_tokens,
            frozenset(meta.stop_ids), meta.idle_timeout_s, parcel.meta, now_s,
        )  # fmt: skip
        self._live[parcel.request] = live
        return live

    def _file_prompt(self, live: Live, ids: Any, meta: bytes) -> None:
        """Cut the prompt into chunks and file them."""
        for start, end in chunks_of(len(ids), self.order.prefill_chunk_tokens):
            chunk_meta = meta if start == 0 else b""
            self._file(Unit(live, ids[start:end], end - start, end == len(ids), None, chunk_meta))

    def _file(self, unit: Unit) -> None:
        """One row is a decode step, unless chunks of the same request still wait."""
        behind = any(waiting.live is unit.live for waiting in self._prefill) if self._prefill else False
        if unit.count == 1 and not behind:
            self._decode.append(unit)
        else:
            self._prefill.append(unit)

    def _on_close(self, parcel: Parcel) -> None:
        """Free the request here and pass the CLOSE on, as far as it has to go."""
        known = self._free(parcel.request)
        others = self.order.stages - 1
        left = min(parcel.position - 1, others) if parcel.position else (others if known else 0)
        if left > 0:
            self._send_close(parcel.request, left)

    # Steps.

    def _step(self, unit: Unit, now_s: float) -> None:
        live = unit.live
        if self._live.get(live.request) is not live:
            return  # Closed while it waited.
        made, self.made = self.made, None
        if made is None or made.live is not live or made.position != live.run or unit.count != 1:
            made = self._make(unit, live)
        if made.error is not None:
            code = "too-long" if isinstance(made.error, ContextFull) else "engine"
            self._fail(live.reply, live.request, code, made.error.message)
            return
        busy_s = made.busy_s
        live.run += unit.count
        live.seen_s = now_s + busy_s
        if unit.count == 1:
            self.tally.decode_steps += 1
            self.tally.decode_busy_s += busy_s
            self._decode_first_s -= busy_s
        else:
            self.tally.prefill_steps += 1
            self.tally.prefill_tokens += unit.count
            self.tally.prefill_busy_s += busy_s
            self._decode_first_s = busy_s
        if made.sent_bytes:
            self.tally.decode_sent_bytes += made.sent_bytes
        if not self.order.head:
            if not made.sent_bytes:
                self._pass_on(unit, live, made.result)
        elif made.token >= 0:
            self._give_token(live, made.token, bool(made.sent_bytes))

    def _make(self, unit: Unit, live: Live) -> Made:
        self._stretch.begin()
        try:
            result = self._engine.step(live.slot, unit.rows, live.run)
            draws = self.order.head and unit.final
            token = self._draw(result, live.sampling, live.run + unit.count) if draws else -1
        except (ContextFull, EngineFailed) as error:
            return Made(live=live, position=live.run, error=error)
        return Made(live=live, position=live.run, busy_s=self._stretch.end(), result=result, token=token)

    def _pass_on(self, unit: Unit, live: Live, result: Any) -> None:
        tensor = self.tensor(result)
        # FLAG_FINAL matters up to the last chunk of the prompt; a decode step is known by its position.
        flags = FLAG_FINAL if unit.final and live.run <= live.prompt_tokens else 0
        parcel = Parcel(Kind.HIDDEN, self.order.epoch, live.request, live.run - unit.count, flags, tensor, unit.meta)
        before_bytes = self._sender.next_bytes
        try:
            self._sender.to_next(parcel)
        except (NotConnected, Backlogged) as error:
            self.tally.unsent += 1
            self._fail(live.reply, live.request, "deadline", error.message)
            return
        if unit.count == 1:
            self.tally.decode_sent_bytes += self._sender.next_bytes - before_bytes

    def _give_token(self, live: Live, token: int, sent: bool) -> None:
        """Send a token to the first stage, unless it is the last or was `sent` there, and to the requester."""
        given = live.run - live.prompt_tokens + 1
        finished = token in live.stop_ids or given >= live.max_new_tokens or live.run >= self.order.context_tokens
        ids = np.array([token], dtype=np.int32)
        flags = FLAG_FINAL if finished else 0
        parcel = Parcel(Kind.TOKENS, self.order.epoch, live.request, live.run, flags, Tensor.of(ids))
        try:
            if finished:
                self._free(live.request)
                if self.order.stages > 1:
                    self._send_close(live.request, self.order.stages - 1)
            elif self.order.embedding:
                live.filed += 1
                self._file(Unit(live, ids.astype(np.int64), 1, True))
            elif not sent:
                before_bytes = self._sender.next_bytes
                self._sender.to_next(parcel)
                self.tally.decode_sent_bytes += self._sender.next_bytes - before_bytes
            self._sender.to_requester(live.reply, parcel)
        except (NotConnected, Backlogged):
            self.tally.unsent += 1
            if self._free(live.request) and self.order.stages > 1:
                self._send_close(live.request, self.order.stages - 1)

    # Ends.

    def _free(self, request: int) -> bool:
        """Give a request's slot back; False if it is not known."""
        live = self._live.pop(request, None)
        if live is None:
            return False
        self._engine.close(live.slot)
        self._remember_closed(request)
        return True

    def _remember_closed(self, request: int) -> None:
        self._closed[request] = None
        if len(self._closed) > REMEMBERED_CLOSED:
            self._closed.popitem(last=False)

    def _fail(self, reply: str, request: int, code: Any, text: str) -> None:
        """Tell the requester why its request ends here, and the other stages that it does."""
        self._free(request)
        self._remember_closed(request)
        error = StageError(stage=self.order.stage, device=self._device, code=code, text=text[:4096])
        parcel = Parcel(Kind.ERROR, self.order.epoch, request, 0, FLAG_FINAL, None, msgspec.json.encode(error))
        try:
            self._sender.to_requester(reply, parcel)
        except (NotConnected, Backlogged):
            self.tally.unsent += 1
        if self.order.stages > 1:
            self._send_close(request, self.order.stages - 1)

    def _send_close(self, request: int, left: int) -> None:
        try:
            self._sender.to_next(Parcel(Kind.CLOSE, self.order.epoch, request, left))
        except (NotConnected, Backlogged):
            self.tally.unsent += 1

    def _refuse(self, text: str) -> None:
        self.tally.refused += 1
        self.last_refusal = text

    def _room_ahead(self) -> bool:
        return self._sender.next_backlog_bytes <= MAX_NEXT_BACKLOG_BYTES
