"""The stages of this device: carries out what agent.converge decides, and reports what became of it.

Belongs to the supervisor's thread. `converge` may be called as often as one likes; it acts only upon a change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec
from msgspec import Struct

from agent import converge
from agent.converge import Adopt, Fetch, Hold, Key, Running, Start, Stop
from agent.fetch import Fetcher, Progress
from agent.hanging import LOOK_PERIOD_S, Sign
from agent.launcher import Ended, Launcher, Line
from agent.restarts import Deaths
from agent.store import Store
from agent.workers.pipe import Assignment, BrokerLogin, DataBrokerAt, Status, Tell, line_of, read_line
from models.engine.names import FALLBACKS
from wire.messages import ArtifactRef, Desired, StageCounters, StageOrder, StageReport, TrainingTask

LOG = logging.getLogger("edgelam.stages")
WORKER_MODULES: Final = {
    "tokens": "agent.workers.inference",
    "items": "agent.workers.items",
    "rounds": "agent.workers.training",
}
"""By what a stage runs."""

MAX_WORDS: Final = 1024
"""Letters of what an engine says."""


class Bench(Struct, frozen=True, kw_only=True):
    """What all workers of this device have in common."""

    device: str
    site: str
    threads: int
    speed: float = 1.0
    throttle_path: str = ""
    memory_limit_bytes: int = 0
    engines_path: str = ""
    gpu: bool = False
    """Whether workers that train may use one."""
    data: Mapping[str, str] = {}
    """Name -> file or folder of what may be trained on."""
    epsilons: Mapping[str, float] = {}
    """Name -> most that all jobs together may come to know of it."""
    told_states: Collection[str] = ()
    """Names of those of these whose states may leave the board."""
    state_path: str = ""


@dataclass(slots=True, eq=False)
class _Stage:
    """`order` is what the worker runs, None without a worker. `wanted` is the newest order, for reports."""

    wanted: StageOrder
    order: StageOrder | None = None
    worker: int = 0
    url: str = ""
    ending: bool = False
    deaths: Deaths = field(default_factory=Deaths)
    deaths_epoch: int = -1
    crashed: dict[str, str] = field(default_factory=dict)
    """Engines with which a worker died while it loaded, in this epoch: the next one does without."""
    fetching: bool = False
    fetch_failed: dict[str, str] = field(default_factory=dict)
    fetch_note: str = ""
    note: str = ""
    """What went wrong last with a worker."""
    status: Status | None = None
    sign: Sign | None = None
    """Of the worker."""
    hung: str = ""
    """Why the worker was killed, until it is gone."""
    impossible: str = ""
    """Why the stage can't be reached where the order says, or not be trained here; no worker is started for it then."""


class BoardBroker(Protocol):
    """agent.databroker.DataBroker, as far as stages need it."""

    at: DataBrokerAt | None

    @property
    def starting(self) -> bool: ...


class Stages:
    """`login(client)` says how a worker called `client` reaches the broker; `url_of(digest)` where an artifact is."""

    def __init__(
        self,
        bench: Bench,
        launcher: Launcher,
        store: Store,
        fetcher: Fetcher,
        login: Callable[[str], BrokerLogin],
        url_of: Callable[[str, str], str],
        own_broker: BoardBroker | None = None,
    ) -> None:
        self._bench = bench
        self._launcher = launcher
        self._store = store
        self._fetcher = fetcher
        self._login = login
        self._url_of = url_of
        self._own_broker = own_broker
        self._desired: Desired | None = None
        self._stages: dict[Key, _Stage] = {}
        self._have_bytes: dict[str, int] = {}
        self._looked_s = 0.0
        self.answered = False
        """A request has ended since this was last set to False: its counters are waited for."""
        self._launches = 0

    @property
    def wanted_files(self) -> dict[str, ArtifactRef]:
        """Files that the wanted stages need, by digest."""
        orders = self._desired.stages if self._desired else ()
        return {ref.digest: ref for order in orders for ref in converge.files_of(order)}

    @property
    def empty(self) -> bool:
        """Whether no worker is left."""
        return not any(stage.worker for stage in self._stages.values())

    @property
    def counters(self) -> tuple[StageCounters, ...]:
        """The newest counters of each stage."""
        found = [stage.status.counters for stage in self._stages.values() if stage.status]
        return tuple(counters for counters in found if counters is not None)

    def want(self, desired: Desired) -> None:
        """From now on, this is what should run. The caller has checked and fenced it."""
        self._desired = desired
        self._have_bytes = {digest: have for digest, have in self._have_bytes.items() if digest in self.wanted_files}
        for order in desired.stages:
            stage = self._stages.setdefault(converge.key_of(order), _Stage(order))
            stage.wanted, stage.impossible = order, ""
            if stage.deaths_epoch != desired.epoch:
                stage.deaths, stage.deaths_epoch, stage.crashed = Deaths(), desired.epoch, {}

    def converge(self, now_s: float) -> None:
        """Take the steps that are due."""
        wanted = self._desired.stages if self._desired else ()
        running = {key: _as_running(stage, now_s) for key, stage in self._stages.items()}
        for stage in self._stages.values():
            stage.fetching = False
        for action in converge.actions(wanted, running, self._store.present):
            if isinstance(action, Stop):
                self._stop(self._stages[action.key], action.because)
            elif isinstance(action, Adopt):
                self._adopt(self._stages[action.key], action.order)
            elif isinstance(action, Start):
                self._start(self._stages[action.key], action.order, now_s)
            else:
                self._fetch(self._stages[action.key], action)
        keys = {converge.key_of(order) for order in wanted}
        for key in [key for key, stage in self._stages.items() if key not in keys and not stage.worker]:
            del self._stages[key]

    def relocate(self, url: str) -> None:
        """The broker is elsewhere now: workers that talk to another address are started again."""
        for stage in self._stages.values():
            if stage.worker and stage.url != url:
                self._stop(stage, "the broker moved")

    def end_all(self) -> None:
        """Want nothing any more."""
        self._desired = None

    def fetched(self, progress: Progress) -> None:
        """Take news of the fetcher."""
        self._have_bytes[progress.digest] = progress.have_bytes
        for stage in self._stages.values():
            if any(ref.digest == progress.digest for ref in converge.files_of(stage.wanted)):
                stage.fetch_note = progress.note
                if progress.failed:
                    stage.fetch_failed[progress.digest] = progress.failed
                else:
                    stage.fetch_failed.pop(progress.digest, None)

    def heard(self, event: Line | Ended, now_s: float) -> bool:
        """Take news of a worker; False if it is none of ours."""
        stage = next((stage for stage in self._stages.values() if stage.worker == event.worker), None)
        if stage is None:
            return False
        if isinstance(event, Ended):
            self._ended(stage, event, now_s)
            return True
        try:
            status = read_line(event.text, Status)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            LOG.warning("worker %d: a line that is no status: %s", event.worker, error)
            return True
        if stage.status is None or stage.status.phase != status.phase:
            LOG.info("%s: %s %s", _name(stage.wanted), status.phase, status.detail)
        stage.status = status
        if status.phase == "ready":
            # A step of training takes minutes on a slow board.
            patient = stage.wanted.runs == "rounds"
            if stage.sign is None or stage.sign.loading:
                stage.sign = Sign(now_s, self._bench.speed, loading=patient)
            stage.note = ""
        if stage.sign is not None:
            stage.sign.heard(now_s)
        self.answered = self.answered or status.answered
        return True

    def kill_hanging(self, now_s: float) -> list[str]:
        """Kill workers that hang, and give what is to be said of it. They are started again as any that died."""
        if now_s - self._looked_s < LOOK_PERIOD_S:
            return []
        slept = now_s - self._looked_s > 2 * LOOK_PERIOD_S
        self._looked_s = now_s
        said = []
        for stage in self._stages.values():
            if stage.sign is None or stage.ending or stage.hung:
                continue
            stage.sign.used(self._launcher.processor_s(stage.worker), now_s)
            if slept:  # We were stopped ourselves, and so were they, perhaps.
                stage.sign.heard(now_s)
            stage.hung = stage.sign.problem(now_s)
            if stage.hung:
                self._launcher.kill(stage.worker)
                said.append(f"{_name(stage.wanted)}: its worker is started again: {stage.hung}")
        return said

    def reports(self, now_s: float) -> tuple[StageReport, ...]:
        """What became of each stage, for the applied topic."""
        return tuple(self._report(stage, now_s) for _, stage in sorted(self._stages.items()))

    # Actions.

    def _fetch(self, stage: _Stage, action: Fetch) -> None:
        assert self._desired is not None
        stage.fetching = True
        base = self._desired.artifacts_url
        self._fetcher.want(action.refs, lambda digest: self._url_of(base, digest))

    def _start(self, stage: _Stage, order: StageOrder, now_s: float) -> None:
        bench, task = self._bench, order.training
        if not self._reached(stage, order):
            return
        data = _data_of(order)
        stage.impossible = next(filter(None, (self._impossible(task, name) for name in data.values())), "")
        if stage.impossible:
            return
        self._store.touch([ref.digest for ref in converge.files_of(order)])
        self._launches += 1
        login = self._login(f"{order.deployment}-{order.stage}-{self._launches}")
        standard = order.standard_graph
        assignment = Assignment(
            device=bench.device,
            site=bench.site,
            order=order,
            graph_path=str(self._store.path_of(order.graph.digest)),
            weight_paths=tuple(str(self._store.path_of(ref.digest)) for ref in order.weights),
            standard_graph_path=str(self._store.path_of(standard.digest)) if standard else "",
            tokenizer_path=str(self._store.path_of(task.tokenizer.digest)) if task and task.tokenizer else "",
            data_path=bench.data[data[""]] if "" in data else "",
            data_paths={modality: bench.data[name] for modality, name in data.items() if modality},
            state_path=bench.state_path,
            most_epsilon=bench.epsilons.get(task.data) if task is not None else None,
            engines_path=bench.engines_path,
            gpu=bench.gpu,
            crashed=stage.crashed,
            login=login,
            data_broker=self._own_at,
            threads=bench.threads,
            speed=bench.speed,
            throttle_path=bench.throttle_path,
            memory_limit_bytes=bench.memory_limit_bytes,
        )
        stage.status = None
        stage.fetch_failed.clear()
        try:
            stage.worker = self._launcher.launch(WORKER_MODULES[order.runs], line_of(assignment), bench.threads)
        except OSError as error:
            stage.deaths.died(now_s)
            stage.note = f"no worker could be started: {error.strerror}"
            LOG.error("%s: %s", _name(order), stage.note)
            return
        stage.order, stage.url = order, login.url
        stage.sign = Sign(now_s, bench.speed, loading=True)
        LOG.info("%s: worker %d started", _name(order), stage.worker)

    def _impossible(self, task: TrainingTask | None, data: str) -> str:
        """Why a data set of this board may not be trained on; '' if it may."""
        bench = self._bench
        if data not in bench.data:
            there = ", ".join(sorted(bench.data)) or "none"
            return f"no data set {data!r} on this board; there are: {there} (edgelam-agent --data)"
        if data in bench.epsilons and (task is None or task.privacy is None or task.privacy.losses):
            return f"data {data!r} of this board are for private jobs, without losses (edgelam-agent --data-epsilon)"
        if task is not None and task.role == "ends" and data in bench.epsilons and data not in bench.told_states:
            return f"states of data {data!r} are not to leave this board (edgelam-agent --data-states)"
        return ""

    def _adopt(self, stage: _Stage, order: StageOrder) -> None:
        if not self._reached(stage, order):
            if stage.impossible:
                self._stop(stage, stage.impossible)
            return
        LOG.info("%s: takes epoch %d without loading again", _name(order), order.epoch)
        self._launcher.tell(stage.worker, line_of(Tell(adopt=converge.light(order), data_broker=self._own_at)))
        stage.order = order

    @property
    def _own_at(self) -> DataBrokerAt | None:
        return self._own_broker.at if self._own_broker is not None else None

    def _reached(self, stage: _Stage, order: StageOrder) -> bool:
        """Whether a stage is reached where the order says: on the site's broker, or on this board's own. While that one
        is starting the stage waits; if it is elsewhere, or there is none, the plan must be made anew."""
        address, at = order.inbox.broker, self._own_at
        stage.impossible = ""
        if not address or (at is not None and at.address == address):
            return True
        if self._own_broker is not None and self._own_broker.starting:
            stage.note = "waits for this board's own broker"
            return False
        here = f"it is at {at.address}" if at is not None else "there is none"
        stage.impossible = f"the plan says that this board's own broker is at {address}; {here}"
        return False

    def _stop(self, stage: _Stage, because: str) -> None:
        if not stage.ending:
            LOG.info("%s: ends: %s", _name(stage.wanted), because)
            stage.ending = True
            self._launcher.end(stage.worker)

    def _ended(self, stage: _Stage, event: Ended, now_s: float) -> None:
        status = stage.status
        if not event.asked:
            # The first time, files are checked again and the stage is given another chance.
            final = status is not None and status.phase == "failed" and status.final
            curable = not final or stage.deaths.total == 0
            said = status.detail if status is not None and status.phase == "failed" else ""
            stage.note = stage.hung or said or event.words
            stage.deaths.died(now_s, curable=curable)
            LOG.error("%s: worker died: %s", _name(stage.wanted), stage.note)
            if status is not None and status.phase == "loading" and status.trying and FALLBACKS[status.trying]:
                how = stage.hung.removeprefix("it ") or event.words
                stage.crashed[status.trying] = f"the worker that loaded it {how}"
            if final and stage.order is not None:
                for ref in converge.files_of(stage.order):
                    self._store.forget(ref.digest)
        stage.worker, stage.order, stage.status, stage.ending = 0, None, None, False
        stage.sign, stage.hung = None, ""

    def _report(self, stage: _Stage, now_s: float) -> StageReport:
        order, status = stage.wanted, stage.status
        files = converge.files_of(order)
        present = self._store.present
        to_fetch = sum(ref.size_bytes for ref in files)
        have = sum(
            ref.size_bytes if ref.digest in present else min(ref.size_bytes, self._have_bytes.get(ref.digest, 0))
            for ref in files
        )
        phase, detail = _phase_of(stage, now_s)
        return StageReport(
            deployment=order.deployment,
            epoch=stage.order.epoch if stage.order else order.epoch,
            stage=order.stage,
            phase=phase,
            detail=detail[:4096],
            fetched_bytes=have,
            to_fetch_bytes=to_fetch,
            held_bytes=status.held_bytes if status else 0,
            resident_bytes=status.resident_bytes if status else 0,
            restarts=stage.deaths.total,
            standby=(stage.order or order).standby,
            engine=status.engine[:MAX_WORDS] if status else "",
            fell_back=status.fell_back[:MAX_WORDS] if status else "",
        )


def _as_running(stage: _Stage, now_s: float) -> Running:
    if stage.worker:
        return Running(stage.order, stage.ending)
    if stage.deaths.gave_up:
        return Running(None, hold=Hold.GIVEN_UP)
    return Running(None, hold=Hold.RESTING if now_s < stage.deaths.until_s else Hold.NONE)


def _phase_of(stage: _Stage, now_s: float) -> tuple[converge.Phase, str]:
    """The phase that the coordinator is told, and why."""
    status = stage.status
    if stage.ending:
        return "stopping", ""
    if stage.worker:
        if status is None or status.phase == "failed":
            return "loading", f"started again; {stage.note}" if stage.note else ""
        ready = status.phase == "ready" and stage.order is not None and status.epoch == stage.order.epoch
        again = f"started again; {stage.note}" if stage.note else ""
        return ("ready", status.engine) if ready else ("loading", status.detail or again)
    if stage.fetch_failed:
        return "failed", next(iter(stage.fetch_failed.values()))
    if stage.fetching:
        return "fetching", stage.fetch_note
    if stage.impossible:
        return "failed", stage.impossible
    if stage.deaths.gave_up:
        return "failed", stage.note
    if now_s < stage.deaths.until_s:
        return "waiting", f"starts again soon; {stage.note}"
    return "waiting", stage.note


def _data_of(order: StageOrder) -> dict[str, str]:
    """Modality -> the data set of this board that an order trains on; '' where there is but one."""
    task = order.training
    if task is None or task.role not in ("whole", "ends"):
        return {}
    if task.connected is not None:
        return {modality: owned.data for modality, owned in task.connected.modalities.items()}
    return {"": task.data}


def _name(order: StageOrder) -> str:
    return f"{'standby of ' if order.standby else ''}stage {order.stage} of {order.deployment} (epoch {order.epoch})"
