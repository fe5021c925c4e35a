"""The MQTT connection: brokers that die, stay away, hang or speak nonsense; and Nagle."""

from __future__ import annotations

import os
import random
import signal
import socket
import statistics
import threading
import time

import pytest

from tests.wire.brokers import connect, make_broker, until
from wire.client import Address, parse_url
from wire.errors import UsageError
from wire.limits import RECONNECT_DELAY_S
from wire.mqtt import MqttTransport
from wire.transport import Link, NotConnected


@pytest.fixture
def mosquitto(tmp_path):
    broker = make_broker("mosquitto", tmp_path)
    broker.start()
    yield broker
    broker.stop()


def transport(broker, name="near", **options):
    return MqttTransport(broker.url, name, keepalive_s=5, **options)


def kill(broker):
    """kill -9 the broker itself, as the kernel's out-of-memory killer would."""
    keeper = broker._child._process.pid
    children = [int(line.split()[0]) for line in os.popen(f"ps -o pid=,comm= --ppid {keeper}") if "mosquitto" in line]
    assert children
    for child in children:
        os.kill(child, signal.SIGKILL)


def no_delay(each):
    return each.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_killed_broker_is_found_again_within_three_seconds_with_everything_renewed(mosquitto):
    near, far = transport(mosquitto), transport(mosquitto, "far")
    ups, downs, got = [], [], []
    near.on_down(downs.append)
    near.on_up(lambda: ups.append(near.publish("state", b"here", qos=1, retain=True)))
    far.subscribe("x", got.append)
    connect(near, far)
    assert no_delay(near) == 1
    kill(mosquitto)
    until(lambda: downs, near, far)
    assert near.link is not Link.UP
    with pytest.raises(NotConnected):
        near.publish("x", b"lost")
    near.publish("x", b"kept", qos=1)
    while not mosquitto.running or mosquitto.restarts == 0:
        mosquitto.poll()
        time.sleep(0.01)
    began_s = time.monotonic()
    until(lambda: near.link is far.link is Link.UP, near, far)
    assert time.monotonic() - began_s < 3
    assert no_delay(near) == 1
    assert len(ups) == 2
    near.publish("x", b"after")
    until(lambda: [m for m in got if m.payload == b"after"], near, far)
    late, state = transport(mosquitto, "late"), []
    late.subscribe("state", state.append)
    connect(late)
    until(lambda: state, late)
    assert state[0].payload == b"here"
    assert near.protocol == "MQTT 5"
    for each in (near, far, late):
        each.close()


def test_qos_1_messages_that_were_not_acknowledged_are_sent_to_the_next_broker(mosquitto):
    near = transport(mosquitto)
    connect(near)
    kill(mosquitto)
    for number in range(50):
        near.publish(f"state/{number}", b"1", qos=1, retain=True)
    while mosquitto.restarts == 0:
        mosquitto.poll()
        time.sleep(0.01)
    until(lambda: near.link is Link.UP, near)
    far, got = transport(mosquitto, "far"), []
    far.subscribe("state/+", got.append)
    connect(far)
    until(lambda: len(got) >= 50, near, far)
    assert {m.topic for m in got} == {f"state/{number}" for number in range(50)}
    near.close()
    far.close()


def test_an_absent_broker_is_named_and_poll_keeps_its_time():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    near = MqttTransport(f"mqtt://127.0.0.1:{port}", "near", keepalive_s=5)
    near.start()
    began_s = time.monotonic()
    for _ in range(5):
        near.poll(0.1)
    assert 0.4 < time.monotonic() - began_s < 2
    assert near.last_error == f"no broker at 127.0.0.1:{port} (connection refused)"
    assert near.link is not Link.UP
    near.close()


def test_a_host_without_a_name_is_named_and_poll_is_not_held_up():
    near = MqttTransport("mqtt://no-such-host.invalid:1", "near", keepalive_s=5)
    near.start()
    began_s = time.monotonic()
    near.poll(0)
    assert time.monotonic() - began_s < 0.5
    until(lambda: near.last_error, near, within_s=40)
    assert near.last_error.startswith("no broker at no-such-host.invalid:1 (")
    near.close()


class Nonsense:
    """A server that is no broker: answers each connection by `talk(connection)`."""

    def __init__(self, talk):
        self.connections = 0
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                try:
                    self._talk(connection)
                except OSError:
                    continue

    def close(self):
        self._listener.close()


def protocol_level(connection):
    return connection.recv(4096)[8]


def test_a_broker_that_closes_on_mqtt_5_is_spoken_to_in_3_1_1_at_once():
    levels = []

    def talk(connection):
        levels.append(protocol_level(connection))
        if levels[-1] == 4:
            connection.sendall(b"\x20\x02\x00\x00")
            connection.recv(4096)

    server = Nonsense(talk)
    near = MqttTransport(server.url, "near", keepalive_s=5)
    began_s = time.monotonic()
    connect(near)
    assert time.monotonic() - began_s < RECONNECT_DELAY_S
    assert levels == [5, 4]
    assert near.protocol == "MQTT 3.1.1"
    near.close()
    server.close()


def test_a_broker_that_refuses_us_is_quoted():
    server = Nonsense(lambda connection: (protocol_level(connection), connection.sendall(b"\x20\x03\x00\x87\x00")))
    near = MqttTransport(server.url, "near", keepalive_s=5)
    near.start()
    until(lambda: near.last_error, near)
    assert "it refused us: not authorized" in near.last_error
    near.close()
    server.close()


def test_a_server_that_never_answers_is_given_up():
    server = Nonsense(lambda connection: time.sleep(4))
    near = MqttTransport(server.url, "near", keepalive_s=5)
    near.start()
    until(lambda: near.last_error, near)
    assert "no answer" in near.last_error
    near.close()
    server.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_speaks_nonsense_harms_nobody(seed):
    rng = random.Random(seed)

    def talk(connection):
        connection.recv(4096)
        if rng.random() < 0.7:
            connection.sendall(b"\x20\x03\x00\x00\x00")
        for _ in range(20):
            connection.sendall(
                rng.choice((b"\x30", b"\x40", b"\x90", b"\xe0", b"")) + rng.randbytes(rng.randrange(1, 40))
            )

    server = Nonsense(talk)
    near = MqttTransport(server.url, "near", keepalive_s=5)
    near.subscribe("#", lambda message: None)
    near.start()
    until_s = time.monotonic() + 1.2
    while time.monotonic() < until_s:
        near.poll(0.05)
    assert server.connections >= 1
    near.close()
    server.close()


def test_a_round_trip_at_qos_1_does_not_wait_for_nagle(mosquitto):
    near, far = transport(mosquitto), transport(mosquitto, "far")
    got = []
    near.subscribe("back", got.append, qos=1)
    far.subscribe("to", lambda m: far.publish("back", m.payload, qos=1), qos=1)
    connect(near, far)
    for each in (near, far):
        each.poll(0.1)
    times = []
    for _ in range(30):
        got.clear()
        began_s = time.monotonic()
        near.publish("to", bytes(1024), qos=1)
        while not got:
            far.poll(0.001)
            near.poll(0.001)
        times.append(time.monotonic() - began_s)
    assert statistics.median(times) < 0.03, "44 ms would be Nagle's algorithm on one end, 88 ms on both"
    near.close()
    far.close()


def test_a_subscriber_to_everything_gets_the_retained_state_of_a_full_site(mosquitto):
    near = transport(mosquitto)
    connect(near)
    for number in range(1280):
        while len(near._unacknowledged) > 900:
            near.poll(0.01)
        near.publish(f"dev/{number}/state", bytes(300), qos=1, retain=True)
    until(lambda: not len(near._unacknowledged), near)
    far, got = transport(mosquitto, "far"), []
    far.subscribe("dev/#", got.append, qos=1)
    connect(far)
    until(lambda: len(got) == 1280, far)
    near.close()
    far.close()


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mqtt://10.0.0.5:1884", Address("10.0.0.5", 1884)),
        ("mqtt://pi", Address("pi", 1883)),
        ("mqtt://[::1]:5", Address("::1", 5)),
    ],
)
def test_addresses_are_read(url, address):
    assert parse_url(url) == address


@pytest.mark.parametrize(
    "url", ["", "10.0.0.5:1883", "http://x:1", "mqtt://x:70000", "mqtt://", "mqtt://u:p@x", "mqtt://x/y"]
)
def test_what_is_no_address_is_said_to_the_user(url):
    with pytest.raises(UsageError) as caught:
        parse_url(url)
    assert "mqtt://HOST:PORT" in caught.value.try_
