"""Brokers of our own: open only to ourselves, looked after, and gone when we are."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.wire.brokers import connect, make_broker, until
from wire import broker as broker_module
from wire.broker import Credential, EmbeddedBroker, MosquittoBroker, free_port, start_broker
from wire.child import Child
from wire.errors import Refused, Unreachable, UsageError
from wire.mqtt import MqttTransport
from wire.transport import Link

KINDS = ["mosquitto", "amqtt"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def group_of(broker):
    return broker._child._process.pid


def members(group):
    """Living processes of a process group."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def gone(group, within_s=8.0):
    until_s = time.monotonic() + within_s
    while members(group) and time.monotonic() < until_s:
        time.sleep(0.02)
    return not members(group)


def test_a_broker_starts_carries_messages_and_leaves_no_process(kind, tmp_path):
    broker = make_broker(kind, tmp_path / "new" / "directory")
    broker.start()
    assert kind in broker.name
    near = MqttTransport(broker.url, "near", keepalive_s=5)
    got = []
    near.subscribe("x", got.append)
    near.on_up(lambda: near.publish("x", b"1"))
    connect(near)
    until(lambda: got, near)
    near.close()
    group = group_of(broker)
    assert len(members(group)) >= 2
    broker.stop()
    broker.stop()
    assert not broker.running
    assert not members(group)


def test_only_who_knows_the_password_gets_in(kind, tmp_path):
    broker = make_broker(kind, tmp_path, credentials=[Credential("pi", "se:cret"), Credential("nuc", "other")])
    broker.start()
    good = MqttTransport(broker.url, "good", keepalive_s=5, username="pi", password="se:cret")
    wrong = MqttTransport(broker.url, "wrong", keepalive_s=5, username="pi", password="other")
    nobody = MqttTransport(broker.url, "nobody", keepalive_s=5)
    connect(good)
    for each in (wrong, nobody):
        each.start()
        until(lambda each=each: "refused us" in each.last_error, each)
        assert each.link is not Link.UP
    assert "cret" not in "".join(path.read_text() for path in tmp_path.iterdir())
    for each in (good, wrong, nobody):
        each.close()
    broker.stop()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "example.org"])
def test_a_broker_open_to_the_network_without_passwords_is_refused(host, tmp_path):
    for kind in (EmbeddedBroker, lambda *given: MosquittoBroker(*given, binary="mosquitto")):
        with pytest.raises(Refused, match="open to the whole network"):
            kind(tmp_path, host, 0)


@pytest.mark.parametrize("name", ["", "a:b", "a b", "a\nb", "x" * 65])
def test_names_that_would_break_the_password_file_are_refused(name, tmp_path):
    with pytest.raises(UsageError):
        EmbeddedBroker(tmp_path, "127.0.0.1", 0, [Credential(name, "secret")])


def test_a_broker_that_dies_is_started_again_and_says_so(kind, tmp_path):
    broker = make_broker(kind, tmp_path)
    broker.start()
    url = broker.url
    assert broker.poll() == ""
    os.killpg(group_of(broker), signal.SIGKILL)
    said = []
    until_s = time.monotonic() + 15
    while broker.restarts == 0 or not broker.running:
        assert time.monotonic() < until_s
        words = broker.poll()
        said += [words] if words else []
        time.sleep(0.02)
    assert "signal 9" in said[0]
    assert "started again (restart 1)" in said[1]
    assert broker.url == url
    near = MqttTransport(url, "near", keepalive_s=5)
    connect(near)
    near.close()
    broker.stop()


def test_a_taken_port_is_said_with_what_to_do(kind, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        broker = make_broker(kind, tmp_path)
        broker.port = port
        with pytest.raises(Unreachable, match=f"127.0.0.1:{port}") as caught:
            broker.start()
    assert "ss -ltnp" in caught.value.try_


class Squatters:
    """Take a broker's port between its look at it and its start, as another broker did that was started beside it."""

    def __init__(self, broker, times):
        self._command, self._times = broker._command, times
        self.servers = []
        self._broker = broker
        broker._command = self.command

    def command(self):
        if len(self.servers) < self._times:
            self.servers.append(socket.create_server(("127.0.0.1", self._broker.port)))
        return self._command()

    def leave(self):
        for server in self.servers:
            server.close()


def test_whoever_answers_at_our_port_is_not_taken_for_our_broker(kind, tmp_path):
    broker = make_broker(kind, tmp_path)
    broker.port = free_port("127.0.0.1", 0)
    squatters = Squatters(broker, 1)
    with pytest.raises(Unreachable, match=f"did not start on 127.0.0.1:{broker.port}"):
        broker.start()
    squatters.leave()
    broker.start()
    broker.stop()


def test_a_port_that_somebody_else_took_meanwhile_is_another_one(kind, tmp_path):
    broker = make_broker(kind, tmp_path)
    squatters = Squatters(broker, 2)
    broker.start()
    assert broker.port not in [server.getsockname()[1] for server in squatters.servers]
    near = MqttTransport(broker.url, "near", keepalive_s=5)
    connect(near)
    near.close()
    broker.stop()
    squatters.leave()


def test_where_ports_can_not_be_seen_a_broker_that_lives_on_has_its_own(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(Child, "listens", lambda self, port: None)
    broker = make_broker(kind, tmp_path)
    broker.start()
    assert broker.running
    broker.stop()
    squatters = Squatters(broker, 1)
    with pytest.raises(Unreachable):
        broker.start()
    squatters.leave()


def test_a_broker_ends_when_whoever_started_it_is_killed(kind, tmp_path):
    make_broker(kind, tmp_path)
    program = f"""
        import time
        from pathlib import Path
        from tests.wire.brokers import make_broker
        broker = make_broker({kind!r}, Path({str(tmp_path)!r}))
        broker.start()
        print(broker._child._process.pid, flush=True)
        time.sleep(60)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    group = int(parent.stdout.readline())
    assert len(members(group)) >= 2
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(group)


def test_the_configuration_of_mosquitto_says_what_we_rely_on(tmp_path):
    text = MosquittoBroker(tmp_path, "127.0.0.1", 1883, binary="mosquitto").configuration()
    assert "set_tcp_nodelay true" in text
    assert "listener 1883 127.0.0.1" in text
    assert "allow_anonymous true" in text
    assert "persistence false" in text
    closed = MosquittoBroker(tmp_path, "0.0.0.0", 1883, [Credential("a", "b")], binary="mosquitto").configuration()
    assert "allow_anonymous false" in closed


def test_persistent_state_survives_a_stop(tmp_path):
    broker = make_broker("mosquitto", tmp_path, persistence=True)
    for expected in ([], [b"kept"]):
        broker.start()
        near, got = MqttTransport(broker.url, "near", keepalive_s=5), []
        near.subscribe("state", got.append)
        connect(near)
        near.poll(0.3)
        assert [m.payload for m in got if m.retained] == expected
        near.publish("state", b"kept", qos=1, retain=True)
        near.close()
        broker.stop()
    assert list((tmp_path / "database").iterdir())


def test_mosquitto_works_for_an_ordinary_user(tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("every other test of this file runs as an ordinary user already")
    directory = Path("/tmp") / f"edgelam-test-{os.getpid()}"
    directory.mkdir(mode=0o700)
    os.chown(directory, 65534, 65534)
    try:
        broker = make_broker("mosquitto", directory, credentials=[Credential("a", "b")], persistence=True)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgid(65534)
                os.setuid(65534)
                broker.start()
                code = 0 if broker.running else 2
                broker.stop()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        subprocess.run(["rm", "-rf", str(directory)], check=True)


def test_root_starts_mosquitto_as_another_user_where_that_can_work():
    if os.geteuid() != 0:
        pytest.skip("needs root")
    directory = Path("/tmp") / f"edgelam-test-{os.getpid()}"
    directory.mkdir(mode=0o755)
    try:
        broker = make_broker("mosquitto", directory, credentials=[Credential("a", "b")], persistence=True)
        broker.start()
        [mosquitto] = [
            pid for pid in members(group_of(broker)) if Path(f"/proc/{pid}/comm").read_text().strip() == "mosquitto"
        ]
        assert Path(f"/proc/{mosquitto}").stat().st_uid != 0
        group = group_of(broker)
        broker.stop()
        assert not members(group)
    finally:
        subprocess.run(["rm", "-rf", str(directory)], check=True)


def test_the_choice_of_a_broker_carries_its_reason(tmp_path, monkeypatch):
    make_broker("amqtt", tmp_path)
    monkeypatch.setattr(broker_module, "_find", lambda program: None)
    broker = start_broker(tmp_path, "127.0.0.1", 0)
    assert isinstance(broker, EmbeddedBroker)
    assert "mosquitto is not installed" in broker.because
    assert "slower" in broker.because
    broker.stop()
    monkeypatch.setattr(broker_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unreachable) as caught:
        start_broker(tmp_path, "127.0.0.1", 0)
    assert "apt install mosquitto" in caught.value.try_


def test_mosquitto_is_found_where_path_does_not_look(tmp_path, monkeypatch):
    make_broker("mosquitto", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    broker = start_broker(tmp_path, "127.0.0.1", 0)
    assert broker.because.startswith("mosquitto found: /")
    broker.stop()


def test_clients_that_come_to_the_embedded_broker_at_one_moment_lose_nothing(tmp_path):
    """Its library went through its subscriptions while others subscribed, and dropped the message or the client."""
    pytest.importorskip("amqtt")
    broker = EmbeddedBroker(tmp_path, "127.0.0.1", 0)
    broker.start()
    came, lost = set(), []
    listener = MqttTransport(broker.url, "listener", keepalive_s=5, five=False)
    listener.subscribe("site/+/state", lambda message: came.add(message.topic), qos=1)
    boards = []
    try:
        connect(listener)
        for number in range(12):
            name = f"board{number}"
            board = MqttTransport(broker.url, name, keepalive_s=5, five=False)
            for topic in ("desired", "command", "kit", "state"):
                board.subscribe(f"site/{name}/{topic}", lambda _message: None, qos=1)
            board.on_up(lambda board=board, name=name: board.publish(f"site/{name}/state", b"x", qos=1, retain=True))
            board.on_down(lost.append)
            board.start()
            boards.append(board)
        until(lambda: len(came) == len(boards), listener, *boards)
        assert not lost
    finally:
        for each in (listener, *boards):
            each.close()
        broker.stop()
