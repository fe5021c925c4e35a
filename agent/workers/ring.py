"""What one stage does with the parcels of its ring. No sockets and no engine of its own: both are given.

    requester --TOKENS(prompt, meta)--> first --HIDDEN(meta on the first chunk)--> .. --> head --TOKENS--> requester
                                          ^                                                |
                                          +------------------TOKENS(1 id)------------------+

A prompt is cut into chunks, so that all stages work at once; FLAG_FINAL marks its last one, upon which the head draws
the first token. The head sends each token to the requester and to the first stage; the last one only to the requester,
with FLAG_FINAL. Whose turn it is, of prompts and answers, is in agent.workers.due.

Requests that are answered at the same time go round in groups, of which the first stage has at most one per stage
(agent.workers.groups): a group's rows make one step, and go on as one ROWS parcel. What fails one row of it, or ends
its request, leaves the others alone.

Where tokens are guessed, a step has the rows of the last token and of guesses (FLAG_DRAFTS), and the head gives one
token or several (agent.workers.guessing).

CLOSE frees a request everywhere. Its `position` is the number of stages still to visit, the receiver included; 0, as
requesters send it, means: all that follow, if you know the request. A stage that can't go on with a request tells the
requester with an ERROR and sends a CLOSE round the ring. Parcels of another epoch are dropped and counted: the
requester keeps prompt and tokens and begins again.

Parts: requests that hold a slot (held), what came (filing), what waits (due), its steps (steps), what goes (sending).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent.workers.due import Due
from agent.workers.filing import Filing
from agent.workers.held import Held
from agent.workers.requests import Live, Made, Tally, Unit
from agent.workers.sending import UNSENT, Sender, Sending
from agent.workers.standing import inquiry_of, standing_parcel
from agent.workers.steps import Steps
from agent.workers.stretch import Stretch
from models.engine.base import StageEngine
from wire.channel import Delivery
from wire.errors import PeerError
from wire.frames import Kind, Parcel, Tensor
from wire.messages import Sampling, StageOrder, Standing, StepMark


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
        self.tally = tally = Tally()
        self._sender = sender
        self._done = done
        self._site = site
        self._say = Sending(order, sender, tally, device)
        self._due = Due(order, sender, tally)
        self._held = Held(order, engine, self._say, self._due, tally, site)
        self._filing = Filing(self._held, self._due, tally)
        self._steps = Steps(engine, self._held, self._due, self._filing, self._say, draw, stretch, tally)

    @property
    def order(self) -> StageOrder:
        """What the stage is, in the epoch in force."""
        return self._held.order

    @property
    def last_refusal(self) -> str:
        return self._held.last_refusal

    @property
    def marks(self) -> tuple[StepMark, ...]:
        """When its last steps were made."""
        return self._steps.marks.recent

    @property
    def live(self) -> int:
        """Requests that hold a slot."""
        return len(self._held.lives)

    @property
    def ended(self) -> int:
        """Requests that had a slot and have it no more."""
        return self.tally.requests - len(self._held.lives)

    @property
    def runnable(self) -> bool:
        """Whether `work` would make a step now."""
        return self._due.runnable

    def foreseen(self) -> Live | None:
        """The request whose next row is all that can come next, as far as one can tell, and whose step would not be its
        last; its rows until now were run. None if there is more than one request, or none that far."""
        lives, order = self._held.lives, self._held.order
        if len(lives) != 1 or not self._due.idle or order.stages == 1:
            return None
        [live] = lives.values()
        if live.padded or live.settled != live.filed or live.drafting is not None:
            return None
        if live.run != live.filed or live.run <= live.prompt_tokens or live.run + 1 >= order.context_tokens:
            return None
        if order.head and live.run + 2 - live.prompt_tokens >= live.max_new_tokens:
            return None
        return live

    def made_ahead(self, made: Made) -> None:
        """This step was made before its rows are filed (agent.workers.ahead)."""
        self._steps.made = made
        self._due.expect(made.live)

    def parcel_of_row(self, live: Live, tensor: Tensor) -> Parcel:
        return self._say.parcel_of_row(live, tensor)

    def tensor(self, result: Any) -> Tensor:
        return self._say.tensor(result)

    def accept(self, delivery: Delivery, now_s: float) -> None:
        """File a parcel that arrived, or refuse it. Never raises for what came from the network."""
        parcel, order = delivery.parcel, self._held.order
        kept = False
        if parcel.kind is Kind.INQUIRY:
            self._on_inquiry(parcel)
        elif parcel.epoch != order.epoch & 0xFFFFFFFF:
            self.tally.stale += 1
        elif order.standby:
            self._held.refuse(f"{parcel.kind.name} came to a standby, which makes no steps")
        elif parcel.kind is Kind.CLOSE:
            self._on_close(parcel)
        elif parcel.kind is Kind.ROWS and parcel.tensor is not None:
            kept = self._filing.rows_of_many(delivery, parcel, parcel.tensor, now_s)
        elif parcel.kind is (Kind.TOKENS if order.embedding else Kind.HIDDEN) and parcel.tensor is not None:
            kept = self._filing.rows(delivery, parcel, parcel.tensor, now_s)
        else:
            self._held.refuse(f"{parcel.kind.name} is not for this stage")
        if not kept:
            self._done(delivery)

    def work(self, now_s: float) -> bool:
        """Make one step; False if there was none to make."""
        units = self._due.take(now_s, self._held.lives.values())
        if not units:
            return False
        try:
            self._steps.make(units, now_s)
        finally:
            self._give_back(units)
        return True

    def tick(self, now_s: float) -> None:
        """Free requests whose next rows did not come in time. Call every second or so."""
        self._due.tick(now_s)
        self._held.free_idle(now_s)

    def adopt(self, order: StageOrder) -> None:
        """Take a new epoch: all requests of the old one are dropped."""
        self.drop_all()
        self._say.order = order
        self._held.adopt(order)
        self._due.adopt(order)

    def drop_all(self) -> None:
        """Free all slots, as after a lost connection: parcels under way are gone, the requesters begin again."""
        self._steps.made = None
        self._steps.marks.forget()
        units = self._due.waiting()
        self._held.free_all()
        self._give_back(units)
        self._due.clear()

    def _on_close(self, parcel: Parcel) -> None:
        """Free the request here and pass the CLOSE on, as far as it has to go."""
        known = self._held.free(parcel.request)
        others = self._held.order.stages - 1
        self._say.close(parcel.request, min(parcel.position - 1, others) if parcel.position else others * known)

    def _on_inquiry(self, parcel: Parcel) -> None:
        """Say how a request stands here; one of another epoch is not known."""
        order = self._held.order
        try:
            inquiry = inquiry_of(parcel, self._site)
        except PeerError as error:
            self._held.refuse(error.message)
            return
        live = self._held.lives.get(parcel.request) if parcel.epoch == order.epoch & 0xFFFFFFFF else None
        standing = Standing(stage=order.stage, number=inquiry.number, known=live is not None)
        if live is not None:
            waiting = live.run != live.filed or self._sender.next_backlog_bytes > 0
            standing = msgspec.structs.replace(standing, filed=live.filed, run=live.run, waiting=waiting)
        try:
            self._sender.to_requester(inquiry.reply.topic, standing_parcel(parcel, standing))
        except UNSENT:
            self.tally.unsent += 1

    def _give_back(self, units: Sequence[Unit]) -> None:
        """Their rows are no longer needed."""
        for unit in units:
            if unit.delivery is not None:
                self._done(unit.delivery)
