"""One job under way: its rounds one after the other, each on disk before the next begins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from coordinator.operations import Operations
from coordinator.rounds.adapters import aggregate, files_of, parts_of, spec_of
from coordinator.rounds.airtime import Offer
from coordinator.rounds.bases import Base, base_of
from coordinator.rounds.exchange import Exchange
from coordinator.rounds.job import Job
from coordinator.rounds.offers import Timing, Took, learnt, offer_of, weights_of
from coordinator.rounds.orders import (
    Way,
    able_devices,
    make_orders,
    task_of,
    ways_of,
)
from coordinator.rounds.schedule import after
from coordinator.rounds.settling import knobs_of, settled
from coordinator.rounds.store import JobRecord, JobStore, RoundRecord, State, topic_name
from coordinator.service import Coordinator
from hwprofiles.link import bytes_per_s
from hwprofiles.profile import LinkMeasurement
from models.lora.adapter import length_of, shapes
from wire.errors import Refused
from wire.frames import Parcel
from wire.messages import Applied, ArtifactRef, Privacy, StageReport, TrainingTask

RETURN_S: Final = 5.0
LOOK_PERIOD_S: Final = 1.0
WAITING_SAID_S: Final = 30.0
"""Between two words about boards that are waited for."""


class Running:
    """`task` runs it, and is whoever made it's to end."""

    task: asyncio.Task[None]

    def __init__(self, coordinator: Coordinator, operations: Operations, store: JobStore, record: JobRecord) -> None:
        self.record = record
        self.waits_for = ""
        self.followers: set[asyncio.Queue[dict[str, Any] | None]] = set()
        self._coordinator = coordinator
        self._operations = operations
        self._store = store
        self._round: Exchange | None = None
        self._placed = False
        self._base: Base | None = None
        self._loop = asyncio.get_running_loop()

    @property
    def job(self) -> Job:
        return self.record.job

    def heard(self, parcel: Parcel) -> bool:
        """Take a parcel; False if it is none of ours."""
        return self._round is not None and self._round.heard(parcel)

    def broker_up(self) -> None:
        if self._round is not None:
            self._round.state.ask_all_again()

    def tell(self, event: dict[str, Any] | None) -> None:
        """To all who follow; None: it is over."""
        for queue in self.followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)
        self._coordinator.changes.ring()

    async def run(self) -> None:
        """All rounds that are left, and a last look at what came of them. Raises EdgelamError."""
        job = self.job
        prepared = await self._operations.preparing.prepare(job.model, job.precision, self._say)
        base = self._base = await asyncio.to_thread(base_of, prepared, job)
        if base.digest != self.record.base:
            raise Refused(f"{job.model} is another file than when the job began", try_="begin the job anew")
        await self._operations.preparing.await_broker()
        artifacts = self._coordinator.artifacts
        task = task_of(job, artifacts.add_bytes(base.tokenizer, "tokenizer.json"), base.end_id)
        graph = artifacts.add_bytes(base.graph, f"{topic_name(job.name)}.graph")
        if job.privacy is not None:
            self._say(private_text(job.privacy))
        await self._await_return()
        while self.record.state == "running":
            number = self.record.round
            last = number >= job.rounds.count
            await self._await_boards(number, last)
            self._place(base, task, graph)
            await self._choose(base, number, last)
            start = self._store.factors(self.record)
            round_ = self._round = Exchange(
                self._coordinator, self._store, self.record, base.config, start, self.tell, train=not last
            )
            try:
                began_s = time.monotonic()
                await self._over(round_)
                took_s = round_.running_s
                round_.close()
                await self._finish(base, round_, time.monotonic() - began_s, took_s)
            finally:
                round_.close()
                self._round = None

    async def _over(self, round_: Exchange) -> None:
        """Wait until a round is over, and ask whom it needs meanwhile. Raises Refused where nothing came of it."""
        said = ""
        while True:
            for device, because in self._unable().items():
                round_.state.refuse(device, because)
            look = round_.state.look(time.monotonic(), self._ready())
            for device in look.ask:
                round_.ask(device)
            self.waits_for = ", ".join(round_.state.missing)
            if look.verdict == "over":
                return
            if look.verdict == "failed":
                why = "; ".join(f"{device}: {because}" for device, because in round_.state.refused.items())
                raise Refused(f"round {round_.number} has too few updates: {why}", try_="edgelam tune resume, later")
            text = self._loading()
            if text and text != said:
                said = text
                self._say(text)
            round_.changed = False
            await self._coordinator.changes.wait(lambda: round_.changed, LOOK_PERIOD_S)

    async def _finish(self, base: Base, round_: Exchange, wall_s: float, took_s: float) -> None:
        number, job = round_.number, self.job
        updates = [round_.updates[device] for device in sorted(round_.updates)]
        factors = round_.start
        if round_.train:
            vectors = [(meta, vector) for meta, vector in updates if vector is not None]
            factors = await asyncio.to_thread(aggregate, base.config, job, number, round_.start, vectors)
        done = round_.record(wall_s)
        # What came out is judged in a last round, unless boards may not tell losses.
        judged = job.privacy is None or job.privacy.losses
        ahead = round_.train and (judged or number + 1 < job.rounds.count)
        state: State = "running" if ahead else "done"
        # First the adapter: who is killed before the journal knows does the round again, and comes to the same.
        rounds = [*self._store.rounds(job.name), done]
        files = await asyncio.to_thread(files_of, base.config, self.record, factors, rounds)
        await asyncio.to_thread(self._store.write_adapter, job.name, files)
        digest = await asyncio.to_thread(self._store.write_next, self.record, factors)
        record = self._learnt(base, done, took_s) if done.trained else self.record
        self.record = self._store.finish_round(record, done, digest, state)
        self.tell(round_event(done))

    async def _await_return(self) -> None:
        """Give boards that took part before a restart a moment to be heard of: else the first of them to come would
        train the next round alone."""
        if not self.record.chosen and not set(self.record.orders) <= set(self._able()):
            await self._coordinator.changes.wait(lambda: set(self.record.orders) <= set(self._able()), RETURN_S)

    async def _await_boards(self, number: int, last: bool) -> None:
        """Until enough boards are there for a round that nobody was chosen for yet."""
        least = 0 if self.record.chosen else 1 if last else self.job.rounds.at_least
        while len(able := self._able()) < least:
            self.waits_for = f"{least} boards that are online and have the data"
            self._say(f"round {number} waits for {self.waits_for}; there are {len(able)}")
            await self._coordinator.changes.wait(lambda: len(self._able()) >= least, WAITING_SAID_S)

    async def _choose(self, base: Base, number: int, last: bool) -> None:
        """Settle who takes part in a round, among the boards that are there, and keep it: a restart changes nothing of
        it."""
        if not self.record.chosen:
            able = self._able()
            offers = [] if last else self._offers(base, able, number)
            fields = await asyncio.to_thread(settled, self.record, able, offers, last)
            self.record = msgspec.structs.replace(self.record, **fields)
            self._store.save(self.record)

    def _offers(self, base: Base, able: Sequence[str], number: int) -> list[Offer]:
        """What each board would bring to a round, and take."""
        job = self.job
        parts = parts_of(job, number)
        samples = weights_of(samples_of(self._store.rounds(job.name)), able)
        sharers = len(able) if job.rounds.medium == "shared" else 1
        found = []
        for device in able:
            shaped = shapes(base.config, spec_of(job, device))
            down_bytes, up_bytes = 4 * length_of(shaped), 4 * length_of(shaped, parts)
            timing = self.record.timing.get(device, Timing())
            offer = offer_of(device, timing, self._rate(device), down_bytes, up_bytes, samples[device], sharers)
            found.append(offer)
        return found

    def _rate(self, device: str) -> float | None:
        """Bytes/s of a board's link, as it measured it."""
        profile = self._coordinator.profiles().get(device)
        return bytes_per_s(profile.link) if profile and isinstance(profile.link, LinkMeasurement) else None

    def _learnt(self, base: Base, done: RoundRecord, took_s: float) -> JobRecord:
        """What the round says of the boards, for the next."""
        record, job = self.record, self.job
        parts = parts_of(job, done.round)
        timing = dict(record.timing)
        for device, told in done.devices.items():
            if told.refused or told.wall_s <= 0:
                continue
            shaped = shapes(base.config, spec_of(job, device))
            took = Took(
                wall_s=told.wall_s,
                compute_s=told.compute_s,
                down_bytes=4 * length_of(shaped),
                up_bytes=4 * length_of(shaped, parts),
                share=record.shares.get(device, 1.0),
                paced=device in record.paces,
                sharers=len(record.chosen) if job.rounds.medium == "shared" else 1,
            )
            timing[device] = learnt(timing.get(device), self._rate(device), took)
        queues = record.queues
        if job.rounds.who == "scheduled":
            queues = after(queues, knobs_of(job), self._able(), record.chosen, took_s)
        return msgspec.structs.replace(record, timing=timing, queues=queues)

    def _able(self) -> tuple[str, ...]:
        assert self._base is not None
        return able_devices(self._coordinator, self.job, self._base)[0]

    def _place(self, base: Base, task: TrainingTask, graph: ArtifactRef) -> None:
        """Orders for all boards that can take part, those that have come meanwhile too: on disk first."""
        coordinator = self._coordinator
        able = self._able()
        weights = tuple(
            coordinator.artifacts.add_file(digest, path, path.name) for digest, path in sorted(base.files.items())
        )
        # Whoever has an order keeps what it says of this: the worker would have to begin anew.
        ways = {
            **ways_of(coordinator, self.job, able, base),
            **{
                name: Way(order.training.remember, order.training.rows_at_once)
                for name, (order,) in self.record.orders.items()
                if order.training
            },
        }
        orders = make_orders(coordinator.site, self.record, able, base, task, graph, weights, ways)
        if orders == self.record.orders and self._placed:
            return
        self.record, self._placed = msgspec.structs.replace(self.record, orders=orders), True
        self._store.save(self.record)
        coordinator.order_job(topic_name(self.job.name), self.record)

    def _ready(self) -> dict[str, str]:
        """Device -> the worker that it runs, of those that can take a round."""
        return {
            device: f"{applied.boot}/{report.restarts}"
            for device, applied, report in self._reports()
            if report.phase == "ready" and self._coordinator.is_online(device)
        }

    def _unable(self) -> dict[str, str]:
        """Device -> why it can't take part."""
        return {
            device: report.detail or "it failed" for device, _, report in self._reports() if report.phase == "failed"
        }

    def _reports(self) -> Iterator[tuple[str, Applied, StageReport]]:
        """What devices say of the job."""
        mine = topic_name(self.job.name), self.record.epoch
        for device, applied in self._coordinator.applied().items():
            for report in applied.stages:
                if (report.deployment, report.epoch) == mine:
                    yield device, applied, report

    def _loading(self) -> str:
        """How far those are that take part and have not begun, in a line; '' when all have."""
        ready = self._ready()
        waits = [device for device in self.record.chosen if device not in ready]
        there = len(self.record.chosen) - len(waits)
        return f"{there} of {len(self.record.chosen)} boards ready; waiting for {', '.join(waits)}" if waits else ""

    def _say(self, text: str) -> None:
        """Any thread."""
        self._loop.call_soon_threadsafe(self.tell, {"event": "status", "text": text})


def samples_of(rounds: Sequence[RoundRecord]) -> dict[str, int]:
    """Device -> how many it said last that it has."""
    return {device: told.samples for done in rounds for device, told in done.devices.items() if told.samples}


def private_text(privacy: Privacy) -> str:
    """What a job comes to know, in a line."""
    clear = ["how many samples there are", "when a board answers", *(["losses"] if privacy.losses else [])]
    return (
        f"private: epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for each {privacy.unit} of a board;"
        f" in the clear: {', '.join(clear)}"
    )


def round_event(done: RoundRecord) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(done)
    return {"event": "round", **found}
