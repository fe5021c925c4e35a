"""The coordinator's memory of the site: fleet, deployments in force, what is retained on the broker.

All methods run in the event loop's thread. Messages become fleet events (coordinator.fleet decides), and what the
coordinator has put in force is journaled first and then published; at each connect all of it is published again,
since a broker that was killed has lost what was retained.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec

from coordinator.artifacts import Artifacts
from coordinator.calls import Calls
from coordinator.changes import Changes
from coordinator.deployments import check_orders, desired_for, ended_stages
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
)
from coordinator.hub import Hub
from coordinator.journal import DeploymentRecord, Journal
from coordinator.notices import Notice, notice
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
        self.notices: deque[Event] = deque(maxlen=MAX_NOTICES)
        self.refused_messages = 0
        self.broker_up = False
        self.journal = Journal(state / "journal.sqlite")
        self.artifacts = Artifacts(state / "artifacts", self.journal)
        self.on_parcel: Callable[[Parcel], None] = lambda _parcel: None
        self.on_deployment_lost: Callable[[str, str], None] = lambda _name, _reason: None
        self._records: dict[str, DeploymentRecord] = {}
        self._kit: Kit | None = None
        self._applied_heard: set[str] = set()
        self._desired_epoch = 0
        self._ordered: set[str] = set()

    def open(self) -> None:
        """Read the journal and start the hub."""
        self.journal.open()
        self.artifacts.open()
        self._records = {record.name: record for record in self.journal.deployments()}
        self._prune_artifacts()
        self._ordered = {device for record in self._records.values() for device in record.orders}
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

    def devices(self) -> list[Device]:
        return sorted(self.fleet.devices.values(), key=lambda device: device.name)

    def online(self) -> list[str]:
        return [device.name for device in self.devices() if device.presence is Presence.ONLINE]

    def is_online(self, name: str) -> bool:
        device = self.fleet.devices.get(name)
        return device is not None and device.presence in (Presence.ONLINE, Presence.SUSPECT)

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

    def has_measured(self, name: str, keys: set[str]) -> bool:
        """Whether a device has tried all that it is asked to measure: these modules, and its link (absent: not yet)."""
        profile = self.profiles().get(name)
        if profile is None or isinstance(profile.link, Absent):
            return False
        return keys <= {measurement.key for measurement in profile.modules} | profile.failed.keys()

    # What arrives.

    def _forward_parcel(self, parcel: Parcel) -> None:
        self.on_parcel(parcel)

    def _on_link(self, up: bool, reason: str) -> None:
        self.broker_up = up
        now_s = time.monotonic()
        self._feed(LinkUp(now_s) if up else LinkDown(now_s))
        if up:
            self._publish_all()
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
                self._stages_lost(before.applied, self.fleet.devices[name].applied)

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
            self.notices.append(messages.decode(payload, Event, topic))
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
            if name in record.orders:
                self.on_deployment_lost(record.name, f"{name} went away, and with it a stage of {record.name}")

    def _stages_lost(self, before: Applied | None, now: Applied | None) -> None:
        """A stage whose worker ended has forgotten its requests: they need not wait for their time-out."""
        for report in ended_stages(before, now):
            record = self._records.get(report.deployment)
            if record is not None and record.plan.epoch == report.epoch:
                why = f": {report.detail}" if report.detail else ""
                self.on_deployment_lost(record.name, f"stage {report.stage} of {record.name} ended{why}")

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
        self.notices.append(
            Event(
                who="coordinator",
                code=said.code,
                level=said.level,
                text=said.text,
                try_=said.try_,
                at_unix=time.time(),
            )
        )

    # What is in force.

    def next_epoch(self) -> int:
        """A fresh epoch, above all that were ever given or applied."""
        reports = [device.applied for device in self.devices() if device.applied is not None]
        applied = [found.epoch for found in reports if found.epoch < EPOCH_JUMP_LIMIT]
        return self.journal.next_epoch(max([self._desired_epoch, *applied], default=0))

    def put_in_force(self, record: DeploymentRecord) -> None:
        """Journal a deployment and publish it; replaces one of the same name. Raises Refused, and changes nothing, if
        a device could not be told: the message would be too large."""
        others = [other for other in self._records.values() if other.name != record.name]
        check_orders(record, others, self.artifacts_url)
        self.journal.save_deployment(record)
        if record.name in self._records:
            self.on_deployment_lost(record.name, f"{record.name} was replaced by epoch {record.plan.epoch} of it")
        self._records[record.name] = record
        # Strays may have been corrected while the plan was made.
        later = record.plan.epoch > self._desired_epoch
        self._desired_epoch = record.plan.epoch if later else self.next_epoch()
        self._publish_orders()
        self.hub.publish(topics.PLAN, msgspec.json.encode(record.plan), record.name)
        self._prune_artifacts()
        self.changes.ring()

    def take_out_of_force(self, name: str) -> None:
        self.journal.remove_deployment(name)
        self._records.pop(name, None)
        self._desired_epoch = self.next_epoch()
        self._publish_orders()
        self.hub.publish(topics.PLAN, b"", name)
        self.on_deployment_lost(name, f"{name} was taken out of force")
        self.changes.ring()

    def _prune_artifacts(self) -> None:
        """Keep on disk what a deployment in force or the kit refers to."""
        modules = self._kit.modules if self._kit is not None else ()
        keep = {ref.digest for module in modules for _, ref in module.graphs}
        for record in self._records.values():
            for order in (order for orders in record.orders.values() for order in orders):
                keep |= {order.graph.digest, *(ref.digest for ref in order.weights)}
        self.artifacts.prune(keep, time.time())

    def offer_kit(self, kit: Kit) -> None:
        self._kit = kit
        self.hub.publish(topics.KIT, messages.encode(kit))

    def _publish_orders(self) -> None:
        """Desired state for every device that has, or had, stages."""
        self._ordered |= {device for record in self._records.values() for device in record.orders}
        for device in sorted(self._ordered):
            desired = desired_for(device, self._desired_epoch, self._records.values(), self.artifacts_url)
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
