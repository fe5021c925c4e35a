"""The requests that hold a slot of a stage: how they begin, and every way in which they end."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from agent.orders import is_inbox
from agent.workers.arrivals import unfit_request
from agent.workers.due import Due
from agent.workers.requests import Live, Tally
from agent.workers.sending import Sending
from models.engine.base import ContextFull, EngineFailed, NoSlot, StageEngine
from wire.errors import EdgelamError, PeerError
from wire.frames import Parcel
from wire.messages import RequestMeta, StageOrder, decode

REMEMBERED_CLOSED: Final = 1024
"""Parcels of a request that was closed a moment ago may still be under way; they are no error."""


class Held:
    """`lives` by their numbers, and the `order` in force. What ends here is told to those who must know."""

    def __init__(self, order: StageOrder, engine: StageEngine, say: Sending, due: Due, tally: Tally, site: str) -> None:
        self.order = order
        self.lives: dict[int, Live] = {}
        self.last_refusal = ""
        self._engine = engine
        self._say = say
        self._due = due
        self._tally = tally
        self._site = site
        self._closed: OrderedDict[int, None] = OrderedDict()

    def open(self, parcel: Parcel, now_s: float) -> Live | None:
        """Take a slot for a new request; None if it can't be taken, and then the requester knows."""
        try:
            meta = decode(parcel.meta, RequestMeta, "request")
        except PeerError as error:
            self.refuse(error.message)
            return None
        if not is_inbox(meta.reply.topic, self._site) or meta.reply.broker:
            self.refuse(f"{meta.reply.topic!r} is not an inbox of this site")
            return None
        if parcel.position != 0:
            self.refuse(f"a request begins at row 0, not {parcel.position}")
            self.fail(meta.reply.topic, parcel.request, "protocol", "a request begins at row 0")
            return None
        self.free(parcel.request)
        code, text = unfit_request(self.order, meta, parcel.tensor)
        if code:
            self.fail(meta.reply.topic, parcel.request, code, text)
            return None
        try:
            slot = self._engine.open(meta.adapter)
        except NoSlot:
            text = f"all {self.order.slots} slots of stage {self.order.stage} are taken"
            self.fail(meta.reply.topic, parcel.request, "busy", text)
            return None
        except EngineFailed as error:
            self.fail(meta.reply.topic, parcel.request, "engine", error.message)
            return None
        self._tally.requests += 1
        self._closed.pop(parcel.request, None)
        live = Live(
            parcel.request, slot, meta.reply.topic, meta.sampling, meta.prompt_tokens, meta.max_new_tokens,
            frozenset(meta.stop_ids), meta.idle_timeout_s, parcel.meta, now_s,
            replay_tokens=meta.replay_tokens, alone=meta.alone, speculate=meta.speculate, padded=meta.padded,
        )  # fmt: skip
        self.lives[parcel.request] = live
        return live

    def closed_lately(self, request: int) -> bool:
        return request in self._closed

    def free(self, request: int) -> bool:
        """Give a request's slot back; False if it is not known."""
        live = self.lives.pop(request, None)
        if live is None:
            return False
        self._engine.close(live.slot)
        self._due.leave(request)
        self._remember_closed(request)
        return True

    def free_idle(self, now_s: float) -> None:
        """Free requests whose next rows did not come in time."""
        waiting = {unit.live.request for unit in self._due.waiting()}
        for live in list(self.lives.values()):
            if live.request not in waiting and now_s - live.seen_s > live.idle_timeout_s:
                self._tally.idle += 1
                self.free(live.request)

    def free_all(self) -> None:
        for request in list(self.lives):
            self.free(request)

    def adopt(self, order: StageOrder) -> None:
        """Take a new epoch. No request of the old one may be left."""
        self._closed.clear()
        self.order = order

    def end(self, live: Live) -> None:
        """Free a request here and at the other stages, unless that was done."""
        if self.free(live.request):
            self._say.close(live.request, self.order.stages - 1)

    def drop(self, live: Live) -> None:
        """End a request whose token could not be sent."""
        self._tally.unsent += 1
        self.end(live)

    def fail(self, reply: str, request: int, code: Any, text: str) -> None:
        """Tell the requester why its request ends here, and the other stages that it does."""
        self.free(request)
        self._remember_closed(request)
        self._say.error(reply, request, code, text)
        self._say.close(request, self.order.stages - 1)

    def fail_too_long(self, live: Live, tokens: int) -> None:
        text = f"{tokens} tokens, the deployment holds {self.order.context_tokens} per request"
        self.fail(live.reply, live.request, "too-long", text)

    def fail_step(self, live: Live, error: EdgelamError) -> None:
        code = "too-long" if isinstance(error, ContextFull) else "engine"
        self.fail(live.reply, live.request, code, error.message)

    def fail_protocol(self, live: Live, problem: str) -> None:
        self.refuse(problem)
        self.fail(live.reply, live.request, "protocol", problem)

    def refuse(self, text: str) -> None:
        """Count what fits no request."""
        self._tally.refused += 1
        self.last_refusal = text

    def _remember_closed(self, request: int) -> None:
        self._closed[request] = None
        if len(self._closed) > REMEMBERED_CLOSED:
            self._closed.popitem(last=False)
