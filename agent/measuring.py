"""Takes the device's measure when the coordinator's kit names something that was not measured yet.

Belongs to the supervisor's thread. One job at a time: its graphs are fetched, one worker times them and the link, and
what it found is joined with what was known into the profile, which is kept in the state folder. A profile that no
longer fits the device (software, limits, emulation, age) is dropped at the start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from agent.fetch import Fetcher, Progress
from agent.launcher import Ended, Launcher, Line
from agent.store import Store
from agent.workers.pipe import BrokerLogin, Measured, MeasureModule, MeasureNote, MeasureTask, line_of, read_line
from hwprofiles import conditions, profile
from hwprofiles.profile import LinkMeasurement, Profile, Snapshot
from hwprofiles.reading import Absent, Failed, Reading
from hwprofiles.survey import Engines, Survey
from wire.errors import EdgelamError
from wire.messages import ArtifactRef, Command, Kit, KitModule

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


NOT_MEASURED: Final[Mapping[str, str]] = {
    "torch": "stages are planned for onnxruntime, torch is the reference that it is checked against",
    "tensorrt": "no stage can be run on it yet",
}
"""Engines that a board may have and that nobody plans for: why no time is spent on measuring them."""


NOTHING: Final = Measured(
    modules=(), failed={}, link=Absent("not measured yet"), engines_loaded={}, allow_spinning=False
)
"""What a worker found that did not live to say it."""

MAX_REASON_LETTERS: Final = 1024


class Subject(Struct, frozen=True, kw_only=True):
    """Whose measure is taken."""

    site: str
    device: str
    threads: int
    speed: float
    emulation: str
    budget_s: float
    profile_path: Path


class Asked(NamedTuple):
    """A command that waits for a measurement: 'measure' (the whole kit) or 'probe-link'."""

    verb: str
    command: Command


class Outcome(NamedTuple):
    """A job is over. `asked` are the commands that waited for it; `link` is what this job found of it; `error` is '' if
    something was measured."""

    asked: tuple[Asked, ...]
    measured: tuple[str, ...]
    failed: Mapping[str, str]
    link: LinkMeasurement | Absent | Failed
    error: str


class _Job:
    def __init__(self, modules: tuple[KitModule, ...], link: bool, asked: tuple[Asked, ...]) -> None:
        self.modules = modules
        self.link = link
        self.asked = asked
        self.failed: dict[str, str] = {}
        self.worker = 0
        self.launched_s = 0.0
        self.before: Snapshot | None = None
        self.disturbed = False
        self.result: Measured | None = None


def engines_in_words(found: Engines, loaded: Mapping[str, str], known: Profile | None) -> Engines:
    """What the profile says of each engine: what was loaded to measure with, now or for the modules known before; else
    why it has no figures."""
    said: Engines = {}
    measured_before = {module.engine for module in known.modules} if known is not None else set()
    for name, reading in found.items():
        said[name] = reading
        if name in loaded:
            said[name] = Reading(loaded[name], "loaded by the measuring worker")
        elif known is not None and name in measured_before and name in known.engines:
            said[name] = known.engines[name]
        elif isinstance(reading, Reading) and name in NOT_MEASURED:
            said[name] = Absent(f"not measured, though {name} {reading.value} is installed: {NOT_MEASURED[name]}")
    return said


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
        snapshot: Callable[[], Snapshot] = conditions.snapshot,
    ) -> None:
        self._subject = subject
        self._launcher = launcher
        self._store = store
        self._fetcher = fetcher
        self._login = login
        self._url_of = url_of
        self._survey = survey
        self._snapshot = snapshot
        self._kit: Kit | None = None
        self._job: _Job | None = None
        self._asked: list[Asked] = []
        self._hopeless: dict[str, str] = {}
        self._link_tries = 0
        self._link_not_before_s = 0.0
        self._tried_broker = ""
        self._not_before_s = 0.0
        self._launches = 0
        self.profile: Profile | None = self._remembered()
        self.note = ""
        """How far the job is, for people."""

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
        return self._kit is not None and self._job is None and not self._missing() and not self._asked

    @property
    def wanted_files(self) -> dict[str, ArtifactRef]:
        """Graphs that the job needs, by digest."""
        job = self._job  # The fetching thread asks too.
        if job is None:
            return {}
        return {ref.digest: ref for module in job.modules for _, ref in module.graphs}

    def kit(self, kit: Kit) -> None:
        """Take a new kit. What failed before is tried again if its graphs are others; an empty kit is none."""
        if self._kit is not None and kit.modules != self._kit.modules:
            self._hopeless.clear()
        self._kit = kit if kit.modules else None

    def ask(self, asked: Asked) -> str:
        """Measure on command: the whole kit, or only the link. Gives why not, or '' and an Outcome later."""
        if self._kit is None and asked.verb == "measure":
            return "the coordinator has published no kit to measure with"
        if len(self._asked) >= 8:
            return "too many measurements are waiting already"
        self._asked.append(asked)
        return ""

    def step(self, now_s: float, broker_url: str, stages_run: bool) -> tuple[bool, Outcome | None]:
        """Go on. Gives whether a worker was just started, and the outcome of a job that came to nothing."""
        if self._job is None:
            self._job = self._next_job(now_s, broker_url)
        job = self._job
        if job is None:
            return False, None
        if job.worker:
            if now_s - job.launched_s > DEADLINE_S:
                self._launcher.end(job.worker)
            return False, None
        job.modules = tuple(module for module in job.modules if module.key not in job.failed)
        if not job.modules and not job.link:
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
            if any(ref.digest == progress.digest for _, ref in module.graphs):
                self._job.failed[module.key] = progress.failed

    def heard(self, event: Line | Ended, now_s: float) -> tuple[bool, Outcome | None]:
        """Take news of a worker. Gives whether it is ours, and the outcome when it ended."""
        job = self._job
        if job is None or not job.worker or job.worker != event.worker:
            return False, None
        if isinstance(event, Ended):
            return True, self._ended(job, event, now_s)
        try:
            said = read_line(event.text, Measured) if b'"modules"' in event.text else None
            if said is not None:
                job.result = said
            else:
                self.note = read_line(event.text, MeasureNote).note
                LOG.info("measuring: %s", self.note)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            LOG.warning("the measuring worker wrote a line that can't be read: %s", error)
        return True, None

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

    def _next_job(self, now_s: float, broker_url: str) -> _Job | None:
        if self._asked:
            asked, self._asked = self._asked, []
            whole = any(one.verb == "measure" for one in asked)
            modules = self._kit.modules if whole and self._kit else ()
            return _Job(modules, True, tuple(asked))
        if self._kit is None or now_s < self._not_before_s:
            return None
        if broker_url != self._tried_broker:
            self._tried_broker = broker_url
            self._link_tries, self._link_not_before_s = 0, 0.0
        link_due = self._link_due(broker_url) and now_s >= self._link_not_before_s
        missing = self._missing()
        return _Job(missing, link_due or bool(missing), ()) if missing or link_due else None

    def _missing(self) -> tuple[KitModule, ...]:
        known = {module.key for module in self.profile.modules} if self.profile else set()
        kit = self._kit.modules if self._kit else ()
        return tuple(module for module in kit if module.key not in known and module.key not in self._hopeless)

    def _link_due(self, broker_url: str) -> bool:
        """The link is measured when it is not known, or known to another broker."""
        link = self.profile.link if self.profile else None
        return not isinstance(link, LinkMeasurement) or link.broker != broker_url

    def _launch(self, job: _Job, now_s: float, stages_run: bool) -> tuple[bool, Outcome | None]:
        self._launches += 1
        modules = tuple(
            MeasureModule(
                module=module,
                graph_paths=tuple((stack, str(self._store.path_of(ref.digest))) for stack, ref in module.graphs),
            )
            for module in job.modules
        )
        task = MeasureTask(
            device=self._subject.device,
            site=self._subject.site,
            modules=modules,
            login=self._login(f"probe-{self._launches}") if job.link else None,
            threads=self._subject.threads,
            speed=self._subject.speed,
            budget_s=self._subject.budget_s,
            nice=NICE if stages_run else 0,
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

    def _ended(self, job: _Job, event: Ended, now_s: float) -> Outcome:
        if job.link:
            pause_s = LINK_PAUSE_S * 2 ** min(self._link_tries, 20)
            self._link_not_before_s = now_s + min(LINK_LONGEST_PAUSE_S, pause_s)
            self._link_tries += 1
        if job.result is None:
            for module in job.modules:
                job.failed[module.key] = event.words
            return self._close(job, f"the measuring worker {event.words}")
        job.failed.update(job.result.failed)
        if isinstance(job.result.link, LinkMeasurement):
            self._link_tries = 0
        return self._close(job, "")

    def _close(self, job: _Job, error: str) -> Outcome:
        self._job = None
        if job.result is not None or job.failed:
            try:
                self._take(job)
            except (EdgelamError, OSError) as problem:
                error = error or f"the profile could not be kept: {problem}"
        self.note = ""
        self._hopeless.update(job.failed)
        for key, reason in job.failed.items():
            LOG.warning("not measured: %s: %s", key, reason)
        measured = tuple(module.key for module in job.result.modules) if job.result else ()
        link = job.result.link if job.result else Absent("the link was not measured")
        return Outcome(job.asked, measured, job.failed, link, error)

    # The profile.

    def _remembered(self) -> Profile | None:
        try:
            known = profile.load(self._subject.profile_path)
        except EdgelamError as error:
            if self._subject.profile_path.exists():
                LOG.warning("%s", error)
            return None
        except OSError as error:
            LOG.warning("%s: %s", self._subject.profile_path, error)
            return None
        emulation = self._subject.emulation
        because = profile.expired(known, time.time(), self._snapshot(), self._survey().memory, emulation)
        if not because and any(module.threads != self._subject.threads for module in known.modules):
            because = f"threads changed to {self._subject.threads}"
        if because:
            LOG.info("the kept profile no longer holds: %s", because)
            return None
        return known

    def _take(self, job: _Job) -> None:
        """Join what was found with what is known of other modules; save. Raises EdgelamError, OSError."""
        survey, now = self._survey(), self._snapshot()
        result = job.result or NOTHING
        known = self.profile
        fresh = {module.key for module in result.modules}
        in_kit = {module.key for module in self._kit.modules} if self._kit else set()
        # Modules of the kit last, so that the oldest of others are dropped where all of them are too many.
        kept = [module for module in known.modules if module.key not in fresh] if known else []
        kept.sort(key=lambda module: module.key in in_kit)
        link: LinkMeasurement | Absent | Failed = result.link
        if isinstance(link, Failed) and job.disturbed:
            link = Absent(link.because)
        # What was measured to another broker is nearer to the truth than nothing.
        if isinstance(link, Absent) and known is not None and (not job.link or isinstance(known.link, LinkMeasurement)):
            link = known.link
        joined = Profile(
            source="emulated" if self._subject.emulation else "live",
            emulation=self._subject.emulation,
            identity=survey.identity,
            memory=survey.memory,
            cores=survey.cores,
            conditions=conditions.join(job.before or now, now, result.allow_spinning),
            engines=engines_in_words(survey.engines, result.engines_loaded, known),
            modules=(*kept, *result.modules)[-256:],
            link=link,
            failed=self._failed(known, job, fresh),
        )
        self.profile = profile.compact(joined)
        profile.save(self.profile, self._subject.profile_path)

    def _failed(self, known: Profile | None, job: _Job, fresh: set[str]) -> dict[str, str]:
        """Why modules have no figures: those of the kit first, should they be too many."""
        found = {**(known.failed if known is not None else {}), **job.failed}
        in_kit = {module.key for module in self._kit.modules} if self._kit else set()
        keys = sorted((key for key in found if key not in fresh), key=lambda key: key not in in_kit)
        return {key: found[key][:MAX_REASON_LETTERS] for key in keys[:256]}
