"""The worker that holds one stage: `python -m agent.workers.inference`, its assignment as the first line on stdin.

One thread receives, computes and sends: there is no hand-over on the way of a token. Between two steps the transport is
polled without waiting, so that what is more urgent than the next prefill chunk is seen before it.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from agent.workers.ahead import StepAhead
from agent.workers.child import Parent, become_worker
from agent.workers.dataplane import data_connection
from agent.workers.echo import Echo
from agent.workers.outboxes import Outboxes
from agent.workers.pipe import Assignment, Status, Tell
from agent.workers.ring import StageWork
from agent.workers.stretch import Stretch
from hwprofiles.measure import resident_bytes
from models.engine.base import EngineFailed, StageEngine, StageSpec
from models.sampling import draw
from wire.channel import Delivery, Inbox
from wire.errors import EdgelamError
from wire.messages import StageCounters, StageOrder
from wire.transport import ShortWay, Transport
from wire.units import bytes_text

LOG = logging.getLogger("edgelam.inference")

POLL_S: Final = 0.25
"""Longest wait without work: bounds how late ticks and the supervisor's words are seen; `wake` cuts it short."""

TICK_S: Final = 0.25
REPORT_PERIOD_S: Final = 1.0


def main() -> int:
    """Hold a stage until told to stop, or until the supervisor is gone."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    parent = become_worker()
    assignment = parent.first(Assignment)
    order = assignment.order
    parent.say(Status(phase="loading", epoch=order.epoch))
    try:
        engine = load(assignment)
    except (EdgelamError, OSError) as error:
        parent.say(Status(phase="failed", epoch=order.epoch, detail=str(error), final=True))
        return 1
    transport = data_connection(assignment.login)
    parent.listen(transport.wake)
    # What is loaded stays: the garbage collector need not walk it again and hold up a token.
    gc.collect()
    gc.freeze()
    Worker(assignment, engine, transport, parent).run()
    return 0


def load(assignment: Assignment) -> StageEngine:
    """Load the stage and make one step with it, so that `ready` means that it works. Raises EngineFailed."""
    order = assignment.order
    for address in (order.inbox, order.next):
        if address.broker and address.broker != assignment.login.url:
            raise EngineFailed(f"inbox at {address.broker}: this version knows the topology 'central' only")
    spec = spec_of(order, assignment.threads)
    weights = [Path(path) for path in assignment.weight_paths]
    if order.engine == "torch":
        from models.engine.torch import TorchStage

        engine: StageEngine = TorchStage.load(Path(assignment.graph_path), weights, spec)
    else:
        from models.engine.onnx import OnnxStage

        engine = OnnxStage.load(Path(assignment.graph_path), weights, spec)
    warm_up(engine, order)
    held = resident_bytes()
    if 0 < assignment.memory_limit_bytes < held:
        raise EngineFailed(
            f"out of memory: the stage needs {bytes_text(held)}, "
            f"the device has {bytes_text(assignment.memory_limit_bytes)} (emulated)"
        )
    return engine


def spec_of(order: StageOrder, threads: int) -> StageSpec:
    return StageSpec(
        embedding=order.embedding,
        head=order.head,
        first_block=order.first_block,
        end_block=order.end_block,
        hidden=order.hidden,
        vocabulary=order.vocabulary,
        wire_dtype=order.wire_dtype,
        context_tokens=order.context_tokens,
        slots=order.slots,
        threads=threads,
        config=order.config,
    )


def warm_up(engine: StageEngine, order: StageOrder) -> None:
    """One prefill step and one decode step on zeros."""
    slot = engine.open()
    try:
        engine.step(slot, zeros(order, 2), 0)
        if order.context_tokens > 2:
            engine.step(slot, zeros(order, 1), 2)
    finally:
        engine.close(slot)


def zeros(order: StageOrder | StageSpec, rows: int) -> Any:
    """Input of the right kind for a stage: token ids, or hidden states in wire dtype."""
    if order.embedding:
        return np.zeros(rows, dtype=np.int64)
    return np.zeros((rows, order.hidden), dtype={"f32": "f4", "f16": "f2", "bf16": "u2"}[order.wire_dtype])


class Worker:
    """A loaded stage on a transport."""

    def __init__(self, assignment: Assignment, engine: StageEngine, transport: Transport, parent: Parent) -> None:
        self._assignment = assignment
        self._engine = engine
        self._transport = transport
        self._parent = parent
        order = assignment.order
        self._inbox = Inbox(transport, order.inbox.topic)
        self._outboxes = Outboxes(transport, order.next)
        stretch = Stretch(assignment.speed, assignment.threads)
        self._work = StageWork(
            order, engine, self._outboxes, self._done, draw, stretch, assignment.site, assignment.device
        )
        self._ahead: StepAhead | None = None
        if isinstance(transport, ShortWay):
            transport.ahead = self._ahead = StepAhead(transport, self._outboxes, self._work, engine, draw, stretch)
        self._told_ended = 0
        self._stopping = False
        self._ready = False
        self._echo: Echo | None = None
        """What must come back before the inbox is known to be open."""
        transport.on_up(self._on_up)
        transport.on_down(self._on_down)

    def run(self) -> None:
        """Serve until told to stop."""
        transport, inbox, work, clock = self._transport, self._inbox, self._work, time.monotonic
        transport.start()
        next_tick_s = next_report_s = 0.0
        while not self._stopping and not self._parent.gone:
            if self._ahead is not None:
                self._foresee(self._ahead)
            transport.poll(0.0 if work.runnable else POLL_S)
            now_s = clock()
            while (delivery := inbox.take()) is not None:
                if self._echo is None or not self._heard(self._echo, delivery):
                    work.accept(delivery, now_s)
            work.work(now_s)
            if work.ended != self._told_ended and self._ready:
                self._told_ended = work.ended
                self._report(answered=True)
            if now_s >= next_tick_s:
                next_tick_s = now_s + TICK_S
                self._tick(now_s)
                inbox = self._inbox
                if self._ready and now_s >= next_report_s:
                    next_report_s = now_s + REPORT_PERIOD_S
                    self._report()
        transport.close()

    def _foresee(self, ahead: StepAhead) -> None:
        if self._ready and not self._work.runnable:
            ahead.lay_out(self._inbox)
        else:
            ahead.forget()

    def _done(self, delivery: Delivery) -> None:
        self._inbox.done(delivery)

    def _tick(self, now_s: float) -> None:
        self._inbox.tick()
        self._outboxes.tick()
        self._work.tick(now_s)
        if self._echo is not None:
            self._echo.send()
        for told in self._parent.told(Tell):
            if told.adopt is not None:
                self._adopt(told.adopt)
            self._stopping = self._stopping or told.stop

    def _adopt(self, order: StageOrder) -> None:
        self._ready = False
        self._work.adopt(order)
        self._outboxes.redirect(order.next)
        if order.inbox.topic != self._inbox.topic:
            self._inbox.close()
            self._inbox = Inbox(self._transport, order.inbox.topic)
        self._on_up()

    def _on_up(self) -> None:
        """Subscribed; the stage is ready when its inbox proves to be open."""
        if self._echo is not None:
            self._echo.close()
        self._echo = Echo(self._transport, self._inbox.topic)
        self._echo.send()

    def _heard(self, echo: Echo, delivery: Delivery) -> bool:
        """Take the echo, and say that the stage is ready; False for any other parcel."""
        if not echo.is_answer(delivery.parcel):
            return False
        self._done(delivery)
        echo.close()
        self._echo = None
        self._ready = True
        self._report()
        return True

    def _on_down(self, reason: str) -> None:
        LOG.warning("broker lost: %s", reason)
        self._work.drop_all()
        self._ready = False
        self._parent.say(Status(phase="loading", epoch=self._work.order.epoch, detail=f"broker lost: {reason}"))

    def _report(self, answered: bool = False) -> None:
        order, tally = self._work.order, self._work.tally
        counters = StageCounters(
            deployment=order.deployment,
            epoch=order.epoch,
            stage=order.stage,
            requests=tally.requests,
            prefill_steps=tally.prefill_steps,
            prefill_tokens=tally.prefill_tokens,
            prefill_busy_s=tally.prefill_busy_s,
            decode_steps=tally.decode_steps,
            decode_busy_s=tally.decode_busy_s,
            sent_frames=self._outboxes.frames,
            sent_bytes=self._transport.bytes_sent,
            decode_sent_bytes=tally.decode_sent_bytes,
            received_bytes=self._transport.bytes_received,
            refused_frames=self._inbox.counters.refused + tally.refused + tally.stale,
            resident_bytes=resident_bytes(),
        )
        self._parent.say(
            Status(
                phase="ready",
                epoch=order.epoch,
                detail=self._work.last_refusal or self._inbox.last_refusal,
                engine=self._engine.name,
                held_bytes=self._engine.held_bytes,
                resident_bytes=counters.resident_bytes,
                counters=counters,
                answered=answered,
            )
        )


if __name__ == "__main__":
    sys.exit(main())
