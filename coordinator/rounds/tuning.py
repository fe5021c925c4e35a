"""All jobs: begun, followed, stopped, resumed, and gone on with after a restart.

One task per job. Whoever follows a job gets events; that they go away changes nothing. A coordinator that was killed
goes on with what the journal says: the round under way keeps the updates that were counted, and asks for the others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import msgspec

from coordinator.operations import Operations
from coordinator.rounds.adapters import spent_by, uncovered
from coordinator.rounds.features import base_for
from coordinator.rounds.job import Job, with_models
from coordinator.rounds.modes import settled_mode
from coordinator.rounds.orders import able_devices, check_messages
from coordinator.rounds.report import JobReport
from coordinator.rounds.running import Running, round_event
from coordinator.rounds.shards import found_for
from coordinator.rounds.store import FILES, JobRecord, JobStore, now_unix, topic_name
from coordinator.rounds.trunks import where_text
from coordinator.service import Coordinator
from coordinator.shelf import canonical
from wire.errors import EdgelamError, Refused, UsageError
from wire.frames import Parcel
from wire.ids import is_name

LOG = logging.getLogger("edgelam.rounds")

MOST_EVENTS: Final = 10_000
"""That one follower may leave unread; then the oldest are left out."""
SILENCE_S: Final = 60.0
"""Who follows a job hears that it lives."""
MOST_JOBS: Final = 16
"""At one time."""


class Tuning:
    """All jobs of one coordinator. Hears what the coordinator hears from now on, and passes on what is not its own."""

    def __init__(self, coordinator: Coordinator, operations: Operations, store: JobStore) -> None:
        self._coordinator = coordinator
        self._operations = operations
        self._store = store
        self._running: dict[str, Running] = {}
        parcels = coordinator.on_parcel

        def on_parcel(parcel: Parcel) -> None:
            for running in self._running.values():
                if running.heard(parcel):
                    return
            parcels(parcel)

        def on_broker_up() -> None:
            for running in self._running.values():
                running.broker_up()

        coordinator.on_parcel = on_parcel
        coordinator.on_broker_up = on_broker_up

    def restore(self) -> None:
        """Go on with the jobs that were running."""
        for record in self._store.records().values():
            if record.state == "running":
                self._start(record)

    async def close(self) -> None:
        """Leave all jobs as they are; they go on when the coordinator is back."""
        tasks = [running.task for running in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def rows(self) -> list[dict[str, Any]]:
        """One per job, for people and programs."""
        records = {**self._store.records(), **{name: running.record for name, running in self._running.items()}}
        return [self._row(record) for _, record in sorted(records.items())]

    async def begin(self, job: Job, say: Callable[[str], None]) -> None:
        """Begin a job. Raises UsageError for one that is under way under its name, or for a model that can't be
        trained, Refused where no board can take part."""
        if job.name in self._running:
            raise UsageError(f"job {job.name} is under way", try_=f"edgelam tune stop {job.name}, or another name")
        if len(self._running) >= MOST_JOBS:
            raise Refused(f"{MOST_JOBS} jobs are under way", try_="edgelam tune status")
        job = with_models(job, canonical)
        base = await base_for(self._operations, job, say)
        await self._operations.preparing.await_broker()
        job, mode_because = settled_mode(self._coordinator, job, base)
        if mode_because:
            say(mode_because)
        able, unable = able_devices(self._coordinator, job, base)
        if len(able) < job.rounds.at_least:
            why = "; ".join(f"{device}: {because}" for device, because in unable.items()) or "no board is online"
            data = " or ".join(map(repr, job.data_sets))
            raise Refused(
                f"{len(able)} of {job.rounds.at_least} boards that are needed can train on {data}: {why}",
                try_="edgelam-agent run --data NAME=FILE, on boards with torch installed",
            )
        check_messages(base, job, len(able))
        if job.is_split:
            found = found_for(self._coordinator, job, base, able)
            if not found.cuts:
                why = "; ".join(f"{device}: {because}" for device, because in found.unable.items())
                raise Refused(f"no boards can have the blocks: {why}", try_="a smaller rounds.batch_rows or row_tokens")
        if job.name in self._running:
            raise UsageError(f"job {job.name} is under way", try_=f"edgelam tune stop {job.name}, or another name")
        factors = await asyncio.to_thread(base.initial, job)
        record = JobRecord(
            job=job,
            state="running",
            epoch=self._coordinator.next_epoch(),
            base=base.digest,
            mode_because=mode_because,
            began_unix=now_unix(),
        )
        self._start(self._store.begin(record, factors))

    async def follow(self, name: str) -> AsyncGenerator[dict[str, Any], None]:
        """What happens in a job from now on, the rounds that are over first; ends with the job."""
        self._known(name)
        running = self._running.get(name)
        if running is not None:
            queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(MOST_EVENTS)
            running.followers.add(queue)
        try:
            for done in self._store.rounds(name):
                yield round_event(done)
            while running is not None:
                changes = self._coordinator.changes
                if not await changes.wait(lambda: not queue.empty(), SILENCE_S):
                    waits_for = running.waits_for or "its boards"
                    yield {"event": "status", "text": f"round {running.record.round} waits for {waits_for}"}
                    continue
                event = queue.get_nowait()
                if event is None:
                    break
                yield event
        finally:
            if running is not None:
                running.followers.discard(queue)
        yield {"event": "end", **self._row(self._known(name))}

    async def stop(self, name: str) -> dict[str, Any]:
        """End a job where it stands; `resume` goes on there."""
        record = self._known(name)
        if record.state == "running":
            running = self._running.get(name)
            if running is not None:
                running.task.cancel()
                await asyncio.wait({running.task})
                record = running.record
            self._settle(msgspec.structs.replace(record, state="stopped", because="somebody stopped it"))
        return self._row(self._known(name))

    def resume(self, name: str) -> dict[str, Any]:
        """Go on with a job that was stopped or has failed."""
        record = self._known(name)
        if record.state == "done":
            raise UsageError(f"job {name} is done", try_="begin another one")
        if name not in self._running:
            record = msgspec.structs.replace(record, state="running", because="")
            self._store.save(record)
            self._start(record)
        return self._row(record)

    def report(self, name: str) -> JobReport:
        """What became of a job so far; raises UsageError where there is none."""
        self._known(name)
        running = self._running.get(name)
        record = running.record if running is not None else self._known(name)
        return JobReport(
            job=record.job,
            state=record.state,
            because=record.because,
            base=record.base,
            mode_because=record.mode_because,
            trunk=where_text(record.trunk, record.trunk_because) if record.trunk else "",
            each=tuple(self._store.rounds(name)),
        )

    def file(self, name: str, file: str) -> bytes:
        """A file of a job's adapter; raises UsageError where there is none."""
        self._known(name)
        if file not in FILES:
            raise UsageError(f"no file {file!r} of a job", try_=", ".join(FILES))
        try:
            return (self._store.folder_of(name) / file).read_bytes()
        except OSError:
            raise UsageError(f"job {name} has no adapter yet", try_="wait for its first round") from None

    def _start(self, record: JobRecord) -> None:
        running = self._running[record.name] = Running(self._coordinator, self._operations, self._store, record)
        running.task = asyncio.ensure_future(self._run(running))

    async def _run(self, running: Running) -> None:
        try:
            await running.run()
            self._settle(running.record)
        except EdgelamError as error:
            self._settle(msgspec.structs.replace(running.record, state="failed", because=error.message))
        except Exception as error:
            LOG.exception("job %s", running.record.name)
            because = f"the coordinator failed: {type(error).__name__}: {error}"
            self._settle(msgspec.structs.replace(running.record, state="failed", because=because))

    def _settle(self, record: JobRecord) -> None:
        """The job is not under way any more."""
        try:
            self._store.save(record)
        finally:
            running = self._running.pop(record.name, None)
            self._coordinator.end_job(topic_name(record.name))
            if running is not None:
                running.tell(None)

    def _known(self, name: str) -> JobRecord:
        running = self._running.get(name)
        if running is not None:
            return running.record
        records = self._store.records() if is_name(name) else {}
        if name not in records:
            raise UsageError(f"no job {name!r}", try_=f"jobs: {', '.join(records) or 'none'}")
        return records[name]

    def _row(self, record: JobRecord) -> dict[str, Any]:
        rounds = self._store.rounds(record.name)
        running = self._running.get(record.name)
        losses = [done.held_out_loss for done in rounds if done.held_out_loss is not None]
        right = [done.held_out_accuracy for done in rounds if done.held_out_accuracy is not None]
        return {
            "job": record.name,
            "model": record.job.trains,
            "state": record.state,
            "because": record.because,
            "round": min(record.round, record.job.rounds.count),
            "rounds": record.job.rounds.count,
            "waits_for": running.waits_for if running is not None else "",
            "first_held_out_loss": losses[0] if losses else None,
            "held_out_loss": losses[-1] if losses else None,
            "first_held_out_accuracy": right[0] if right else None,
            "held_out_accuracy": right[-1] if right else None,
            "epsilon": None if record.job.privacy is None else max(spent_by(rounds).values(), default=0.0),
            "most_epsilon": None if record.job.privacy is None else record.job.privacy.epsilon,
            "uncovered": uncovered(record.job),
            "secure": record.job.secure,
            "sent_bytes": sum(done.down_bytes + done.up_bytes for done in rounds),
            "files": [file for file in FILES if (self._store.folder_of(record.name) / file).is_file()],
            "folder": str(self._store.folder_of(record.name)),
        }
