"""Several connections are waited for as one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from tests.wire.brokers import make_broker
from wire.broker import Broker
from wire.mqtt import MqttTransport
from wire.several import Several
from wire.transport import Inbound, Link


@pytest.fixture(scope="module")
def brokers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Broker]]:
    found = [make_broker("mosquitto", tmp_path_factory.mktemp("broker") / str(number)) for number in range(2)]
    for broker in found:
        broker.start()
    yield found
    for broker in found:
        broker.stop()


class Pair:
    """A connection to each broker, waited for as one; `came` is what arrived, with the broker's number."""

    def __init__(self, brokers: list[Broker]) -> None:
        self.came: list[tuple[int, bytes]] = []
        self.members = [MqttTransport(broker.url, f"pair-{n}", keepalive_s=10) for n, broker in enumerate(brokers)]
        for number, member in enumerate(self.members):
            member.subscribe("x/in", self._noted(number))
            member.start()
        self.several = Several(self.members)

    def _noted(self, number: int):
        def note(message: Inbound) -> None:
            self.came.append((number, bytes(message.payload)))

        return note

    def poll_until(self, condition, within_s: float = 10.0) -> None:
        until_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < until_s, [(each.link, each.last_error) for each in self.members]
            self.several.poll(0.2)

    def close(self) -> None:
        for member in self.members:
            member.close()


@pytest.fixture
def pair(brokers: list[Broker]) -> Iterator[Pair]:
    pair = Pair(brokers)
    pair.poll_until(lambda: all(member.link is Link.UP for member in pair.members))
    yield pair
    pair.close()


def test_a_message_of_any_member_ends_the_wait(pair: Pair) -> None:
    for number in (1, 0, 1):
        pair.came.clear()
        began_s = time.monotonic()
        pair.members[number].publish("x/in", b"hello")
        pair.poll_until(lambda: pair.came, within_s=5.0)
        assert pair.came == [(number, b"hello")]
        assert time.monotonic() - began_s < 2.0, "it must not wait for the other's time-out"


def test_a_wake_up_from_another_thread_ends_the_wait(pair: Pair) -> None:
    timer = threading.Timer(0.2, pair.several.wake)
    timer.start()
    began_s = time.monotonic()
    assert pair.several.poll(20.0) == 0
    assert time.monotonic() - began_s < 10.0
    timer.join()


def test_without_news_it_returns_when_the_time_is_over(pair: Pair) -> None:
    pair.several.poll(0.1)  # what is left of connecting
    began_s = time.monotonic()
    assert pair.several.poll(0.3) == 0
    assert 0.29 <= time.monotonic() - began_s < 3.0


def test_a_member_that_lost_its_broker_comes_back_while_the_others_are_served(
    pair: Pair, brokers: list[Broker]
) -> None:
    brokers[1].stop()
    pair.poll_until(lambda: pair.members[1].link is not Link.UP)
    pair.members[0].publish("x/in", b"meanwhile")
    pair.poll_until(lambda: (0, b"meanwhile") in pair.came)
    brokers[1].start()
    pair.poll_until(lambda: pair.members[1].link is Link.UP)
    pair.members[1].publish("x/in", b"again")
    pair.poll_until(lambda: (1, b"again") in pair.came)
    assert pair.came == [(0, b"meanwhile"), (1, b"again")]


def test_a_large_answer_is_written_while_nothing_comes(pair: Pair) -> None:
    """What a socket did not take at once is written when it does, though no member has anything to read."""
    payload = bytes(900_000)
    for _ in range(4):
        pair.members[1].publish("x/in", payload)
    pair.poll_until(lambda: len(pair.came) == 4)
    assert {number for number, _ in pair.came} == {1}
