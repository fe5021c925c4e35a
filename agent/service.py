"""The supervisor: one loop over the control connection and the workers' pipes. It computes nothing itself.

`Service.step` is one turn: take what came (broker, workers, downloads), let the pure parts decide (agent.lifecycle,
agent.claim, agent.converge), carry it out, publish what changed. numpy, onnxruntime and torch are never imported here.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

import msgspec

from agent import lifecycle, orders
from agent.answers import AppliedNews, refusal_of, reply_to
from agent.claim import Claim, Verdict
from agent.config import AgentConfig
from agent.control import Control
from agent.databroker import DataBroker, Wanted
from agent.describe import device_info
from agent.fetch import Fetcher, artifact_url
from agent.jobs import Asked, Outcome, Subject
from agent.lifecycle import Action, State
from agent.measuring import Measuring
from agent.outside import Advertised, Outside
from agent.pairs import VERB as PROBE_PAIR
from agent.pairs import PairAsk, pair_in
from agent.records import Records
from agent.session import Session
from agent.stages import Bench, Stages
from agent.store import Store
from agent.telemetry import Pulse
from agent.workers.pipe import BrokerLogin
from hwprofiles.probe import thermal
from hwprofiles.reading import Reading
from hwprofiles.survey import Survey, survey
from wire import topics
from wire.errors import Refused
from wire.ids import SITE_USER, new_boot_id
from wire.limits import HEARTBEAT_PERIOD_S
from wire.messages import Applied, Command, Desired, DeviceInfo, DeviceState, Event, Kit, Reply, Telemetry

LOG = logging.getLogger("edgelam.agent")

POLL_S: Final = 0.25
"""Longest wait of a turn: bounds how late a signal or a finished search is seen; workers and messages wake it."""

TEMPERATURE_PERIOD_S: Final = 5.0
CONTRADICT_PERIOD_S: Final = 0.5

AWAITED_BEAT_PERIOD_S: Final = 0.1
"""Between heartbeats while counters are waited for; else HEARTBEAT_PERIOD_S."""
SHOW_AFTER_S: Final = 5.0
"""A board that the broker doesn't let in for so long shows itself over mDNS: the coordinator then tells people."""

BROKER_START_S: Final = 2.0
"""What is announced waits so long for the board's own broker: a plan made without it would keep going around it."""

DRAIN_S: Final = 8.0
"""Workers get five seconds to end, and the kernel some to reap them; then the agent leaves without them."""


class Service:
    """One agent. `run` returns when it was stopped, and raises Refused when its name is another's."""

    def __init__(self, config: AgentConfig, outside: Outside) -> None:
        self.config = config
        self.boot = new_boot_id()
        self.state = State.SEARCHING
        self.stale_orders = 0
        """Orders of an epoch older than one that was acted upon."""
        self._outside = outside
        self._clock = outside.clock
        self._records = Records(config.state_dir)
        self._store = Store(config.cache_dir, config.cache_limit_bytes, used=self._used_files)
        self._fetcher = Fetcher(self._store, self._wake, config.site_key)
        self._launcher = outside.launcher(self._wake)
        self._survey = self._survey_now()
        self._info = device_info(self._survey, config, self.boot)
        self._threads = config.threads or max(1, int(self._survey.cores.usable))
        self._pulse = Pulse(self.boot, self._info.memory_bytes, outside.root)
        self._since_unix = time.time()
        self._control = Control(config, outside, self.boot, self._records, self)
        self._data_broker = self._make_data_broker()
        self._broker_news = False
        """The board's own broker has something to say."""
        self._claim: Claim | None = None
        self._stages: Stages | None = None
        self._measuring: Measuring | None = None
        self._advertised: Advertised | None = None
        self._dialled_s = 0.0
        self._rival_info = ""
        self._refusal: Refused | None = None
        self._refused_order = orders.Refusal(0, "")
        """The newest order that could not be taken."""
        self._stop_asked = False
        self._reason = ""
        self._contradicted_s = -CONTRADICT_PERIOD_S
        self._next_beat_s = 0.0
        self._next_watchdog_s = 0.0
        self._temperature: tuple[float, float | None] = (-1e9, None)
        self._applied_said = AppliedNews()
        self._draining_since_s = 0.0

    # Life.

    def run(self, until: Callable[[Service], bool] = lambda service: False) -> None:  # noqa: ARG005
        """Serve until `stop`, or until `until` says so after a turn."""
        try:
            self.start()
            while self.state is not State.STOPPED:
                self.step(POLL_S)
                if until(self):
                    self.stop()
        finally:
            self.close()
        if self._refusal is not None:
            raise self._refusal

    def start(self) -> None:
        """Begin to look for the broker."""
        self._control.start()
        self._outside.notifier.say(f"READY=1\nSTATUS={self.state.value}")

    def stop(self) -> None:
        """End in order, soon. May be called from a signal handler: it only leaves word."""
        self._stop_asked = True

    def step(self, timeout_s: float) -> None:
        """One turn; waits at most `timeout_s` for something to come."""
        self._control.poll(timeout_s)
        now_s = self._clock()
        if self._stop_asked:
            self._stop_asked = False
            self._outside.notifier.say("STOPPING=1")
            self._handle(lifecycle.Event.STOP)
        if self._control.news(now_s) and (self.state, lifecycle.Event.BROKER_FOUND) in lifecycle.NEXT:
            self._handle(lifecycle.Event.BROKER_FOUND)
        if self.state is State.DIALLING and now_s - self._dialled_s > SHOW_AFTER_S:
            self._advertise()
        self._watch_claim(now_s)
        self._watch_workers(now_s)
        self._watch_fetches()
        self._watch_measuring(now_s)
        self._watch_data_broker()
        if self._stages is not None and self.state in lifecycle.SAID:
            self._stages.converge(now_s)
            self._watch_draining(now_s)
        self._publish_applied(now_s)
        self._beat(now_s)

    def close(self) -> None:
        """Let go of everything, in whatever state. Idempotent."""
        self._fetcher.close()
        if self._advertised is not None:
            self._advertised.close()
            self._advertised = None
        self._control.close()
        if self._data_broker is not None:
            self._data_broker.close()
        self._records.close()

    # What the broker brings (agent.session.Listener).

    def desired(self, message: Desired) -> None:
        if self._stages is None or self.state not in (State.SERVING, State.MEASURING, State.CLAIMING):
            return
        problem = orders.problem_with(message, self._site, self.config.name)
        if problem:
            self._tell("order-refused", "warning", f"an order makes no sense: {problem}")
            self._refuse(message.epoch, problem)
            return
        if message.epoch < self._records.epoch:
            self.stale_orders += 1
            LOG.info("an order of epoch %d is older than %d: ignored", message.epoch, self._records.epoch)
            return
        try:
            self._records.advance_epoch(message.epoch)
        except OSError as error:
            problem = f"{self.config.state_dir}: {error.strerror}; the order is not taken"
            self._tell("state-not-saved", "error", problem)
            self._refuse(message.epoch, problem)
            return
        self._refused_order = orders.Refusal(0, "")
        self._stages.want(message)
        self._fetcher.only(self._used_files())

    def unreadable_order(self, payload: bytes | memoryview, problem: str) -> None:
        """An order that is none: its writer waits for an answer, unless nobody can tell which order it was."""
        self._refuse(orders.epoch_of(payload), problem)

    def _refuse(self, epoch: int, because: str) -> None:
        """From now on `applied` says so, until an order is taken. What is older than the one taken is nobody's loss."""
        if epoch > 0 and epoch >= self._records.epoch:
            self._refused_order = orders.Refusal(epoch, because[:4096])

    def kit(self, message: Kit) -> None:
        self._control.heard()
        if self._measuring is not None:
            self._measuring.kit(message)

    def command(self, verb: str, message: Command) -> None:
        if self._measuring is None or self.state not in (State.SERVING, State.MEASURING):
            return
        pair = pair_in(message) if verb == PROBE_PAIR else None
        asked = Asked(
            verb,
            message,
            orders.brokers_in(message),
            orders.sustained_s_in(verb, message),
            pair if isinstance(pair, PairAsk) else None,
        )
        problem = f"no such command: {verb}; measure, sustain, probe-link, probe-ways and probe-pair are known"
        if verb == "probe-ways" and not asked.urls:
            problem = f"no addresses of brokers: at most {orders.MAX_WAYS} as 'brokers'"
        elif isinstance(pair, str):
            problem = pair
        elif verb == "sustain" and not (asked.sustained_s and self._stages_empty()):
            problem = orders.SUSTAINED_BOUNDS if not asked.sustained_s else orders.SUSTAINED_STAGES
        elif verb in ("measure", "sustain", "probe-link", "probe-ways", PROBE_PAIR):
            problem = self._measuring.ask(asked)
        if problem:
            self._reply(message, refusal_of(message, self.config.name, problem))

    def own_state(self, message: DeviceState) -> None:
        if self._claim is None or message.boot == self.boot:
            return
        now_s = self._clock()
        self._claim.state_seen(message, now_s)
        # An old boot's last will must not stand as our state; a living rival must not make us repeat ourselves.
        if self._claim.claimed and now_s - self._contradicted_s > CONTRADICT_PERIOD_S:
            self._contradicted_s = now_s
            self._publish_state()

    def own_heartbeat(self, message: Telemetry) -> None:
        if self._claim is not None:
            self._claim.heartbeat_seen(message.boot, self._clock())

    def own_info(self, message: DeviceInfo) -> None:
        if message.boot != self.boot:
            self._rival_info = f"{message.board} at {', '.join(message.addresses) or 'unknown address'}"

    # Turns.

    def _watch_claim(self, now_s: float) -> None:
        if self._claim is None or self.state not in (State.CLAIMING, State.SERVING, State.MEASURING):
            return
        verdict = self._claim.verdict(now_s)
        if verdict is Verdict.FREE:
            self._handle(lifecycle.Event.CLAIMED)
        elif verdict is Verdict.TAKEN:
            where = self._rival_info or "another host"
            self._refusal = Refused(
                f"device {self.config.name} of site {self._site} is already running: {where}",
                try_="end that agent, or give this one another --name",
            )
            self._handle(lifecycle.Event.TAKEN)

    def _watch_workers(self, now_s: float) -> None:
        self._launcher.tick(now_s)
        for text in self._stages.kill_hanging(now_s) if self._stages is not None else ():
            self._tell("worker-hung", "warning", text)
        for event in self._launcher.drain():
            if self._stages is not None and self._stages.heard(event, now_s):
                continue
            if self._measuring is not None:
                note = self._measuring.note
                _, outcome = self._measuring.heard(event, now_s)
                if outcome is not None:
                    self._measured(outcome)
                elif self._measuring.note != note:
                    self._publish_state()

    def _watch_fetches(self) -> None:
        for progress in self._fetcher.drain():
            if self._stages is not None:
                self._stages.fetched(progress)
            if self._measuring is not None:
                self._measuring.fetched(progress)

    def _watch_measuring(self, now_s: float) -> None:
        if self._measuring is None or self.state not in (State.SERVING, State.MEASURING):
            return
        if self._session is None or not self._session.up:
            return
        started, outcome = self._measuring.step(now_s, self._url, not self._stages_empty())
        if started:
            self._handle(lifecycle.Event.MEASURE)
        if outcome is not None:
            self._report(outcome)

    def _watch_data_broker(self) -> None:
        """Say where the board's own broker is, when that has changed."""
        broker = self._data_broker
        if broker is None or not self._broker_news:
            return
        self._broker_news = False
        url = broker.at.address if broker.at is not None else ""
        self._info = msgspec.structs.replace(self._info, data_broker=url, data_broker_because=broker.because)
        if self._session is not None and self._session.up and self.state in lifecycle.SAID:
            self._session.publish(topics.INFO, self._info)

    def _watch_draining(self, now_s: float) -> None:
        if self.state is not State.DRAINING:
            return
        measuring = self._measuring is not None and self._measuring.busy
        if (self._stages_empty() and not measuring) or now_s - self._draining_since_s > DRAIN_S:
            self._handle(lifecycle.Event.WORKERS_GONE)

    def _measured(self, outcome: Outcome) -> None:
        if self.state is State.MEASURING:
            self._handle(lifecycle.Event.MEASURED)
        self._report(outcome)

    def _report(self, outcome: Outcome) -> None:
        """Tell what a job found, what it came to, and who asked for it."""
        if self._measuring is not None and self._measuring.profile is not None and self._session is not None:
            self._session.publish(topics.PROFILE, self._measuring.profile)
        self._answer(outcome)

    # Actions.

    def _handle(self, event: lifecycle.Event) -> None:
        step = lifecycle.handle(self.state, event)
        if step.state is not self.state:
            LOG.debug("%s -> %s (%s)", self.state.value, step.state.value, event.value)
            self._outside.notifier.say(f"STATUS={step.state.value}")
        self.state = step.state
        for action in step.actions:
            _DO[action](self)

    def _dial(self) -> None:
        """Connect to the address that was found; a connection to another one is given up."""
        if self._stages is None:
            self._dialled_s = self._clock()
            self._equip()
        self._control.dial()

    def _equip(self) -> None:
        """The site is known: make what holds stages and measures."""
        config = self.config
        speed, throttle = config.emulate_speed, config.emulate_throttle
        bench = Bench(
            device=config.name,
            site=self._site,
            threads=self._threads,
            speed=speed,
            throttle_path=throttle,
            memory_limit_bytes=config.emulate_memory_bytes,
            engines_path=str(config.cache_dir / "engines"),
            gpu=config.engines is None or "torch-cuda" in config.engines,
            data=dict(config.data),
            epsilons=dict(config.data_epsilon),
            told_states=config.data_states,
            state_path=str(config.state_dir),
        )
        self._stages = Stages(
            bench, self._launcher, self._store, self._fetcher, self._login, self._artifact_url, self._data_broker
        )
        subject = Subject(
            site=self._site,
            device=config.name,
            threads=self._threads,
            speed=speed,
            throttle_path=throttle,
            shared_folder=config.emulate_shared,
            emulation=config.emulation,
            budget_s=config.measure_budget_s,
            profile_path=config.state_dir / "profile.json",
            engines=config.engines,
            engines_path=str(config.cache_dir / "engines"),
            cache_folder=str(self._store.folder),
        )
        self._measuring = Measuring(
            subject, self._launcher, self._store, self._fetcher, self._login, self._artifact_url, self._survey_now,
            self._data_broker,
        )  # fmt: skip

    def link_up(self) -> None:
        if self.state in (State.DIALLING, State.SERVING, State.MEASURING, State.DRAINING):
            self._handle(lifecycle.Event.LINK_UP)

    def link_down(self, reason: str) -> None:
        self._reason = reason
        if self._measuring is not None:
            self._measuring.disturbed()
        if self.state in (State.CLAIMING, State.SERVING, State.MEASURING, State.DRAINING):
            self._handle(lifecycle.Event.LINK_DOWN)

    def _ask_who_is_there(self) -> None:
        """Begin the claim: what is retained comes before the echo of our first heartbeat."""
        self._claim = Claim(self.boot, self._since_unix, self._clock())
        if self._session is not None:
            self._session.publish(topics.TELEMETRY, self._pulse.beat(self._clock(), (), None, ()))

    def _announce(self) -> None:
        """Say everything retained, after a first or a new connect."""
        session, stages, measuring = self._session, self._stages, self._measuring
        if session is None or stages is None or measuring is None or not session.up:
            return
        LOG.info("connected to %s over %s as %s", self._url, session.transport.protocol, self.config.name)
        stages.relocate(self._url)
        self._control.remember()
        if self._data_broker is not None:
            self._data_broker.reached(self._control.local_host)
            self._data_broker.await_started(BROKER_START_S)
        self._watch_data_broker()
        applied = self._applied(self._clock())
        session.announce(self._device_state(), self._info, measuring.profile, applied)
        self._applied_said.news(applied, self._clock())
        self._advertise()

    def _advertise(self) -> None:
        if self._advertised is None and self._outside.advertise is not None:
            self._advertised = self._outside.advertise(self._site, self._info)
            self._advertised.start()

    def _publish_state(self) -> None:
        if self._session is not None and self.state in lifecycle.SAID:
            self._session.publish(topics.STATE, self._device_state())

    def _tell_link_lost(self) -> None:
        LOG.warning("broker %s is gone: %s; workers keep running", self._url, self._reason)

    def _end_workers(self) -> None:
        self._draining_since_s = self._clock()
        if self._stages is not None:
            self._stages.end_all()
        if self._measuring is not None:
            self._measuring.end()

    def _leave(self) -> None:
        """Say goodbye, unless the name is another's by now."""
        if self._session is not None and self._refusal is None:
            state = DeviceState(state="offline", boot=self.boot, since_unix=time.time(), reason="stopped")
            if self._session.up:
                self._session.publish(topics.APPLIED, self._applied(self._clock()))
                self._session.publish(topics.STATE, state)
        self._give_way()

    def _give_way(self) -> None:
        self._control.close()

    # Publishing.

    def _publish_applied(self, now_s: float) -> None:
        """Publish what the stages became, when it changed."""
        if self._session is None or not self._session.up or self.state not in lifecycle.SAID:
            return
        applied = self._applied(now_s)
        if self._applied_said.news(applied, now_s):
            self._session.publish(topics.APPLIED, applied)

    def _beat(self, now_s: float) -> None:
        """The heartbeat on telemetry, and the watchdog's."""
        notifier = self._outside.notifier
        if notifier.watchdog_period_s and now_s >= self._next_watchdog_s:
            self._next_watchdog_s = now_s + notifier.watchdog_period_s
            notifier.say("WATCHDOG=1")
        awaited = self._stages is not None and self._stages.answered
        due_s = self._next_beat_s - (HEARTBEAT_PERIOD_S - AWAITED_BEAT_PERIOD_S if awaited else 0.0)
        if now_s < due_s or self._session is None or self.state not in lifecycle.SAID:
            return
        if self._stages is not None:
            self._stages.answered = False
        self._next_beat_s = now_s + HEARTBEAT_PERIOD_S
        if now_s - self._temperature[0] > TEMPERATURE_PERIOD_S:
            reading = thermal.hottest(self._outside.root)
            self._temperature = (now_s, reading.value if isinstance(reading, Reading) else None)
        pids = (os.getpid(), *self._launcher.pids)
        counters = self._stages.counters if self._stages is not None else ()
        if self._session.up:
            self._session.publish(topics.TELEMETRY, self._pulse.beat(now_s, pids, self._temperature[1], counters))

    def _applied(self, now_s: float) -> Applied:
        reports = self._stages.reports(now_s) if self._stages is not None else ()
        return Applied(
            device=self.config.name,
            boot=self.boot,
            epoch=self._records.epoch,
            stages=reports,
            refused_epoch=self._refused_order.epoch,
            refused_because=self._refused_order.because,
        )

    def _device_state(self) -> DeviceState:
        note = self._measuring.note if self._measuring is not None else ""
        said = lifecycle.SAID.get(self.state, "online")
        return DeviceState(state=said, boot=self.boot, since_unix=self._since_unix, reason=note)

    def _answer(self, outcome: Outcome) -> None:
        """Tell what a job came to, and who asked for it."""
        if outcome.error:
            self._tell("measuring-failed", "warning", outcome.error)
        for key, reason in list(outcome.failed.items())[:8]:
            self._tell("module-not-measured", "warning", f"{key}: {reason}")
        for asked in outcome.asked:
            if asked.command is not None:
                self._reply(asked.command, reply_to(asked, asked.command, self.config.name, outcome))

    def _reply(self, command: Command, reply: Reply) -> None:
        if self._session is not None:
            self._session.reply(command.reply_topic, reply)

    def sustain(self, seconds: float) -> str:
        """Put the board under load for so long. Gives why not, or ''."""
        return self._measuring.ask(Asked("sustain", None, (), seconds)) if self._measuring else "there is no kit yet"

    def _tell(self, code: str, level: str, text: str) -> None:
        """A notice for people: into the log, and to the site."""
        LOG.warning("%s", text)
        event = Event(who=self.config.name, code=code, level=level, text=text[:4096], at_unix=time.time())  # type: ignore[arg-type]
        if self._session is not None:
            self._session.event(event)

    # Helpers.

    def _make_data_broker(self) -> DataBroker | None:
        config = self.config
        wanted = Wanted(
            allowed=config.data_broker,
            interfaces=config.interfaces,
            port=config.data_port,
            address=config.data_address,
            key=config.site_key,
        )
        make = self._outside.data_broker
        return (
            None if make is None else make(config.state_dir / "data-broker", wanted, self._records, self._broker_told)
        )

    def _broker_told(self) -> None:
        self._broker_news = True
        self._wake()

    def _login(self, client: str) -> BrokerLogin:
        key = self.config.site_key
        username = SITE_USER if key else ""
        client_id = f"{self.config.name}-{self.boot}-{client}"
        return BrokerLogin(url=self._url, client_id=client_id, username=username, password=key)

    def _artifact_url(self, base: str, digest: str) -> str:
        host = urlsplit(self._url).hostname or "127.0.0.1"
        return artifact_url(base, digest, self.config.via.http, host)

    def _used_files(self) -> frozenset[str]:
        wanted = self._stages.wanted_files if self._stages is not None else {}
        measured = self._measuring.wanted_files if self._measuring is not None else {}
        return frozenset(wanted) | frozenset(measured)

    def _stages_empty(self) -> bool:
        return self._stages is None or self._stages.empty

    @property
    def has_kit(self) -> bool:
        """Whether the coordinator has said what to measure."""
        return self._measuring is not None and self._measuring.has_kit

    @property
    def measured(self) -> bool:
        """Whether all that the coordinator's kit names has been measured, or tried."""
        return self._measuring is not None and self._measuring.satisfied

    def _survey_now(self) -> Survey:
        return survey(self._outside.root, self.config.name, self.config.emulate_memory_bytes)

    @property
    def _session(self) -> Session | None:
        return self._control.session

    @property
    def _url(self) -> str:
        return self._control.url

    @property
    def _site(self) -> str:
        return self._control.site

    def _wake(self) -> None:
        self._control.wake()


_DO: Final[dict[Action, Callable[[Service], None]]] = {
    Action.DIAL: Service._dial,
    Action.CLAIM: Service._ask_who_is_there,
    Action.ANNOUNCE: Service._announce,
    Action.PUBLISH_STATE: Service._publish_state,
    Action.TELL_LINK_LOST: Service._tell_link_lost,
    Action.END_WORKERS: Service._end_workers,
    Action.LEAVE: Service._leave,
    Action.GIVE_WAY: Service._give_way,
}
