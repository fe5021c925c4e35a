"""A board's own broker: where it listens, what others are told, and that it comes back."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from agent.databroker import DataBroker, Wanted, address_of, listen_on
from agent.records import Records
from tests.agent.test_processes import needs_mosquitto
from tests.wire.brokers import until
from wire import broker as broker_module
from wire.ids import SITE_USER
from wire.mqtt import MqttTransport
from wire.transport import REFUSED_US, Link


@pytest.mark.parametrize(
    ("wanted", "reached_from", "listens", "refused"),
    [
        (Wanted(), "127.0.0.1", "127.0.0.1", ""),
        (Wanted(), "10.0.0.5", "", "without a site key"),
        (Wanted(key="k"), "10.0.0.5", "0.0.0.0", ""),
        (Wanted(key="k"), "127.0.0.1", "0.0.0.0", ""),
        (Wanted(key="k", interfaces=("127.0.0.1",)), "127.0.0.1", "127.0.0.1", ""),
        (Wanted(key="k", interfaces=("10.0.0.5",)), "10.0.0.5", "10.0.0.5", ""),
        (Wanted(key="k", interfaces=("10.0.0.5", "10.1.0.5")), "10.0.0.5", "0.0.0.0", ""),
        (Wanted(allowed=False), "127.0.0.1", "", "switched off"),
    ],
)
def test_it_is_open_to_the_network_with_a_key_only(wanted, reached_from, listens, refused) -> None:
    host, because = listen_on(wanted, reached_from)
    assert host == listens
    assert refused in because and bool(because) == bool(refused)


def test_others_are_told_the_address_by_which_we_are_seen() -> None:
    assert address_of(Wanted(), "127.0.0.1", 7, "127.0.0.1") == "mqtt://127.0.0.1:7"
    assert address_of(Wanted(key="k"), "0.0.0.0", 7, "10.0.0.5") == "mqtt://10.0.0.5:7"
    assert address_of(Wanted(key="k"), "fd00::5", 7, "fd00::5") == "mqtt://[fd00::5]:7"
    assert address_of(Wanted(address="tunnel:9"), "127.0.0.1", 7, "127.0.0.1") == "mqtt://tunnel:9"


class Board:
    """A data broker with the state folder of an agent."""

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        self.records = Records(folder)
        self.news = threading.Event()
        self.broker = DataBroker(folder / "data-broker", wanted, self.records, self.news.set)

    def await_(self, condition, within_s: float = 20.0) -> None:
        until_s = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < until_s, self.broker.because
            time.sleep(0.02)

    def start(self) -> int:
        """Start it; give its port."""
        self.broker.reached("127.0.0.1")
        self.await_(lambda: self.broker.at is not None)
        assert self.broker.at is not None
        return int(urlsplit(self.broker.at.address).port or 0)

    def close(self) -> None:
        self.broker.close()
        self.records.close()


@pytest.fixture
def board(tmp_path: Path) -> Iterator[Board]:
    made = Board(tmp_path, Wanted())
    yield made
    made.close()


def mosquittos(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and words[0].endswith("mosquitto") and any(str(folder) in word for word in words):
            found.append(process)
    return found


@needs_mosquitto
def test_it_starts_says_where_and_keeps_its_port_over_a_restart_of_the_agent(tmp_path: Path) -> None:
    ports = []
    for _ in range(2):
        board = Board(tmp_path, Wanted())
        ports.append(board.start())
        assert board.news.is_set() and board.broker.because.startswith("mosquitto")
        assert not board.broker.starting
        board.close()
        assert not mosquittos(tmp_path), "nothing is left behind"
    assert ports[0] == ports[1] > 0


@needs_mosquitto
def test_who_waits_for_its_start_knows_where_it_is(board: Board) -> None:
    board.broker.await_started(60.0)  # nothing was asked for yet, so nothing is waited for
    assert board.broker.at is None
    board.broker.reached("127.0.0.1")
    board.broker.await_started(20.0)
    assert board.broker.at is not None and board.news.is_set()


@needs_mosquitto
def test_a_killed_broker_is_started_again_where_it_was(board: Board, tmp_path: Path) -> None:
    port = board.start()
    client = MqttTransport(f"mqtt://127.0.0.1:{port}", "one", keepalive_s=5)
    client.start()
    until(lambda: client.link is Link.UP, client)
    [process] = mosquittos(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: client.link is not Link.UP, client)
    until(lambda: client.link is Link.UP, client, within_s=20.0)
    assert [again.pid for again in mosquittos(tmp_path)] != [process.pid]
    client.close()


@needs_mosquitto
def test_a_port_that_is_taken_is_another_one_next_time(board: Board, tmp_path: Path) -> None:
    port = board.start()
    board.broker.close()
    board.records.close()
    squatter = broker_module.start_mosquitto(tmp_path / "squatter", "127.0.0.1", port)
    try:
        again = Board(tmp_path, Wanted())
        assert again.start() not in (0, port)
        again.close()
    finally:
        squatter.stop()


@needs_mosquitto
def test_with_a_site_key_nobody_else_gets_in(tmp_path: Path) -> None:
    board = Board(tmp_path, Wanted(key="secret", interfaces=("127.0.0.1",)))
    port = board.start()
    url = f"mqtt://127.0.0.1:{port}"
    friend = MqttTransport(url, "friend", keepalive_s=5, username=SITE_USER, password="secret")
    stranger = MqttTransport(url, "stranger", keepalive_s=5)
    friend.start()
    stranger.start()
    until(lambda: friend.link is Link.UP and REFUSED_US in stranger.last_error, friend, stranger)
    assert stranger.link is not Link.UP
    friend.close()
    stranger.close()
    board.close()


def test_a_board_without_mosquitto_says_so(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.databroker.mosquitto_path", lambda: None)
    board.broker.reached("127.0.0.1")
    assert board.broker.at is None and "mosquitto is not installed" in board.broker.because
    assert board.news.is_set() and not board.broker.starting


@needs_mosquitto
def test_a_broker_that_can_not_be_started_is_not_waited_for(tmp_path: Path) -> None:
    squatter = broker_module.start_mosquitto(tmp_path / "squatter", "127.0.0.1", 0)
    board = Board(tmp_path, Wanted(port=squatter.port))
    board.broker.reached("127.0.0.1")
    board.await_(board.news.is_set)
    assert board.broker.at is None and not board.broker.starting and str(squatter.port) in board.broker.because
    board.close()
    squatter.stop()


@needs_mosquitto
def test_another_address_of_ours_is_told_without_a_restart(tmp_path: Path) -> None:
    board = Board(tmp_path, Wanted(key="secret"))
    board.broker.reached("10.9.8.7")
    board.await_(lambda: board.broker.at is not None)
    board.news.clear()
    board.broker.reached("10.9.8.8")
    assert board.news.is_set()
    assert board.broker.at is not None and urlsplit(board.broker.at.address).hostname == "10.9.8.8"
    assert len(mosquittos(tmp_path)) == 1
    board.close()
