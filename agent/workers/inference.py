"""The worker that holds one stage: `python -m agent.workers.inference`, its assignment as the first line on stdin.

One thread receives, computes and sends: there is no hand-over on the way of a token. Between two steps the transport is
polled without waiting, so that what is more urgent than the next prefill chunk is seen before it.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import msgspec
import numpy as np

from agent.workers.ahead import StepAhead
from agent.workers.child import Parent, become_worker
from agent.workers.dataplane import Connections, data_connection
from agent.workers.inboxes import Inboxes
from agent.workers.memory import give_back_memory
from agent.workers.outboxes import Outboxes
from agent.workers.pipe import Assignment, DataBrokerAt, Status, Tell
from agent.workers.ring import StageWork
from agent.workers.stretch import Stretch
from agent.workers.throttle import Throttle
from agent.workers.work import Loaded, Work
from hwprofiles.measure import resident_bytes
from models.engine.base import EngineFailed, StageEngine, StageSpec
from models.engine.choice import Chosen, StageFiles, first_that_works, load_on
from models.sampling import draw
from wire.channel import Delivery
from wire.errors import EdgelamError
from wire.limits import DATA_KEEPALIVE_S, TRAINING_KEEPALIVE_S
from wire.messages import EngineName, StageCounters, StageOrder
from wire.mqtt import MqttTransport
from wire.transport import Link, ShortWay, Transport
from wire.units import bytes_text

LOG = logging.getLogger("edgelam.inference")

POLL_S: Final = 0.25
"""Longest wait without work: bounds how late ticks and the supervisor's words are seen; `wake` cuts it short."""

PACED_POLL_S: Final = 0.02
"""The same while something is sent at a pace."""

LONG_STEP_S: Final = 1.0
TICK_S: Final = 0.25
REPORT_PERIOD_S: Final = 1.0

Say = Callable[[Status], None]
"""Tells the supervisor how far loading is."""

T = TypeVar("T")


def main() -> int:
    return hold_stage(load, Worker)


def hold_stage(
    load: Callable[[Assignment, Say], T], worker_of: Callable[[Assignment, T, Transport, Parent], StageWorker[Any]]
) -> int:
    """Load a stage and hold it until told to stop, or until the supervisor is gone; give the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    parent = become_worker()
    assignment = parent.first(Assignment)
    order = assignment.order
    parent.say(Status(phase="loading", epoch=order.epoch))
    try:
        loaded = load(assignment, parent.say)
    except (EdgelamError, OSError) as error:
        parent.say(Status(phase="failed", epoch=order.epoch, detail=str(error), final=True))
        return 1
    worker = worker_of(assignment, loaded, data_connection(assignment.login, keepalive_of(order)), parent)
    parent.listen(worker.wake)
    # What is loaded stays: the garbage collector need not walk it again and hold up a token.
    gc.collect()
    gc.freeze()
    give_back_memory()
    worker.run()
    return 0


def keepalive_of(order: StageOrder) -> int:
    """Seconds. A step of training may take minutes, in which nobody looks at the connection."""
    return TRAINING_KEEPALIVE_S if order.runs == "rounds" else DATA_KEEPALIVE_S


def load(assignment: Assignment, say: Say = lambda _: None) -> Chosen:
    """Load the stage and make steps with it, so that `ready` means that it works: on the engine that was ordered, or
    else on the next one that works. `say` hears which one is tried. Raises EngineFailed, CorruptData, Refused."""
    order = assignment.order
    spec = spec_of(order, assignment.threads)
    files = StageFiles(
        graph=Path(assignment.graph_path),
        standard=Path(assignment.standard_graph_path) if assignment.standard_graph_path else None,
        weights=tuple(Path(path) for path in assignment.weight_paths),
        built=Path(assignment.engines_path or Path(assignment.graph_path).parent / "engines"),
    )

    def trying(name: EngineName, detail: str = "") -> None:
        say(Status(phase="loading", epoch=order.epoch, trying=name, detail=detail))

    def loaded(name: EngineName) -> StageEngine:
        engine = load_on(name, files, spec, lambda detail: trying(name, detail))
        warm_up(engine, order)
        return engine

    chosen = first_that_works(order.engine, loaded, assignment.crashed, trying)
    if chosen.fell_back:
        LOG.warning("runs on %s: %s", chosen.name, chosen.fell_back)
    check_memory(assignment)
    return chosen


def check_memory(assignment: Assignment) -> None:
    """Raise EngineFailed if what is loaded takes more than the board is made out to have."""
    held = resident_bytes()
    if 0 < assignment.memory_limit_bytes < held:
        raise EngineFailed(
            f"out of memory: the stage needs {bytes_text(held)}, "
            f"the device has {bytes_text(assignment.memory_limit_bytes)} (emulated)"
        )


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
    """One prefill step, one decode step, and one of two requests, on zeros."""
    slots = [engine.open() for _ in range(min(2, order.slots))]
    try:
        engine.step(slots[0], zeros(order, 2), 0)
        if order.context_tokens > 2:
            engine.step(slots[0], zeros(order, 1), 2)
        if len(slots) > 1:
            _, failed = engine.step_many(slots, zeros(order, 2), [1, 0])
            if failed:
                raise EngineFailed(f"a step of two requests failed: {next(iter(failed.values()))}")
    finally:
        for slot in slots:
            engine.close(slot)


def zeros(order: StageOrder | StageSpec, rows: int) -> Any:
    """Input of the right kind for a stage: token ids, or hidden states in wire dtype."""
    if order.embedding:
        return np.zeros(rows, dtype=np.int64)
    return np.zeros((rows, order.hidden), dtype={"f32": "f4", "f16": "f2", "bf16": "u2"}[order.wire_dtype])


E = TypeVar("E", bound=Loaded)


class StageWorker(ABC, Generic[E]):
    """A loaded stage on its connections; `site` is the one to the site's broker, not yet started."""

    def __init__(self, assignment: Assignment, engine: E, site: Transport, parent: Parent, fell_back: str = "") -> None:
        self._assignment = assignment
        self._engine = engine
        self._fell_back = fell_back
        self._parent = parent
        order = assignment.order
        self._connections = Connections(site, self._another, self._on_up, self._on_down)
        self._connections.follow(order, assignment.data_broker)
        self._inboxes = self._open_inboxes(order)
        self._outboxes = Outboxes(site, self._connections.outward, order.next)
        self._stretch = Stretch(assignment.speed, assignment.threads)
        self._throttle = Throttle(assignment.throttle_path)
        self._work = self._make_work(order)
        self._at_adoption = copy(self._work.tally)
        self._ahead: StepAhead | None = None
        self._look_ahead()
        self._told_ended = 0
        self._stopping = False
        self._ready = False
        self._waits_for = ""
        """What keeps it from being ready, for people."""

    def run(self) -> None:
        """Serve until told to stop."""
        connections, work, clock = self._connections, self._work, time.monotonic
        inboxes = self._inboxes
        connections.start()
        next_tick_s = next_report_s = 0.0
        while not self._stopping and not self._parent.gone:
            if self._ahead is not None:
                self._foresee(self._ahead)
            paced = self._outboxes.paced
            connections.poll(0.0 if work.runnable else PACED_POLL_S if paced else POLL_S)
            if paced:
                self._outboxes.tick()
            now_s = clock()
            while (delivery := inboxes.take()) is not None:
                work.accept(delivery, now_s)
            work.work(now_s)
            if clock() - now_s > LONG_STEP_S:
                connections.poll(0.0)  # else what came meanwhile in pieces would be taken for left behind
            if not self._ready:
                self._settle()
            elif work.ended != self._told_ended:
                self._told_ended = work.ended
                self._report(answered=True)
            if now_s >= next_tick_s:
                next_tick_s = now_s + TICK_S
                self._tick(now_s)
                inboxes = self._inboxes
                if now_s >= next_report_s:
                    next_report_s = now_s + REPORT_PERIOD_S
                    self._report_anyhow()
        connections.close()

    @abstractmethod
    def _make_work(self, order: StageOrder) -> Work:
        """What is done with parcels, by `self._engine`, sent through `self._outboxes`."""

    def wake(self) -> None:
        """Have `run` look around soon. Any thread."""
        self._connections.wake()

    def _foresee(self, ahead: StepAhead) -> None:
        if self._ready and not self._work.runnable:
            ahead.lay_out(self._inboxes.main)
        else:
            ahead.forget()

    def _tick(self, now_s: float) -> None:
        self._inboxes.tick()
        self._outboxes.tick()
        self._work.tick(now_s)
        self._stretch.throttle(self._throttle.share())
        for told in self._parent.told(Tell):
            if told.adopt is not None:
                self._adopt(told.adopt, told.data_broker)
            self._stopping = self._stopping or told.stop

    def _adopt(self, order: StageOrder, data_broker: DataBrokerAt | None) -> None:
        """Take another epoch, and with it perhaps other inboxes and neighbours."""
        self._ready = False
        self._work.adopt(order)
        self._at_adoption = copy(self._work.tally)
        self._inboxes.close()
        self._connections.follow(order, data_broker)
        self._outboxes.redirect(self._connections.outward, order.next)
        self._inboxes = self._open_inboxes(order)
        self._look_ahead()

    def _open_inboxes(self, order: StageOrder) -> Inboxes:
        connections = self._connections
        inboxes = Inboxes(order.inbox.topic, list(dict.fromkeys((connections.inward, connections.site))))
        for transport in connections:
            if transport.link is Link.UP:
                inboxes.up(transport)
        return inboxes

    def _look_ahead(self) -> None:
        """Nobody makes steps ahead."""
        for transport in self._connections:
            if isinstance(transport, ShortWay):
                transport.ahead = None
        self._ahead = None

    def _another(self, url: str, what: str) -> MqttTransport:
        """A further connection, with the name and password of the first."""
        login = self._assignment.login
        login = msgspec.structs.replace(login, url=url, client_id=f"{login.client_id}-{what}")
        return data_connection(login, keepalive_of(self._assignment.order))

    def _on_up(self, transport: Transport) -> None:
        """Subscribed; an inbox is open when it proves to be."""
        self._inboxes.up(transport)

    def _on_down(self, transport: Transport, reason: str) -> None:
        LOG.warning("broker lost: %s", reason)
        self._inboxes.down(transport)
        self._work.drop_all()
        self._ready = False
        self._waits_for = f"broker lost: {reason}"
        self._report_anyhow()

    def _settle(self) -> None:
        """Say that the stage is ready, when it can be reached and can reach the next one."""
        if self._inboxes.open and self._connections.up:
            self._ready, self._waits_for = True, ""
            self._report()

    def _report_anyhow(self) -> None:
        """Who says nothing is taken for hanging (agent.hanging)."""
        if self._ready:
            self._report()
        else:
            self._parent.say(Status(phase="loading", epoch=self._work.order.epoch, detail=self._waits_for))

    def _report(self, answered: bool = False) -> None:
        if answered and not self._work.live:
            give_back_memory()  # that of a prompt's large steps
        order, tally = self._work.order, self._work.tally.since(self._at_adoption)
        counters = StageCounters(
            deployment=order.deployment,
            epoch=order.epoch,
            stage=order.stage,
            requests=tally.requests,
            prefill_steps=tally.prefill_steps,
            prefill_tokens=tally.prefill_tokens,
            prefill_busy_s=tally.prefill_busy_s,
            decode_steps=tally.decode_steps,
            decode_rows=tally.decode_rows,
            decode_busy_s=tally.decode_busy_s,
            decode_rows_run=tally.decode_rows_run,
            decode_context_tokens=tally.decode_context_tokens,
            sent_frames=self._outboxes.frames,
            sent_bytes=self._connections.bytes_sent,
            decode_sent_bytes=tally.decode_sent_bytes,
            drafts_sent=tally.drafts_sent,
            drafts_accepted=tally.drafts_accepted,
            received_bytes=self._connections.bytes_received,
            refused_frames=self._inboxes.refused + tally.refused + tally.stale,
            resident_bytes=resident_bytes(),
            live=self._work.live,
            marks=self._work.marks,
            engine=self._engine.name[:256],
        )
        self._parent.say(
            Status(
                phase="ready",
                epoch=order.epoch,
                detail=self._work.last_refusal or self._inboxes.last_refusal,
                engine=self._engine.name,
                fell_back=self._fell_back,
                held_bytes=self._engine.held_bytes,
                resident_bytes=counters.resident_bytes,
                counters=counters,
                answered=answered,
            )
        )


class Worker(StageWorker[StageEngine]):
    """Of a stage of a language model."""

    def __init__(self, assignment: Assignment, chosen: Chosen, site: Transport, parent: Parent) -> None:
        super().__init__(assignment, chosen.engine, site, parent, chosen.fell_back)

    def _make_work(self, order: StageOrder) -> Work:
        self._stage_work = StageWork(
            order,
            self._engine,
            self._outboxes,
            done,
            draw,
            self._stretch,
            self._assignment.site,
            self._assignment.device,
        )
        return self._stage_work

    def _look_ahead(self) -> None:
        """Make steps ahead where both ways allow it."""
        super()._look_ahead()
        inward, outward = self._connections.inward, self._connections.outward
        if isinstance(inward, ShortWay) and isinstance(outward, ShortWay):
            self._ahead = inward.ahead = StepAhead(
                inward, outward, self._outboxes, self._stage_work, self._engine, draw, self._stretch
            )


def done(delivery: Delivery) -> None:
    """Return the credit of a parcel whose bytes are no longer needed."""
    delivery.inbox.done(delivery)


if __name__ == "__main__":
    sys.exit(main())
