"""One job under way: its rounds one after the other, each on disk before the next begins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final

import msgspec

from coordinator.operations import Operations
from coordinator.rounds.adapters import files_of, uncovered
from coordinator.rounds.airtime import Offer
from coordinator.rounds.bases import Base, Part
from coordinator.rounds.connected import ConnectedExchange
from coordinator.rounds.cutting import Cut
from coordinator.rounds.exchange import Exchange
from coordinator.rounds.features import base_for
from coordinator.rounds.job import Job
from coordinator.rounds.joint import JointExchange
from coordinator.rounds.looped import LoopedExchange
from coordinator.rounds.modules import lengths_of, owned_by, trained_by
from coordinator.rounds.offers import (
    Timing,
    Took,
    joint_offer_of,
    learnt,
    learnt_together,
    link_rate,
    offer_of,
    weights_of,
)
from coordinator.rounds.orders import (
    PartName,
    Placed,
    Way,
    able_devices,
    make_orders,
    most_ends,
    task_of,
    trunk_names,
    way_of,
    ways_of,
)
from coordinator.rounds.schedule import after
from coordinator.rounds.secure import SECURE_TEXT, SecureExchange
from coordinator.rounds.settling import knobs_of, settled
from coordinator.rounds.shards import found_for
from coordinator.rounds.store import JobRecord, JobStore, RoundRecord, State, TrunkAt, topic_name
from coordinator.rounds.trunks import Found, keeps_all, where_text
from coordinator.service import Coordinator
from wire.errors import Refused
from wire.frames import Parcel
from wire.limits import MAX_DEVICES, MAX_SUMMED
from wire.messages import Applied, StageReport, TrainingTask
from wire.privacy import Privacy

RETURN_S: Final = 5.0
LEAST_TRUNK_STAGE: Final = MAX_DEVICES // 2
"""Boards with data are counted up from 0, segments of the trunk down from the highest number."""
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
        base = self._base = await base_for(self._operations, job, self._say)
        if base.digest != self.record.base:
            raise Refused(f"{job.trains} is another file than when the job began", try_="begin the job anew")
        await self._operations.preparing.await_broker()
        artifacts = self._coordinator.artifacts
        tokenizer = artifacts.add_bytes(base.tokenizer, "tokenizer.json") if base.tokenizer else None
        task = task_of(job, tokenizer, base.end_id)
        if job.privacy is not None:
            self._say(private_text(job, job.privacy))
        if job.secure:
            self._say(SECURE_TEXT)
        await self._await_return()
        while self.record.state == "running":
            number = self.record.round
            last = number >= job.rounds.count
            await self._await_boards(number, last)
            if job.is_split:
                await self._await_trunk(base)
            self._place(base, task)
            start = self._store.factors(self.record)
            await self._choose(base, number, last, len(start))
            round_ = self._round = self._exchange(last)(
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

    def _exchange(self, last: bool) -> type[Exchange]:
        job = self.job
        if job.is_split:
            return LoopedExchange if job.mode == "looped" else JointExchange
        if job.modalities:
            return ConnectedExchange
        return SecureExchange if job.secure and not last else Exchange

    async def _over(self, round_: Exchange) -> None:
        """Wait until a round is over, and ask whom it needs meanwhile. Raises Refused where nothing came of it."""
        said = ""
        while True:
            for device, because in self._unable().items():
                round_.state.refuse(device, because)
            look = round_.state.look(time.monotonic(), self._ready(), self._fetching())
            for device in look.ask:
                round_.ask(device)
            self.waits_for = ", ".join(round_.state.missing)
            if look.verdict == "over":
                return
            if look.verdict == "failed":
                self._pass_over_trunk(round_)
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
        factors = await asyncio.to_thread(round_.aggregated) if round_.train else round_.start
        done = round_.record(wall_s)
        # What came out is judged in a last round, unless boards may not tell losses.
        # Where they have factors of their own it tells them what those go with.
        judged = job.privacy is None or job.privacy.losses or job.begins == "own-b"
        ahead = round_.train and (judged or number + 1 < job.rounds.count)
        state: State = "running" if ahead else "done"
        # First the adapter: who is killed before the journal knows does the round again, and comes to the same.
        rounds = [*self._store.rounds(job.name), done]
        files = await asyncio.to_thread(files_of, base.config, self.record, factors, rounds)
        await asyncio.to_thread(self._store.write_adapter, job.name, files)
        digest = await asyncio.to_thread(self._store.write_next, self.record, factors)
        record = self._learnt(base, done, took_s, round_) if done.trained else self.record
        self.record = self._store.finish_round(record, done, digest, state)
        self.tell(round_event(done))

    async def _await_return(self) -> None:
        """Give boards that took part before a restart a moment to be heard of: else the first of them to come would
        train the next round alone."""
        if not self._are_back():
            await self._coordinator.changes.wait(self._are_back, RETURN_S)

    def _are_back(self) -> bool:
        record = self.record
        if not all(self._coordinator.is_online(at.device) for at in record.trunk):
            return False
        return bool(record.chosen) or set(record.with_data) <= set(self._able())

    async def _await_trunk(self, base: Base) -> None:
        """Until there are boards for the blocks. Where they are they stay as long as those are there."""
        wait = self._coordinator.changes.wait
        if self.record.trunk and not any(at.device in self.record.passed_over for at in self.record.trunk):
            await wait(self._trunk_stays, WAITING_SAID_S)  # moving the blocks takes longer
        while not self._trunk_stays():
            found = self._find_trunk(base)
            if found.cuts:
                self._move_trunk(found)
                return
            why = "; ".join(f"{device}: {because}" for device, because in found.unable.items())
            self.waits_for = f"boards for the blocks ({why})"
            self._say(f"round {self.record.round} waits for {self.waits_for}")
            await wait(lambda: bool(self._find_trunk(base).cuts), WAITING_SAID_S)

    def _trunk_stays(self) -> bool:
        trunk, passed_over = self.record.trunk, self.record.passed_over
        return bool(trunk) and all(
            at.device not in passed_over and self._coordinator.is_online(at.device) for at in trunk
        )

    def _find_trunk(self, base: Base) -> Found:
        return found_for(self._coordinator, self.job, base, self._able(), self.record.passed_over)

    def _move_trunk(self, found: Found) -> None:
        """A segment that is where it was, with the blocks that it had, stays as it is, unless it failed."""
        before = {Cut(at.device, at.first_block, at.end_block, at.role, at.share): at.stage for at in self.record.trunk}
        stage = min(before.values(), default=MAX_DEVICES)
        before = {key: known for key, known in before.items() if key[0] not in self.record.passed_over}
        if stage - len(found.cuts) < LEAST_TRUNK_STAGE:
            stage = MAX_DEVICES
        trunk = []
        for one in found.cuts:
            known = before.get(one)
            stage -= int(known is None)
            at = known if known is not None else stage
            trunk.append(TrunkAt(stage=at, **one._asdict()))
        # Who was passed over, and is all that there is, gets another chance.
        has_blocks = {one.device for one in found.cuts}
        self.record = msgspec.structs.replace(
            self.record,
            trunk=tuple(trunk),
            trunk_because=found.because,
            each_s=None,
            timing={},
            passed_over=tuple(device for device in self.record.passed_over if device not in has_blocks),
        )
        self._say(where_text(trunk, found.because))

    async def _await_boards(self, number: int, last: bool) -> None:
        """Until enough boards are there for a round that nobody was chosen for yet."""
        least = 0 if self.record.chosen else 1 if last else self.job.rounds.at_least
        while len(able := self._takes_part(number, last)) < least:
            self.waits_for = f"{least} boards that are online and have the data"
            self._say(f"round {number} waits for {self.waits_for}; there are {len(able)}")
            await self._coordinator.changes.wait(lambda: len(self._takes_part(number, last)) >= least, WAITING_SAID_S)

    async def _choose(self, base: Base, number: int, last: bool, factors: int) -> None:
        """Settle who takes part in a round, among the boards that are there, and keep it: a restart changes nothing of
        it. It begins with so many numbers."""
        if not self.record.chosen:
            able = self._takes_part(number, last)
            if self.job.is_split:
                able = able[: most_ends(base, self.job)]
            if self.job.secure:
                able = able[:MAX_SUMMED]
            offers = [] if last else self._offers(base, able, number, factors)
            fields = await asyncio.to_thread(settled, self.record, able, offers, last)
            self.record = msgspec.structs.replace(self.record, **fields)
            self._store.save(self.record)

    def _offers(self, base: Base, able: Sequence[str], number: int, factors: int) -> list[Offer]:
        """What each board would bring to a round, and take."""
        job = self.job
        samples = weights_of(samples_of(self._store.rounds(job.name)), able)
        if job.is_split:
            timing_of = self.record.timing
            return [joint_offer_of(device, timing_of.get(device, Timing()), samples[device]) for device in able]
        sharers = len(able) if job.rounds.medium == "shared" else 1
        found = []
        for device in able:
            down, up = lengths_of(base.config, self.record, number, device, factors)
            timing = self.record.timing.get(device, Timing())
            offer = offer_of(device, timing, self._rate(device), 4 * down, 4 * up, samples[device], sharers)
            found.append(offer)
        return found

    def _rate(self, device: str) -> float | None:
        """Bytes/s of a board's link, as it measured it."""
        return link_rate(self._coordinator.profiles().get(device))

    def _learnt(self, base: Base, done: RoundRecord, took_s: float, round_: Exchange) -> JobRecord:
        """What the round says of the boards, for the next."""
        if self.job.is_split:
            record = self._timed_together(done, took_s if round_.undisturbed else None)
        else:
            record = self._timed_apart(base, done, len(round_.start))
        if self.job.rounds.who == "scheduled":
            queues = after(record.queues, knobs_of(self.job), self._able(), record.chosen, took_s)
            record = msgspec.structs.replace(record, queues=queues)
        return record

    def _timed_together(self, done: RoundRecord, took_s: float | None) -> JobRecord:
        record = self.record
        own_s = {device: told.own_s for device, told in done.devices.items() if told.own_s and not told.refused}
        timing, each_s = learnt_together(record.timing, record.each_s, own_s, took_s)
        return msgspec.structs.replace(record, timing=timing, each_s=each_s)

    def _timed_apart(self, base: Base, done: RoundRecord, factors: int) -> JobRecord:
        """The same where each trains by itself; the round began with so many numbers."""
        record, job = self.record, self.job
        timing = dict(record.timing)
        for device, told in done.devices.items():
            if told.refused or told.wall_s <= 0:
                continue
            down, up = lengths_of(base.config, record, done.round, device, factors)
            took = Took(
                wall_s=told.wall_s,
                compute_s=told.compute_s,
                down_bytes=4 * down,
                up_bytes=4 * up,
                share=record.shares.get(device, 1.0),
                paced=device in record.paces,
                sharers=len(record.chosen) if job.rounds.medium == "shared" else 1,
            )
            timing[device] = learnt(timing.get(device), self._rate(device), took)
        return msgspec.structs.replace(record, timing=timing)

    def _able(self) -> tuple[str, ...]:
        assert self._base is not None
        return able_devices(self._coordinator, self.job, self._base)[0]

    def _takes_part(self, number: int, last: bool) -> tuple[str, ...]:
        """Those of them that have something to train in a round, or to judge."""
        able = self._able()
        owns = {**self._owned(able), **self.record.owns}
        return (
            able
            if last
            else tuple(device for device in able if trained_by(self.job, number, device, owns.get(device, ())))
        )

    def _place(self, base: Base, task: TrainingTask) -> None:
        """Orders for all boards that can take part, those that have come meanwhile too: on disk first."""
        coordinator, able = self._coordinator, self._able()
        record = msgspec.structs.replace(self.record, owns={**self._owned(able), **self.record.owns})
        parts: dict[PartName, Part] = {("whole", 0): base.parts["whole"]}
        if self.job.is_split:
            parts = {("ends", 0): base.parts["ends"]}
            parts |= {(at.role, at.first_block): self._part_at(base, at) for at in record.trunk}
        placed = {name: self._placed_part(f"{name[0]}{name[1]}", part) for name, part in parts.items()}
        nets = {
            name: self._placed_part(name, one.parts["whole"])
            for name, one in base.modalities.items()
            if self.job.modalities[name].images is not None
        }
        of_labels = f"{topic_name(self.job.name)}-anchors.f32"
        anchors = coordinator.artifacts.add_bytes(base.anchors, of_labels) if base.anchors else None
        ways = self._ways(base, able)
        orders = make_orders(coordinator.site, record, able, base, task, placed, ways, nets, anchors)
        if orders == record.orders and self._placed:
            return
        self.record, self._placed = msgspec.structs.replace(record, orders=orders), True
        self._store.save(self.record)
        coordinator.order_job(topic_name(self.job.name), self.record)

    @staticmethod
    def _part_at(base: Base, at: TrunkAt) -> Part:
        return base.segment(at.first_block, at.end_block) if at.role == "trunk" else base.part_of_block()

    def _owned(self, devices: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Device -> modalities that it has, of a job of several."""
        if not self.job.modalities:
            return {}
        infos = {device.name: device.info for device in self._coordinator.devices() if device.info is not None}
        return {device: owned_by(self.job, infos[device]) for device in devices}

    def _placed_part(self, name: str, part: Part) -> Placed:
        """Its files, as boards fetch them."""
        artifacts = self._coordinator.artifacts
        graph = artifacts.add_bytes(part.graph, f"{topic_name(self.job.name)}-{name}.graph")
        files = sorted(part.files.items())
        return Placed(part, graph, tuple(artifacts.add_file(digest, path, path.name) for digest, path in files))

    def _ways(self, base: Base, able: Collection[str]) -> dict[str, Way]:
        """How each board trains, the trunk's among them. Whoever has an order keeps what it says of this, since the
        worker would have to begin anew; but a trunk that keeps all for gradients may have too many boards by now."""
        record, found = self.record, ways_of(self._coordinator, self.job, able, base)
        found.update({device: way_of(order) for device, order in record.with_data.items()})
        for place, (name, at) in enumerate(zip(self._trunk_names, record.trunk, strict=True)):
            keeps = at.role == "trunk" and keeps_all(self._coordinator, self.job, base, at, able)
            if record.is_placed:
                keeps = keeps and way_of(record.trunk_orders[place]).remember
            found[name] = Way(keeps, 1)
        return found

    @property
    def _trunk_names(self) -> tuple[str, ...]:
        return trunk_names(len(self.record.trunk), self.job.mode == "looped")

    def _ready(self) -> dict[str, str]:
        """Device -> the worker that it runs, of those that can take a round."""
        return {
            name: f"{applied.boot}/{report.restarts}"
            for name, device, applied, report in self._reports()
            if report.phase == "ready" and self._coordinator.is_online(device)
        }

    def _fetching(self) -> set[str]:
        """Who is there and fetches the files that it needs."""
        return {
            name
            for name, device, _, report in self._reports()
            if report.phase in ("waiting", "fetching") and self._coordinator.is_online(device)
        }

    def _pass_over_trunk(self, round_: Exchange) -> None:
        """Where a segment failed, its blocks go elsewhere when the job is resumed."""
        segments = zip(self._trunk_names, self.record.trunk, strict=True)
        failed = tuple(at.device for name, at in segments if name in round_.state.refused)
        if failed and not self.job.trunks:
            passed_over = (*self.record.passed_over, *failed)
            self.record = msgspec.structs.replace(self.record, passed_over=passed_over)
            self._store.save(self.record)

    def _unable(self) -> dict[str, str]:
        """Device -> why it can't take part."""
        return {
            name: report.detail or "it failed" for name, _, _, report in self._reports() if report.phase == "failed"
        }

    def _reports(self) -> Iterator[tuple[str, str, Applied, StageReport]]:
        """What devices say of the job, by whom it counts for: a device with data, or part of the trunk."""
        mine, with_data = (topic_name(self.job.name), self.record.epoch), self.record.with_data
        for device, applied in self._coordinator.applied().items():
            for report in applied.stages:
                if (report.deployment, report.epoch) != mine:
                    continue
                place = self.record.segment_of(device, report.stage)
                if place is not None:
                    yield self._trunk_names[place], device, applied, report
                elif device in with_data and with_data[device].stage == report.stage:
                    yield device, device, applied, report

    def _loading(self) -> str:
        """How far those are that take part and have not begun, in a line; '' when all have."""
        ready = self._ready()
        takes_part = (*self.record.chosen, *self._trunk_names)
        waits = [name for name in takes_part if name not in ready]
        there = len(takes_part) - len(waits)
        return f"{there} of {len(takes_part)} boards ready; waiting for {', '.join(waits)}" if waits else ""

    def _say(self, text: str) -> None:
        """Any thread."""
        self._loop.call_soon_threadsafe(self.tell, {"event": "status", "text": text})


def samples_of(rounds: Sequence[RoundRecord]) -> dict[str, int]:
    """Device -> how many it said last that it has."""
    return {device: told.samples for done in rounds for device, told in done.devices.items() if told.samples}


def private_text(job: Job, privacy: Privacy) -> str:
    """What a job comes to know, in a line."""
    warning = f"{said}, and who has them can find out the texts; " if (said := uncovered(job)) else ""
    clear = ["how many samples there are", "when a board answers", *(["losses"] if privacy.losses else [])]
    return (
        f"private: {warning}epsilon {privacy.epsilon:g} at delta {privacy.delta:g} for each {privacy.unit} of a board;"
        f" in the clear: {', '.join(clear)}"
    )


def round_event(done: RoundRecord) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(done)
    return {"event": "round", **found}
