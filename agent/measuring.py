"""Takes the device's measure when the coordinator's kit names something that was not measured yet.

Belongs to the supervisor's thread. One job at a time: its graphs are fetched, one worker times them and the link, and
what it found is joined with what was known into the profile, which is kept in the state folder. A profile that no
longer fits the device (software, limits, emulation, age) is dropped at the start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

import msgspec

from agent import engines
from agent.fetch import Fetcher, Progress
from agent.jobs import NOTHING, Asked, Job, Outcome, Subject, together
from agent.joining import MAX_REASON_LETTERS, board_is_due
from agent.kept import Kept
from agent.launcher import Ended, Launcher, Line
from agent.pairs import VERB as PROBE_PAIR
from agent.pairs import PairAsk
from agent.stages import BoardBroker
from agent.store import Store
from agent.workers.pipe import (
    BrokerLogin,
    Measured,
    MeasuredModule,
    MeasureModule,
    MeasureNote,
    MeasureTask,
    PairTask,
    line_of,
)
from hwprofiles import conditions
from hwprofiles.profile import LinkMeasurement, PairMeasurement, Profile, Snapshot
from hwprofiles.reading import Absent
from hwprofiles.survey import Survey
from models.engine.names import PROCESSOR
from wire.errors import EdgelamError
from wire.messages import ArtifactRef, Kit, KitModule

LOG = logging.getLogger("edgelam.measuring")
WORKER_MODULE: Final = "agent.workers.measuring"

NICE: Final = 5
"""Of the worker while stages run: their tokens go first."""

DEADLINE_S: Final = 1800.0
"""A job that takes longer hangs; on a machine with many virtual boards, waiting for the turn is part of it."""

LAUNCH_PAUSE_S: Final = 10.0
"""Until the next try when no worker could be started: too many processes, or too little memory."""

LINK_PAUSE_S: Final = 1.0
LINK_LONGEST_PAUSE_S: Final = 600.0
"""A link that could not be measured is tried again after a pause that doubles each time."""


_SAID: Final = msgspec.json.Decoder(MeasureNote | MeasuredModule | Measured)


class Measuring:
    """`login(client)` and `url_of(base, digest)` are as for agent.stages; `survey()` reads the device afresh."""

    def __init__(
        self,
        subject: Subject,
        launcher: Launcher,
        store: Store,
        fetcher: Fetcher,
        login: Callable[[str], BrokerLogin],
        url_of: Callable[[str, str], str],
        survey: Callable[[], Survey],
        own_broker: BoardBroker | None = None,
        snapshot: Callable[[], Snapshot] = conditions.snapshot,
    ) -> None:
        self._subject = subject
        self._launcher = launcher
        self._store = store
        self._fetcher = fetcher
        self._login = login
        self._url_of = url_of
        self._own_broker = own_broker
        self._snapshot = snapshot
        self._kit: Kit | None = None
        self._job: Job | None = None
        self._asked: list[Asked] = []
        self._hopeless: dict[str, str] = {}
        self._link_tries = 0
        self._link_not_before_s = 0.0
        self._tried_broker = ""
        self._not_before_s = 0.0
        self._launches = 0
        self._others = engines.others(survey().engines, subject.engines)
        self._engines_failed: dict[str, str] = {}
        """Other engines that could not be measured with, and why."""
        self._board_tried = False
        self._kept = Kept(subject, survey, snapshot)
        self.note = ""
        """How far the job is, for people."""

    @property
    def profile(self) -> Profile | None:
        return self._kept.profile

    @property
    def busy(self) -> bool:
        """Whether a worker measures."""
        return self._job is not None and self._job.worker != 0

    @property
    def has_kit(self) -> bool:
        return self._kit is not None

    @property
    def satisfied(self) -> bool:
        """Whether all of the kit is measured, or has been tried."""
        done = self._kit is not None and self._job is None and not self._missing() and not self._asked
        return done and not self._board_due() and self._due_elsewhere() is None

    @property
    def wanted_files(self) -> dict[str, ArtifactRef]:
        """Graphs that the job needs, by digest."""
        job = self._job  # The fetching thread asks too.
        return job.wanted_files if job is not None else {}

    def kit(self, kit: Kit) -> None:
        """Take a new kit. What failed before is tried again if its graphs are others; an empty kit is none."""
        if self._kit is not None and kit.modules != self._kit.modules:
            self._hopeless.clear()
        self._kit = kit if kit.modules else None

    def ask(self, asked: Asked) -> str:
        """Measure on command: the whole kit, or only the link. Gives why not, or '' and an Outcome later."""
        if self._kit is None and asked.verb in ("measure", "sustain"):
            return "the coordinator has published no kit to measure with"
        if len(self._asked) >= 8:
            return "too many measurements are waiting already"
        self._asked.append(asked)
        return ""

    def step(self, now_s: float, broker_url: str, stages_run: bool) -> tuple[bool, Outcome | None]:
        """Go on. Gives whether a worker was just started, and the outcome of a job that came to nothing."""
        if self._job is None:
            self._look_whether_expired(now_s)
            self._job = self._next_job(now_s, broker_url)
        job = self._job
        if job is None:
            return False, self._nothing_pending()
        if job.worker:
            if now_s - job.launched_s > DEADLINE_S + job.sustained_s:
                self._launcher.end(job.worker)
            return False, None
        job.modules = tuple(module for module in job.modules if module.key not in job.failed)
        if not (job.modules or job.link or job.ways or job.board or job.pair is not None):
            return False, self._close(job, "nothing of the kit could be fetched")
        missing = [ref for digest, ref in self.wanted_files.items() if digest not in self._store.present]
        if missing:
            base = self._kit.artifacts_url if self._kit else ""
            self._fetcher.want(missing, lambda digest: self._url_of(base, digest))
            return False, None
        return self._launch(job, now_s, stages_run)

    def fetched(self, progress: Progress) -> None:
        """Take news of the fetcher: modules whose graph can't be had are left out."""
        if self._job is None or not progress.failed:
            return
        for module in self._job.modules:
            if any(ref.digest == progress.digest for ref in self._job.graphs_of(module)):
                self._job.failed[module.key] = progress.failed

    def heard(self, event: Line | Ended, now_s: float) -> tuple[bool, Outcome | None]:
        """Take news of a worker. Gives whether it is ours, and the outcome when it ended."""
        job = self._job
        if job is None or not job.worker or job.worker != event.worker:
            return False, None
        if isinstance(event, Ended):
            return True, self._ended(job, event, now_s)
        try:
            self._hear(job, event.text)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            LOG.warning("the measuring worker wrote a line that can't be read: %s", error)
        return True, None

    def _hear(self, job: Job, line: bytes) -> None:
        """Whatever is measured is kept at once: an agent that is killed goes on where it was."""
        said: MeasureNote | MeasuredModule | Measured = _SAID.decode(line)
        if isinstance(said, Measured):
            job.result = said
        elif isinstance(said, MeasuredModule):
            job.parts.append(said.module)
            try:
                self._take(job, part=True)
            except (EdgelamError, OSError) as problem:
                LOG.warning("the profile could not be kept: %s", problem)
        else:
            self.note = said.note
            LOG.info("measuring: %s", self.note)

    def disturbed(self) -> None:
        """The device lost its broker: what the job under way finds of the link says nothing."""
        if self._job is not None:
            self._job.disturbed = True

    def end(self) -> None:
        """Give up what is under way."""
        if self._job is not None and self._job.worker:
            self._launcher.end(self._job.worker)
        else:
            self._job = None
        self._asked.clear()
        self._kit = None

    # One job.

    def _next_job(self, now_s: float, broker_url: str) -> Job | None:
        if self._asked:
            asked, self._asked = together(self._asked)
            if asked[0].sustained_s:
                blocks = [module for module in self._modules if module.kind == "block"]
                return Job(tuple(blocks[-1:]), False, False, asked)
            whole = any(one.verb == "measure" for one in asked)
            if whole:
                self._engines_failed.clear()
            modules = self._modules if whole else ()
            link = any(one.verb not in ("probe-ways", PROBE_PAIR) for one in asked)
            return Job(modules, link, bool(modules) and not self._subject.emulation, asked)
        if self._kit is None or now_s < self._not_before_s:
            return None
        if broker_url != self._tried_broker:
            self._tried_broker = broker_url
            self._link_tries, self._link_not_before_s = 0, 0.0
        link_due = self._link_due(broker_url) and now_s >= self._link_not_before_s
        missing, board = self._missing(), self._board_due()
        if missing or link_due or board:
            return Job(missing, link_due or bool(missing), board, ())
        return self._job_elsewhere()

    def _job_elsewhere(self) -> Job | None:
        """Measure on the next of the other engines, alone: it may take its worker along."""
        found = self._due_elsewhere()
        if found is None:
            return None
        job = Job(found.modules, False, False, ())
        job.engine = found.engine
        return job

    def _due_elsewhere(self) -> engines.Due | None:
        return engines.due(self._others, self._engines_failed, self._modules, self.profile)

    def _nothing_pending(self) -> Outcome | None:
        """Plans wait for an engine that is still to be measured (`Profile.pending`). With another kit, or settings that
        leave it out, it never will be: that is said."""
        waits = self.profile is not None and bool(self.profile.pending)
        if not waits or self._kit is None or self._due_elsewhere() is not None:
            return None
        error = ""
        try:
            self._kept.nothing_pending()
        except OSError as problem:
            error = f"the profile could not be kept: {problem}"
        return Outcome((), (), {}, Absent("the link was not measured"), error)

    def _missing(self) -> tuple[KitModule, ...]:
        known = engines.measured(self.profile, PROCESSOR)
        return tuple(module for module in self._modules if module.key not in known and module.key not in self._hopeless)

    def _board_due(self) -> bool:
        return not self._board_tried and board_is_due(self.profile, self._subject.emulation)

    def _link_due(self, broker_url: str) -> bool:
        """The link is measured when it is not known, or known to another broker."""
        link = self.profile.link if self.profile else None
        return not isinstance(link, LinkMeasurement) or link.broker != broker_url

    def _launch(self, job: Job, now_s: float, stages_run: bool) -> tuple[bool, Outcome | None]:
        self._launches += 1
        modules = tuple(
            MeasureModule(
                module=module,
                graph_paths=tuple((stack, str(self._store.path_of(ref.digest))) for stack, ref in module.graphs),
                standard_paths=tuple((stack, str(self._store.path_of(ref.digest))) for stack, ref in module.standard),
            )
            for module in job.modules
        )
        task = MeasureTask(
            device=self._subject.device,
            site=self._subject.site,
            modules=modules,
            login=self._login(f"probe-{self._launches}") if job.link else None,
            ways=tuple((url, self._way_login(url, number)) for number, url in enumerate(job.ways)),
            pair=None if job.pair is None else self._pair_task(job.pair),
            threads=self._subject.threads,
            speed=self._subject.speed,
            throttle_path=self._subject.throttle_path,
            shared_folder=self._subject.shared_folder,
            shared_since_s=now_s if job.asked else 0.0,
            budget_s=self._subject.budget_s,
            nice=NICE if stages_run else 0,
            engine=job.engine,
            engines_path=self._subject.engines_path,
            yields=stages_run,
            board=job.board,
            sustained_s=job.sustained_s,
            cache_folder=self._subject.cache_folder,
        )
        job.before = self._snapshot()
        try:
            job.worker = self._launcher.launch(WORKER_MODULE, line_of(task), self._subject.threads)
        except OSError as error:
            self._not_before_s = now_s + LAUNCH_PAUSE_S
            return False, self._close(job, f"no worker could be started: {error.strerror}")
        job.launched_s = now_s
        LOG.info("measuring %d modules%s", len(modules), " and the link" if job.link else "")
        return True, None

    def _way_login(self, url: str, number: int) -> BrokerLogin:
        """How the worker reaches a board's broker, which may be our own: that one is dialled as stages here do."""
        login = self._login(f"probe-{self._launches}-{number}")
        own = self._own_broker.at if self._own_broker is not None else None
        return msgspec.structs.replace(login, url=own.url if own is not None and own.address == url else url)

    def _pair_task(self, asked: PairAsk) -> PairTask:
        site = self._login(f"probe-{self._launches}")
        inward = self._way_login(asked.inward, 0) if asked.inward else site
        outward = self._way_login(asked.outward, 1) if asked.outward else site
        return PairTask(
            peer=asked.peer, measure=asked.measure, way=asked.way, token=asked.token, inward=inward, outward=outward
        )

    def _ended(self, job: Job, event: Ended, now_s: float) -> Outcome:
        if job.link:
            pause_s = LINK_PAUSE_S * 2 ** min(self._link_tries, 20)
            self._link_not_before_s = now_s + min(LINK_LONGEST_PAUSE_S, pause_s)
            self._link_tries += 1
        self._board_tried = self._board_tried or job.board
        if job.result is None and (job.sustained_s or job.engine != PROCESSOR):
            return self._close(job, f"the measuring worker {event.words}")
        if job.result is None:
            done = {module.key for module in job.parts}
            job.failed.update({module.key: event.words for module in job.modules if module.key not in done})
            return self._close(job, f"the measuring worker {event.words}")
        job.failed.update(job.result.failed)
        if isinstance(job.result.link, LinkMeasurement):
            self._link_tries = 0
        return self._close(job, "")

    def _failed_elsewhere(self, job: Job, error: str) -> str:
        """What another engine can't do says nothing about the modules: the processor has measured them."""
        failed = {**job.failed, **(job.result.failed if job.result is not None else {})}
        because = next(iter(failed.values()), error)
        if because:
            self._engines_failed[job.engine] = because[:MAX_REASON_LETTERS]
            LOG.warning("not measured with %s: %s", job.engine, because)
        job.failed.clear()
        return because

    def _close(self, job: Job, error: str) -> Outcome:
        self._job = None
        if job.engine != PROCESSOR:
            error = self._failed_elsewhere(job, error)
        pair = job.result.pair if job.result is not None else None
        found = job.modules or job.link or job.board or isinstance(pair, PairMeasurement)
        if ((job.result is not None or job.failed or job.parts) and found) or job.engine != PROCESSOR:
            try:
                self._take(job)
            except (EdgelamError, OSError) as problem:
                error = error or f"the profile could not be kept: {problem}"
        self.note = ""
        self._hopeless.update(job.failed)
        for key, reason in job.failed.items():
            LOG.warning("not measured: %s: %s", key, reason)
        measured = tuple(module.key for module in (job.result.modules if job.result else job.parts))
        link = job.result.link if job.result else Absent("the link was not measured")
        result = job.result or NOTHING
        return Outcome(
            job.asked, measured, job.failed, link, error, result.ways, result.ways_failed, pair, result.sustained
        )

    def _take(self, job: Job, part: bool = False) -> None:
        """Keep what was found. Raises EdgelamError, OSError."""
        self._kept.take(job, self._modules, self._others, self._engines_failed, part)

    def _look_whether_expired(self, now_s: float) -> None:
        if self._kit is not None and self._kept.gave_up(now_s):
            self._hopeless.clear()
            self._engines_failed.clear()
            self._board_tried, self._tried_broker = False, ""

    @property
    def _modules(self) -> tuple[KitModule, ...]:
        return self._kit.modules if self._kit is not None else ()
