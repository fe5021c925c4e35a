"""Ears on the site's broker and on the boards' own: real brokers, which come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.taps import Taps
from wire.broker import Broker, mosquitto_path, start_mosquitto
from wire.ids import new_boot_id
from wire.mqtt import MqttTransport
from wire.transport import Inbound, Link

pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")


@pytest.fixture
def brokers(tmp_path: Path) -> Iterator[list[Broker]]:
    started = [start_mosquitto(tmp_path / str(number), "127.0.0.1", 0) for number in range(3)]
    yield started
    for broker in started:
        broker.stop()


class Heard:
    def __init__(self, brokers: list[Broker], topic_filter: str = "x/#") -> None:
        self.came: list[tuple[str, bytes]] = []
        self.taps = Taps(brokers[0].url, topic_filter, connection, self._hear)

    def _hear(self, message: Inbound, device: str) -> None:
        self.came.append((device, bytes(message.payload)))

    def until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 10.0
        while not condition():
            assert time.monotonic() < deadline_s, self.came
            self.taps.poll(0.05)


def connection(url: str) -> MqttTransport:
    return MqttTransport(url, f"tap-{new_boot_id()}", keepalive_s=5)


def say(broker: Broker, payload: bytes) -> None:
    speaker = connection(broker.url)
    speaker.start()
    deadline_s = time.monotonic() + 10.0
    while speaker.link is not Link.UP:
        assert time.monotonic() < deadline_s
        speaker.poll(0.05)
    for topic in ("x/a", "y/a"):
        speaker.publish(topic, payload)
    speaker.poll(0.05)
    speaker.close()


def test_what_crosses_each_broker_is_heard_once_with_its_board(brokers: list[Broker]) -> None:
    heard = Heard(brokers)
    heard.taps.follow({"a": brokers[1].url, "b": brokers[2].url})
    heard.until(lambda: all(tap.link is Link.UP for tap in taps_of(heard)))
    time.sleep(0.2)
    for number, broker in enumerate(brokers):
        say(broker, b"%d" % number)
    heard.until(lambda: len(heard.came) >= 3)
    heard.taps.poll(0.2)
    assert sorted(heard.came) == [("", b"0"), ("a", b"1"), ("b", b"2")]
    heard.taps.close()


def test_boards_that_go_and_come_elsewhere_are_followed(brokers: list[Broker]) -> None:
    heard = Heard(brokers)
    heard.taps.follow({"a": brokers[1].url})
    heard.until(lambda: all(tap.link is Link.UP for tap in taps_of(heard)))
    heard.taps.follow({"a": brokers[2].url})
    heard.until(lambda: all(tap.link is Link.UP for tap in taps_of(heard)))
    time.sleep(0.2)
    say(brokers[1], b"gone")
    say(brokers[2], b"here")
    heard.until(lambda: bool(heard.came))
    heard.taps.follow({})
    assert heard.came == [("a", b"here")] and taps_of(heard) == [heard.taps.site]
    heard.taps.close()


def test_a_board_whose_broker_does_not_answer_is_named_and_the_others_are_heard(brokers: list[Broker]) -> None:
    heard = Heard(brokers)
    brokers[2].stop()
    heard.taps.follow({"a": brokers[1].url, "b": brokers[2].url})
    heard.until(lambda: "b" in heard.taps.unreached())
    assert set(heard.taps.unreached()) == {"b"}
    heard.until(lambda: all(tap.link is Link.UP for tap in taps_of(heard)[:2]))
    time.sleep(0.2)
    say(brokers[1], b"there")
    heard.until(lambda: ("a", b"there") in heard.came)
    heard.taps.close()


def taps_of(heard: Heard) -> list[MqttTransport]:
    return [heard.taps.site, *(transport for _, transport in heard.taps._of.values())]
