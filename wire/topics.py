"""ONE table of topics: what crosses the brokers, which way, at which quality, and who may write it.

Conventions: lower case, version in level 2, one level = one thing, at most 7 levels, retained = "what is", not
retained = "what happens", JSON for people, binary frames under `act/`. docs/topics.md and `edgelam topics` are
generated from this table.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from wire.version import PROTOCOL

ROOT: Final = f"edgelam/v{PROTOCOL}"


class Writer(Enum):
    DEVICE = "the device named in the topic"
    COORDINATOR = "the coordinator"
    STAGE = "upstream stages and requesters"
    RECEIVER = "the receiving stage"


class Tells(Enum):
    """What a topic may tell of a board's own data, and whether a private job's noise covers it."""

    NOTHING = "nothing: names, counts and times only"
    UPDATES = (
        "updates of a private job, gradients of one that splits its model: covered by its noise; updates of a secure"
        " one: masked; activations, states, tokens, other updates and gradients: not covered"
    )


class Topic(NamedTuple):
    """A row: `template` has `{site}` and further fields; `message` names the type in wire.messages or 'frame'."""

    name: str
    template: str
    message: str
    qos: int
    retained: bool
    writer: Writer
    what: str
    tells: Tells = Tells.NOTHING

    def on(self, site: str, *fields: str) -> str:
        """Fill the template in order: `STATE.on("lab", "pi5")`; "+" is a legal field for subscriptions."""
        parts = iter((site, *fields))
        filled = [next(parts) if level.startswith("{") else level for level in self.template.split("/")]
        rest = list(parts)
        if rest:
            raise ValueError(f"{self.name}: too many fields {rest}")
        return "/".join(filled)

    def fields_of(self, topic: str) -> tuple[str, ...] | None:
        """The inverse of `on`, without the site: `STATE.fields_of(".../dev/pi5/state") == ("pi5",)`; None: no match."""
        levels, pattern = topic.split("/"), self.template.split("/")
        if len(levels) != len(pattern):
            return None
        found = []
        for level, expected in zip(levels, pattern, strict=True):
            if expected.startswith("{"):
                found.append(level)
            elif level != expected:
                return None
        return tuple(found[1:])


STATE: Final = Topic(
    "state", f"{ROOT}/{{site}}/dev/{{device}}/state", "DeviceState", 1, True, Writer.DEVICE,
    "online, busy, draining or offline, with the boot id; also the last will",
)  # fmt: skip
INFO: Final = Topic(
    "info", f"{ROOT}/{{site}}/dev/{{device}}/info", "DeviceInfo", 1, True, Writer.DEVICE,
    "board, processor, memory, engines, versions",
)  # fmt: skip
PROFILE: Final = Topic(
    "profile", f"{ROOT}/{{site}}/dev/{{device}}/profile", "hwprofiles.profile.Profile", 1, True, Writer.DEVICE,
    "what the device measured itself to be",
)  # fmt: skip
TELEMETRY: Final = Topic(
    "telemetry", f"{ROOT}/{{site}}/dev/{{device}}/tele", "Telemetry", 0, False, Writer.DEVICE,
    "heartbeat at 1 Hz: boot id, load, memory, counters of each stage",
)  # fmt: skip
DESIRED: Final = Topic(
    "desired", f"{ROOT}/{{site}}/dev/{{device}}/desired", "Desired", 1, True, Writer.COORDINATOR,
    "the stages that the device should run",
)  # fmt: skip
APPLIED: Final = Topic(
    "applied", f"{ROOT}/{{site}}/dev/{{device}}/applied", "Applied", 1, True, Writer.DEVICE,
    "the stages that the device does run, each with its phase, and the order that it could not take",
)  # fmt: skip
COMMAND: Final = Topic(
    "command", f"{ROOT}/{{site}}/dev/{{device}}/cmd/{{verb}}", "Command", 1, False, Writer.COORDINATOR,
    "ask the device to do something once: measure, sustain, probe-link, probe-ways, probe-pair",
)  # fmt: skip
REPLY: Final = Topic(
    "reply", f"{ROOT}/{{site}}/rsp/{{requester}}/{{verb}}", "Reply", 1, False, Writer.DEVICE,
    "the answer to a command",
)  # fmt: skip
KIT: Final = Topic(
    "kit", f"{ROOT}/{{site}}/kit", "Kit", 1, True, Writer.COORDINATOR,
    "the modules that every device should measure itself on",
)  # fmt: skip
PLAN: Final = Topic(
    "plan", f"{ROOT}/{{site}}/plan/{{deployment}}", "coordinator.planning.plan.Plan", 1, True, Writer.COORDINATOR,
    "the partition in force: stage, device, blocks, predicted figures, reasons, epoch",
)  # fmt: skip
EVENT: Final = Topic(
    "event", f"{ROOT}/{{site}}/event/{{who}}", "Event", 0, False, Writer.DEVICE,
    "what happened, for people",
)  # fmt: skip
INBOX: Final = Topic(
    "inbox", f"{ROOT}/{{site}}/act/{{deployment}}/{{stage}}/in", "frame", 0, False, Writer.STAGE,
    "tensors for a stage (or tokens for a requester)", Tells.UPDATES,
)  # fmt: skip
CREDIT: Final = Topic(
    "credit", f"{ROOT}/{{site}}/act/{{deployment}}/{{stage}}/credit", "credit frame", 0, False, Writer.RECEIVER,
    "how far each sender may go (cumulative byte counts)",
)  # fmt: skip

TABLE: Final[tuple[Topic, ...]] = (
    STATE, INFO, PROFILE, TELEMETRY, DESIRED, APPLIED, COMMAND, REPLY, KIT, PLAN, EVENT, INBOX, CREDIT,
)  # fmt: skip


def credit_of(inbox_topic: str) -> str:
    """The credit topic that belongs to an inbox topic."""
    head, _, leaf = inbox_topic.rpartition("/")
    if leaf != "in":
        raise ValueError(f"not an inbox topic: {inbox_topic}")
    return f"{head}/credit"


def everything(site: str) -> str:
    return f"{ROOT}/{site}/#"


def match(topic: str) -> tuple[Topic, tuple[str, ...]] | None:
    """Which row of the table a topic belongs to, and its fields without the site."""
    for row in TABLE:
        fields = row.fields_of(topic)
        if fields is not None:
            return row, fields
    return None
