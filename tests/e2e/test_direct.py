"""Stages that reach each other through brokers on the boards: same tokens, and nothing of them on the site's broker."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.stages import WORKER_MODULES
from tests.agent.test_databroker import mosquittos
from tests.e2e.site import Site, processes_of, running_site
from wire import topics
from wire.broker import mosquitto_path
from wire.errors import EdgelamError
from wire.frames import Kind, parse
from wire.mqtt import MqttTransport
from wire.transport import Inbound

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed"),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three boards, the last of which has no broker of its own."""
    folder: Path = tmp_path_factory.mktemp("direct")
    with running_site(folder, 3, without_broker=frozenset({"board3"})) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


def plan_of(site: Site) -> dict[str, Any]:
    [deployment] = site.get("/v1/status")["deployments"]
    return dict(deployment["plan"])


def by_broker(site: Site) -> dict[str, str]:
    return {stage["device"]: stage["inbox"]["broker"] for stage in plan_of(site)["stages"]}


def workers(site: Site) -> set[int]:
    """Process ids of the workers that hold stages."""
    agents = [process for process in processes_of(site.folder) if "agent" in process.cmdline()]
    return {child.pid for agent in agents for child in agent.children() if WORKER_MODULES["tokens"] in child.cmdline()}


class Ear:
    """Hears the frames on the site's broker, by the stage that they are for."""

    def __init__(self, site: Site) -> None:
        self.kinds: dict[str, list[Kind]] = {}
        self._transport = MqttTransport(site.address["mqtt_url"], "ear", keepalive_s=10)
        self._transport.subscribe(topics.INBOX.on(site.address["site"], "+", "+"), self._hear)
        self._transport.start()
        self.listen(1.0)

    def _hear(self, message: Inbound) -> None:
        fields = topics.INBOX.fields_of(message.topic)
        assert fields is not None
        if fields[0].startswith("requester"):
            return
        self.kinds.setdefault(fields[1], []).append(parse(message.payload).kind)

    def listen(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self._transport.poll(0.05)

    def close(self) -> None:
        self._transport.close()


@pytest.mark.slow
def test_tokens_are_the_same_and_only_the_board_without_a_broker_is_reached_through_the_sites(
    mixed: Site, tiny_model: str
) -> None:
    central = mixed.run(tiny_model, 3, topology="central")
    assert set(by_broker(mixed).values()) == {""}
    direct = mixed.run(tiny_model, 3, topology="direct")
    assert direct["token_ids"] == central["token_ids"]
    plan = plan_of(mixed)
    assert plan["topology"] == "direct" and "board3 has no broker of its own" in plan["because"]
    brokers = by_broker(mixed)
    assert brokers["board3"] == "" and brokers["board1"] and brokers["board2"]
    assert brokers["board1"] != brokers["board2"]
    ear = Ear(mixed)
    again = mixed.run(tiny_model, 3, topology="direct")
    ear.listen(0.5)
    ear.close()
    assert again["token_ids"] == central["token_ids"]
    for stage in plan["stages"]:
        heard = ear.kinds.get(str(stage["stage"]), [])
        if stage["device"] == "board3":
            assert heard.count(Kind.HIDDEN if stage["stage"] else Kind.TOKENS) >= 8
        else:
            # A prompt for the first stage comes from the requester; all else goes through the board's own.
            assert heard.count(Kind.HIDDEN) == 0 and heard.count(Kind.TOKENS) <= 1, heard
    assert again["bytes_per_token"] == central["bytes_per_token"]


def test_the_same_placement_takes_another_topology_without_loading_again(mixed: Site, tiny_model: str) -> None:
    mixed.run(tiny_model, 3, topology="central")
    before = workers(mixed)
    mixed.run(tiny_model, 3, topology="direct")
    assert plan_of(mixed)["topology"] == "direct"
    assert len(before) == 3 and workers(mixed) == before


def test_what_crosses_boards_own_brokers_can_be_looked_at(mixed: Site, tiny_model: str) -> None:
    mixed.run(tiny_model, 3, topology="direct")
    enough = threading.Event()

    def keep_talking() -> None:
        while not enough.wait(0.3):
            mixed.run(tiny_model, 3, topology="direct")

    talker = threading.Thread(target=keep_talking)
    talker.start()
    done = mixed.cli("topics", "tail", "edgelam/v1/+/act/#", "--seconds", "6", "--json")
    enough.set()
    talker.join()
    assert done.returncode == 0, done.stderr
    heard = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = {(row["broker_of"], row["frame"]["kind"]) for row in heard if "frame" in row}
    own = {device for device, url in by_broker(mixed).items() if url}
    assert len(own) == 2 and {device for device, _ in kinds} == {None, *own}
    assert "HIDDEN" in {kind for device, kind in kinds if device in own}


def test_a_boards_broker_that_is_killed_comes_back_and_the_next_request_works(mixed: Site, tiny_model: str) -> None:
    first = mixed.run(tiny_model, 3, topology="direct")
    for process in mosquittos(mixed.folder / "testbed" / "boards" / "board2"):
        os.kill(process.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 30
    while True:
        try:
            assert mixed.run(tiny_model, 3, topology="direct")["token_ids"] == first["token_ids"]
            break
        except EdgelamError:
            assert time.monotonic() < deadline_s
            time.sleep(0.3)


def test_a_board_that_was_started_again_is_reached_where_it_was(mixed: Site, tiny_model: str) -> None:
    first = mixed.run(tiny_model, 3, topology="direct")
    brokers = by_broker(mixed)
    mixed.boards.kill("board2")
    mixed.await_states({"board1": "online", "board2": "offline", "board3": "online"})
    mixed.boards.start("board2")
    mixed.await_states(dict.fromkeys(("board1", "board2", "board3"), "online"))
    assert mixed.run(tiny_model, 3, topology="direct")["token_ids"] == first["token_ids"]
    assert by_broker(mixed) == brokers


def test_nothing_is_left_on_any_broker(mixed: Site, tiny_model: str) -> None:
    mixed.run(tiny_model, 3, topology="direct")
    for url in (mixed.address["mqtt_url"], *filter(None, by_broker(mixed).values())):
        kept: list[str] = []
        transport = MqttTransport(url, "looker", keepalive_s=10)

        def note(message: Inbound, kept: list[str] = kept) -> None:
            if message.retained and "/act/" in message.topic:
                kept.append(message.topic)

        transport.subscribe("edgelam/#", note, qos=1)
        transport.start()
        until_s = time.monotonic() + 1.5
        while time.monotonic() < until_s:
            transport.poll(0.05)
        transport.close()
        assert kept == []
