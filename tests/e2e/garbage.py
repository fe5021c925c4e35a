"""Garbage that is nearly right: messages of a running site, recorded, and then damaged until nobody may take them."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from coordinator.service import read_profile
from wire import frames, topics
from wire.errors import EdgelamError, PeerError
from wire.flow import Credit, encode_credit, parse_credit
from wire.messages import (
    Applied,
    Command,
    Desired,
    DeviceInfo,
    DeviceState,
    Event,
    Kit,
    Reply,
    Telemetry,
    decode,
    encode,
)
from wire.mqtt import MqttTransport
from wire.transport import Inbound, Link, OutboundQueueFull

MOST_SAMPLES: Final = 6
"""Of one topic: more are alike."""

STRANGE: Final = (None, -1, 1e308, "x" * 5000, [], {"a": {}}, True, 2**63, "\u0000", [[]] * 50)

TYPES: Final = {
    topics.STATE: DeviceState,
    topics.INFO: DeviceInfo,
    topics.TELEMETRY: Telemetry,
    topics.DESIRED: Desired,
    topics.APPLIED: Applied,
    topics.COMMAND: Command,
    topics.REPLY: Reply,
    topics.KIT: Kit,
    topics.EVENT: Event,
}

READ_BY_COORDINATOR: Final = (
    topics.STATE, topics.INFO, topics.PROFILE, topics.TELEMETRY, topics.APPLIED, topics.EVENT, topics.REPLY,
)  # fmt: skip


def is_refused(row: topics.Topic, payload: bytes) -> bool:
    """Whether what reads this topic has to refuse the payload. An empty one only clears what was retained."""
    try:
        if row is topics.INBOX:
            frames.parse(payload)
        elif row is topics.CREDIT:
            parse_credit(payload)
        elif row is topics.PROFILE:
            read_profile(payload, "here")
        elif row is not topics.PLAN:  # which is for people: nobody here reads it
            decode(payload, TYPES[row], "here")
    except PeerError:
        return bool(payload)
    return row is topics.PLAN and bool(payload)


def damaged(row: topics.Topic, payload: bytes, source: random.Random) -> bytes:
    """A valid payload with something wrong in it, so that it must be refused."""
    for _ in range(20):
        ways = [_flipped, _cut] if row.message.endswith("frame") else [_flipped, _cut, _strange, _strange]
        payload_now = source.choice(ways)(payload, source)
        if is_refused(row, payload_now):
            return payload_now
    return payload[: len(payload) // 2] + b"\xff"


def _flipped(payload: bytes, source: random.Random) -> bytes:
    changed = bytearray(payload)
    for _ in range(source.randrange(1, 4)):
        changed[source.randrange(min(len(changed), 64) if source.random() < 0.5 else len(changed))] ^= (
            1 << source.randrange(8)
        )
    return bytes(changed)


def _cut(payload: bytes, source: random.Random) -> bytes:
    return payload[: source.randrange(1, len(payload))] + source.randbytes(source.randrange(2))


def _strange(payload: bytes, source: random.Random) -> bytes:
    """One value anywhere in a JSON document becomes another one, or goes."""
    document = json.loads(payload)
    at: Any = document
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return json.dumps(source.choice(STRANGE)).encode()
        key = source.choice(keys)
        if not isinstance(at[key], dict | list) or source.random() < 0.3:
            break
        at = at[key]
    if source.random() < 0.3:
        del at[key]
    else:
        at[key] = source.choice(STRANGE)
    return json.dumps(document).encode()


class Vandal:
    """A client of a site's broker that listens to everything, and then speaks out of turn."""

    def __init__(self, url: str, site: str) -> None:
        self.site = site
        self.samples: dict[str, list[bytes]] = defaultdict(list)
        """By topic, the newest last."""
        self.retained: dict[str, bytes] = {}
        """What the site has on its retained topics, by topic."""
        self.arrived: dict[topics.Topic, int] = defaultdict(int)
        """Messages of ours that the broker passed on, at either quality."""
        self.ours: set[bytes] = set()
        self._to_return: dict[str, bytes] = {}
        """What we put back and the broker has not passed on yet, by topic."""
        self._transport = MqttTransport(url, "vandal", keepalive_s=30)
        self._transport.subscribe(topics.everything(site), self._hear, qos=1)
        self._transport.start()
        self.poll_until(lambda: self._transport.link is Link.UP, 10.0)

    def poll_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not condition() and time.monotonic() < deadline_s:
            self._transport.poll(0.05)
        return condition()

    def _hear(self, message: Inbound) -> None:
        payload = bytes(message.payload)
        found = topics.match(message.topic)
        if found is None or not payload:
            return
        if payload in self.ours:
            self.arrived[found[0]] += 1
            return
        if found[0].retained:
            self.retained[message.topic] = payload
            if self._to_return.get(message.topic) == payload:
                del self._to_return[message.topic]
        if is_refused(found[0], payload) and found[0] is not topics.PLAN:
            return  # of somebody who died before it had put everything back
        kept = self.samples[message.topic]
        kept.append(payload)
        del kept[:-MOST_SAMPLES]

    def add_what_was_not_said(self, device: str) -> None:
        """Commands, replies, events and credit for a short answer are rare: make valid ones."""
        command = Command(id="1", reply_topic=topics.REPLY.on(self.site, "coordinator", "measure"))
        reply = Reply(id="1", device=device, ok=True)
        event = Event(who=device, code="module-not-measured", level="info", text="hello", at_unix=1.0)
        self.samples[topics.COMMAND.on(self.site, device, "measure")].append(encode(command))
        self.samples[topics.REPLY.on(self.site, "coordinator", "measure")].append(encode(reply))
        self.samples[topics.EVENT.on(self.site, device)].append(encode(event))
        for topic in list(self.samples):
            if topics.INBOX.fields_of(topic) is not None:
                self.samples[topics.credit_of(topic)].append(encode_credit(Credit(stream=7, limit=1 << 20)))

    def smash(self, count: int, source: random.Random) -> dict[topics.Topic, int]:
        """Publish `count` damaged messages over all rows of the table; give how many of each."""
        by_row: dict[topics.Topic, list[str]] = defaultdict(list)
        for topic in sorted(self.samples):
            found = topics.match(topic)
            assert found is not None
            by_row[found[0]].append(topic)
        sent: dict[topics.Topic, int] = defaultdict(int)
        for number in range(count):
            row = topics.TABLE[number % len(topics.TABLE)]
            topic = source.choice(by_row[row])
            payload = damaged(row, source.choice(self.samples[topic]), source)
            self.ours.add(payload)
            self._publish(topic, payload, qos=number // len(topics.TABLE) % 2, retain=row.retained and number % 3 == 0)
            sent[row] += 1
            if number % 25 == 0:
                self._transport.poll(0.0)
        return sent

    def _publish(self, topic: str, payload: bytes, qos: int, retain: bool) -> None:
        while True:
            try:
                self._transport.publish(topic, payload, qos=qos, retain=retain)
                return
            except OutboundQueueFull:
                self._transport.poll(0.05)

    def clean_up(self) -> None:
        """Put back what was retained, clear the rest, and wait until the broker has it.

        A broker in Python may be seconds behind with ten thousand messages. Closed before, the connection takes with
        it what was not sent.
        """
        for topic in list(self.samples):
            found = topics.match(topic)
            if found is not None and found[0].retained:
                payload = self.retained.get(topic, b"")
                if payload:
                    self._to_return[topic] = payload
                self._publish(topic, payload, qos=1, retain=True)
        assert self.poll_until(lambda: not self._to_return, 30.0), sorted(self._to_return)
        self.poll_until(lambda: False, 0.5)

    def close(self) -> None:
        try:
            self.clean_up()
        except EdgelamError as error:
            print("not cleaned up:", error)
        self._transport.close()
