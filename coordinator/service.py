"""The coordinator's memory of the site: fleet, deployments in force, what is retained on the broker.

All methods run in the event loop's thread. Messages become fleet events (coordinator.fleet decides), and what the
coordinator has put in force is journaled first and then published; at each connect all of it is published again,
since a broker that was killed has lost what was retained.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from coordinator.artifacts import Artifacts
from coordinator.borne import Borne
from coordinator.calls import Calls
from coordinator.changes import Changes
from coordinator.deployments import (
    Ordering,
    check_orders,
    check_told,
    desired_for,
    ended_stages,
    fallbacks,
    works_on,
)
from coordinator.distrust import Trust, Verdict, with_doubt
from coordinator.fallen import Failure, Fallen
from coordinator.fleet import (
    AppliedArrived,
    Device,
    Fleet,
    FleetEvent,
    InfoArrived,
    LinkDown,
    LinkUp,
    MdnsGone,
    MdnsSeen,
    Presence,
    ProfileArrived,
    StateArrived,
    TelemetryArrived,
    Tick,
    Unanswered,
)
from coordinator.hub import Hub
from coordinator.journal import DeploymentRecord, Journal
from coordinator.notices import Notice, notice
from coordinator.planning.plan import Plan
from coordinator.planning.slowed import Slowed
from coordinator.rounds.store import running_jobs, topic_name
from coordinator.slowlinks import SlowLinks
from coordinator.slowness import Slowness
from hwprofiles.profile import Profile
from hwprofiles.reading import Absent
from wire import messages, topics
from wire.discovery import Found
from wire.errors import PeerError
from wire.frames import Parcel
from wire.ids import is_name
from wire.limits import MAX_CONTROL_BYTES
from wire.messages import Applied, DeviceInfo, DeviceState, Event, Kit, Reply, Telemetry

MAX_NOTICES = 200
EPOCH_JUMP_LIMIT = 1 << 40
"""An applied epoch beyond this is garbage or malice, and must not push ours out of range."""


class Coordinator:
    """One site. `changes` rings whenever anything here has changed."""

    def __init__(
        self, *, site: str, boot: str, state: Path, artifacts_url: str, mqtt_url: str, broker_text: str, hub: Hub
    ) -> None:
        self.site = site
        self.boot = boot
        self.artifacts_url = artifacts_url
        self.mqtt_url = mqtt_url
        self.broker_text = broker_text
        self.hub = hub
        self.started_s = time.monotonic()
        self.changes = Changes()
        self.calls = Calls(site, self.changes, hub.publish)
        self.fleet = Fleet()
        self.slowness = Slowness()
        """Which boards don't keep what their profiles promise."""
        self.borne = Borne()
        """How far work bears out what boards measured; shown beside it."""
        self.trust = Trust({})
        """Which profiles are not believed."""
        self.fallen = Fallen()
        """Engines that boards could not load stages on."""
        self.slow_links = SlowLinks()
        """The same of their links."""
        self.notices: deque[Event] = deque(maxlen=MAX_NOTICES)
        self.noted: Counter[str] = Counter()
        """Level -> notices so far, also those that are kept no more."""
        self.refused_messages = 0
        self.broker_up = False
        self.up_since_s = 0.0
        """When the connection to the broker was made last."""
        self.journal = Journal(state / "journal.sqlite")
        self.artifacts = Artifacts(state / "artifacts", self.journal)
        self.on_parcel: Callable[[Parcel], None] = lambda _parcel: None
        self.on_deployment_lost: Callable[[str, str], None] = lambda _name, _reason: None
        """What was under way on it is gone; it, or another one, will do the same again."""
        self.on_deployment_removed: Callable[[str, str], None] = lambda _name, _reason: None
        self.on_broker_up: Callable[[], None] = lambda: None
        """What was sent before may not have come through."""
        self._records: dict[str, DeploymentRecord] = {}
        self._jobs: dict[str, Ordering] = {}
        """What devices are told of jobs; coordinator.rounds keeps it."""
        self._given_up: set[tuple[str, int]] = set()
        """Deployments, by name and epoch, on which a stage did not answer: to be replaced, even if it comes back."""
        self._kit: Kit | None = None
        self._applied_heard: set[str] = set()
        self._desired_epoch = 0
        self._ordered: set[str] = set()

    def open(self) -> None:
        """Read the journal and start the hub."""
        self.journal.open()
        self.artifacts.open()
        self._records = {record.name: record for record in self.journal.deployments()}
        self._jobs = {topic_name(job.name): job for job in running_jobs(self.journal)}
        self.trust = Trust(self.journal.distrusts())
        self._prune_artifacts()
        self._ordered = {device for record in self._ordering() for device in record.orders}
        # What was taken out of force shortly before a crash may not have been published: a fresh epoch makes devices
        # look again. Stages keep the epoch of their plan, so nothing is loaded anew.
        self._desired_epoch = self.journal.next_epoch()
        self.hub.on_message = self._on_message
        self.hub.on_parcel = self._forward_parcel
        self.hub.on_link = self._on_link
        self.hub.start()

    def close(self) -> None:
        self.journal.close()

    # What is known.

    def records(self) -> list[DeploymentRecord]:
        return list(self._records.values())

    def in_force(self, record: DeploymentRecord) -> bool:
        """Whether it is still this plan, of this epoch."""
        now = self._records.get(record.name)
        return now is not None and now.plan.epoch == record.plan.epoch

    def given_up(self, record: DeploymentRecord) -> bool:
        return (record.name, record.plan.epoch) in self._given_up

    def devices(self) -> list[Device]:
        return sorted(self.fleet.devices.values(), key=lambda device: device.name)

    def online(self) -> list[str]:
        return [device.name for device in self.devices() if device.presence is Presence.ONLINE]

    def is_online(self, name: str) -> bool:
        device = self.fleet.devices.get(name)
        return device is not None and device.presence in (Presence.ONLINE, Presence.SUSPECT)

    def is_measuring(self, name: str) -> bool:
        """Whether a device measures itself, and so does two things at once."""
        device = self.fleet.devices.get(name)
        return device is not None and device.state is not None and device.state.state == "busy"

    def progress_of(self, name: str) -> str:
        """'pi5', or 'pi5 (block, 1 of 3)' where it measures and says how far it is."""
        device = self.fleet.devices.get(name)
        if device is None or device.state is None or device.state.state != "busy" or not device.state.reason:
            return name
        return f"{name} ({device.state.reason})"

    def data_brokers(self) -> dict[str, str]:
        """Device -> URL of its own broker, '' where it has none."""
        return {device.name: device.info.data_broker for device in self.devices() if device.info is not None}

    def profiles(self) -> dict[str, Profile]:
        return {device.name: device.profile for device in self.devices() if device.profile is not None}

    def applied(self) -> dict[str, Applied]:
        """What each device says that it runs, as far as it said so since our connection stands: what was true before
        a broker died may not be true after it. It may refuse what we never ordered: that is none of our business."""
        return {
            device.name: device.applied
            if device.applied.refused_epoch <= self._desired_epoch
            else msgspec.structs.replace(device.applied, refused_epoch=0, refused_because="")
            for device in self.devices()
            if device.applied is not None and device.name in self._applied_heard
        }

    def telemetry(self) -> dict[str, Telemetry]:
        return {device.name: device.telemetry for device in self.devices() if device.telemetry is not None}

    def slowed(self, name: str) -> Slowed | None:
        """How a planner shall reckon with a device; None if its profile is right."""
        return with_doubt(self.slowness.of(name), self.trust.of(name))

    def speed(self, name: str) -> float:
        """As a share of what its profile says."""
        slow = self.slowed(name)
        return 1 / slow.times if slow is not None else 1.0

    def keep_doubts(self, verdict: Verdict) -> None:
        """A profile is not believed from now on, or is again: on disk first."""
        if verdict.kind == "doubted":
            self.journal.save_distrust(verdict.distrust)
        else:
            self.journal.forget_distrust(verdict.device)

    def has_measured(self, name: str, keys: set[str]) -> bool:
        """Whether a device has tried all that it is asked to measure: these modules, and its link (absent: not yet)."""
        profile = self.profiles().get(name)
        if profile is None or isinstance(profile.link, Absent) or profile.pending:
            return False
        return keys <= {measurement.key for measurement in profile.modules} | profile.failed.keys()

    # What arrives.

    def _forward_parcel(self, parcel: Parcel) -> None:
        self.on_parcel(parcel)

    def _on_link(self, up: bool, reason: str) -> None:
        self.broker_up = up
        now_s = time.monotonic()
        self.up_since_s = now_s if up else self.up_since_s
        self._feed(LinkUp(now_s) if up else LinkDown(now_s))
        if up:
            self._publish_all()
            self.on_broker_up()
        else:
            self.note(notice("broker-lost", url=self.mqtt_url, reason=reason))
            for name in list(self._records):
                self.on_deployment_lost(
                    name, f"the broker at {self.mqtt_url} went away, and with it what was under way"
                )
        self.changes.ring()

    def _on_message(self, topic: str, payload: bytes) -> None:
        """Parse one message and tell the fleet; what can't be read is counted and noted once per topic."""
        found = topics.match(topic)
        if found is None or not payload:
            return
        row, (name, *_) = found
        if not is_name(name):
            self._refuse(
                PeerError(f"a message under {name[:40]!r}, which is no name of a device"), "no name of a device"
            )
            return
        try:
            event = self._fleet_event(row, name, topic, payload)
        except PeerError as error:
            self._refuse(error, topic)
            return
        if event is not None:
            before = self.fleet.devices.get(name)
            self._feed(event)
            if isinstance(event, AppliedArrived) and before is not None:
                self._stages_lost(name, before.applied, self.fleet.devices[name].applied)
                self._fell_back(name, before.applied, self.fleet.devices[name].applied)

    def _fleet_event(self, row: topics.Topic, name: str, topic: str, payload: bytes) -> FleetEvent | None:
        now_s = time.monotonic()
        if row is topics.STATE:
            return StateArrived(name, messages.decode(payload, DeviceState, topic), now_s)
        if row is topics.INFO:
            return InfoArrived(name, messages.decode(payload, DeviceInfo, topic), now_s)
        if row is topics.PROFILE:
            return ProfileArrived(name, read_profile(payload, topic), now_s)
        if row is topics.APPLIED:
            return AppliedArrived(name, messages.decode(payload, Applied, topic), now_s)
        if row is topics.TELEMETRY:
            return TelemetryArrived(name, messages.decode(payload, Telemetry, topic), now_s)
        if row is topics.REPLY:
            self.calls.heard(messages.decode(payload, Reply, topic))
        if row is topics.EVENT:
            self._keep(messages.decode(payload, Event, topic))
            self.changes.ring()
        return None

    def _refuse(self, error: PeerError, about: str) -> None:
        self.refused_messages += 1
        if not any(event.code == "bad-message" and about in event.text for event in self.notices):
            self.note(notice("bad-message", reason=error.message))

    def _feed(self, event: FleetEvent) -> None:
        if isinstance(event, LinkUp | LinkDown):
            self._applied_heard.clear()
        elif isinstance(event, AppliedArrived):
            self._applied_heard.add(event.device)
        before = self._there()
        self.fleet, notices = self.fleet.after(event)
        for said in notices:
            self.note(said)
        for name in before - self._there():
            self._device_lost(name)
        self.changes.ring()

    def _there(self) -> set[str]:
        """Devices that run their stages as far as we know: a suspect one may be back in a second."""
        return {name for name in self.fleet.devices if self.is_online(name)}

    def _device_lost(self, name: str) -> None:
        for record in list(self._records.values()):
            if any(stage.device == name for stage in record.plan.stages):
                self.on_deployment_lost(record.name, f"{name} went away, and with it a stage of {record.name}")

    def unanswered(self, plan: Plan, devices: Sequence[str]) -> None:
        """Stages of a plan on these devices do not answer: what runs on it is lost, and the devices are left out until
        they are heard of again."""
        record = self._records.get(plan.deployment)
        if record is None or record.plan.epoch != plan.epoch:
            return
        self._given_up.add((record.name, record.plan.epoch))
        self.on_deployment_lost(record.name, f"{' and '.join(devices)} did not answer")
        for device in devices:
            self._feed(Unanswered(device, time.monotonic()))

    def heard_since(self, then_s: float) -> bool:
        """Whether a heartbeat of any device came after that."""
        return any(device.beat_s is not None and device.beat_s > then_s for device in self.devices())

    def _stages_lost(self, name: str, before: Applied | None, now: Applied | None) -> None:
        """A stage whose worker ended has forgotten its requests: they need not wait for their time-out. A copy that
        waits has none."""
        for report in ended_stages(before, now):
            record = self._records.get(report.deployment)
            if record is not None and record.plan.epoch == report.epoch and works_on(record.plan, report.stage, name):
                why = f": {report.detail}" if report.detail else ""
                self.on_deployment_lost(record.name, f"stage {report.stage} of {record.name} ended{why}")

    def without_engines(self, device: str, deployment: str) -> Mapping[str, str]:
        """Engine -> why a device does without it for a deployment."""
        found = self.fleet.devices.get(device)
        return self.fallen.of(device, deployment, found.boot) if found is not None else {}

    def _fell_back(self, name: str, before: Applied | None, now: Applied | None) -> None:
        """Say it where a stage runs on another engine than the plan reckons with, and remember it."""
        if now is None:
            return
        for report in fallbacks(before, now):
            what = f"stage {report.stage} of {report.deployment}"
            record = self._records.get(report.deployment)
            for order in record.orders.get(name, ()) if record is not None else ():
                if (order.stage, order.epoch) == (report.stage, report.epoch):
                    self.fallen.saw(Failure(name, report.deployment, order.engine), now.boot, report.fell_back)
            self.note(
                notice("engine-fell-back", device=name, what=what, engine=report.engine, because=report.fell_back)
            )

    def mdns_seen(self, found: Found) -> None:
        if found.role == "agent":
            self._feed(MdnsSeen(found.name, found.boot, ", ".join(found.addresses), time.monotonic()))

    def mdns_gone(self, found: Found) -> None:
        if found.role == "agent":
            self._feed(MdnsGone(found.name, time.monotonic()))

    def tick(self) -> None:
        """Call once a second."""
        self._feed(Tick(time.monotonic()))
        self._correct_strays()

    def _correct_strays(self) -> None:
        """Tell devices that run what nobody here ordered, or act on a later epoch than ours: our journal was lost, or
        they were away when a deployment was taken out of force."""
        strays = [
            name
            for name, applied in self.applied().items()
            if self.is_online(name)
            and applied.epoch < EPOCH_JUMP_LIMIT
            and (applied.epoch > self._desired_epoch or (applied.stages and name not in self._ordered))
        ]
        if strays and self.broker_up:
            self._ordered.update(strays)
            self._desired_epoch = self.next_epoch()
            self._publish_orders()

    def note(self, said: Notice) -> None:
        """Keep a notice for people."""
        self._keep(
            Event(
                who="coordinator",
                code=said.code,
                level=said.level,
                text=said.text,
                try_=said.try_,
                at_unix=time.time(),
            )
        )

    def _keep(self, event: Event) -> None:
        self.notices.append(event)
        self.noted[event.level] += 1

    # What is in force.

    def next_epoch(self) -> int:
        """A fresh epoch, above all that were ever given or applied."""
        reports = [device.applied for device in self.devices() if device.applied is not None]
        applied = [found.epoch for found in reports if found.epoch < EPOCH_JUMP_LIMIT]
        return self.journal.next_epoch(max([self._desired_epoch, *applied], default=0))

    def put_in_force(self, record: DeploymentRecord, because: str = "") -> None:
        """Journal a deployment and publish it; replaces one of the same name, `because` of something. Raises Refused,
        and changes nothing, if a device could not be told: the message would be too large."""
        check_orders(record, self._others(record.name), self.artifacts_url)
        self.journal.save_deployment(record)
        if record.name in self._records:
            replaced = f"{record.name} was replaced by epoch {record.plan.epoch} of it"
            self.on_deployment_lost(record.name, f"{because}: {replaced}" if because else replaced)
        self._records[record.name] = record
        self._given_up = {known for known in self._given_up if known[0] != record.name}
        # Strays may have been corrected while the plan was made.
        later = record.plan.epoch > self._desired_epoch
        self._desired_epoch = record.plan.epoch if later else self.next_epoch()
        self._publish_orders()
        self.hub.publish(topics.PLAN, msgspec.json.encode(record.plan), record.name)
        self._prune_artifacts()
        self.changes.ring()

    def amend(self, record: DeploymentRecord) -> None:
        """Journal and publish a deployment that differs from the one in force in copies that wait: its ring, its epoch
        and what runs on it stay. Raises Refused, and changes nothing, if a device could not be told."""
        check_orders(record, self._others(record.name), self.artifacts_url)
        self.journal.save_deployment(record)
        self._records[record.name] = record
        self._desired_epoch = self.next_epoch()
        self._publish_orders()
        self.hub.publish(topics.PLAN, msgspec.json.encode(record.plan), record.name)
        self.changes.ring()

    def order_job(self, name: str, job: Ordering) -> None:
        """Tell devices what to train, under this name of a deployment; the caller has journaled it. Raises Refused,
        and changes nothing, if a device could not be told."""
        epoch = self.next_epoch()
        check_told(job, self._others(name), self.artifacts_url, epoch)
        self._jobs[name] = job
        self._desired_epoch = epoch
        self._publish_orders()
        self.changes.ring()

    def end_job(self, name: str) -> None:
        """Devices need not train for it any more."""
        if self._jobs.pop(name, None) is not None:
            self._desired_epoch = self.next_epoch()
            self._publish_orders()
            self.changes.ring()

    def _ordering(self) -> list[Ordering]:
        return [*self._records.values(), *self._jobs.values()]

    def _others(self, name: str) -> list[Ordering]:
        """All but the deployment or job of this name."""
        records = [record for record in self._records.values() if record.name != name]
        return [*records, *(job for known, job in self._jobs.items() if known != name)]

    def take_out_of_force(self, name: str) -> None:
        self.journal.remove_deployment(name)
        self._records.pop(name, None)
        self._given_up = {known for known in self._given_up if known[0] != name}
        self._desired_epoch = self.next_epoch()
        self._publish_orders()
        self.hub.publish(topics.PLAN, b"", name)
        self.on_deployment_removed(name, f"{name} was taken out of force")
        self.changes.ring()

    def _prune_artifacts(self) -> None:
        """Keep on disk what a deployment in force or the kit refers to."""
        modules = self._kit.modules if self._kit is not None else ()
        keep = {ref.digest for module in modules for _, ref in (*module.graphs, *module.standard)}
        for record in self._ordering():
            for order in (order for orders in record.orders.values() for order in orders):
                tokenizer = order.training.tokenizer if order.training is not None else None
                refs = (order.graph, order.standard_graph, tokenizer, *order.weights)
                keep |= {ref.digest for ref in refs if ref is not None}
        self.artifacts.prune(keep, time.time())

    def offer_kit(self, kit: Kit) -> None:
        self._kit = kit
        self.hub.publish(topics.KIT, messages.encode(kit))

    def _publish_orders(self) -> None:
        """Desired state for every device that has, or had, stages."""
        ordering = self._ordering()
        self._ordered |= {device for record in ordering for device in record.orders}
        for device in sorted(self._ordered):
            desired = desired_for(device, self._desired_epoch, ordering, self.artifacts_url)
            self.hub.publish(topics.DESIRED, messages.encode(desired), device)

    def _publish_all(self) -> None:
        self._publish_orders()
        for record in self._records.values():
            self.hub.publish(topics.PLAN, msgspec.json.encode(record.plan), record.name)
        # Also an empty one: it tells boards that this broker is ours, and replaces the kit of a coordinator before us,
        # whose files may be gone.
        kit = self._kit if self._kit is not None else Kit(artifacts_url=self.artifacts_url, modules=())
        self.hub.publish(topics.KIT, messages.encode(kit))


def read_profile(payload: bytes, where: str) -> Profile:
    """A profile from the network; raise PeerError."""
    if len(payload) > MAX_CONTROL_BYTES:
        raise PeerError(f"{where}: {len(payload)} bytes, at most {MAX_CONTROL_BYTES} are taken")
    try:
        return msgspec.json.decode(payload, type=Profile)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise PeerError(f"{where}: not a profile: {error}") from None
