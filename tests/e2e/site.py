"""A whole site of real processes for tests: coordinator, broker, agents, workers; and a tiny model to run on it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from coordinator.client import Client
from coordinator.config import Ports, write_ports
from coordinator.inference.requests import GenerateRequest
from models.cache import cache_dir
from models.catalog import find, is_cached
from testbed import commands
from testbed.boards import BoardSpec
from testbed.links import LinkSpec
from testbed.site import CoordinatorProcess
from tests.models.tiny import random_tensors, tiny_config, write_gguf
from wire.broker import free_port


def edgelam(state: Path, *arguments: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    """The command line as a process of its own, with what `state` remembers."""
    return subprocess.run(
        [sys.executable, "-m", "coordinator.cli", *arguments],
        env={**os.environ, "EDGELAM_STATE": str(state), "COLUMNS": "200"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


class Site:
    """A running site. `run` gives the last event of a request; `cli` runs the command line against it."""

    def __init__(self, folder: Path, coordinator: CoordinatorProcess, address: dict[str, Any]) -> None:
        self.folder = folder
        self.coordinator = coordinator
        self.address = address
        self.testbed: commands.Testbed | None = None

    @property
    def boards(self) -> commands.Testbed:
        assert self.testbed is not None
        return self.testbed

    def client(self) -> Client:
        return Client(self.address["http_url"])

    def get(self, path: str) -> Any:
        with self.client() as there:
            return there.get(path)

    def run(self, model: str, boards: int, **changes: Any) -> dict[str, Any]:
        """One request over exactly so many boards; nothing is guessed unless `changes` say so."""
        fields: dict[str, Any] = {
            "prompt": "hello world",
            "raw": True,
            "max_tokens": 8,
            "context_tokens": 128,
            "ignore_stop": True,
            "boards_at_least": boards,
            "boards_at_most": boards,
            "stall_timeout_s": 20.0,
            "speculate": "off",
        }
        with self.client() as there:
            request = GenerateRequest(model=model, **{**fields, **changes})
            return there.last("/v1/generate", request, lambda _text: None)

    def cli(self, *arguments: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
        return edgelam(self.folder, *arguments, timeout_s=timeout_s)

    def states(self) -> dict[str, str]:
        return {row["device"]: row["state"] for row in self.get("/v1/devices")["devices"]}

    def await_states(self, expected: dict[str, str], timeout_s: float = 60.0) -> None:
        """Wait until the coordinator sees the devices so; fail with what it sees."""
        deadline_s = time.monotonic() + timeout_s
        while (seen := self.states()) != expected:
            assert time.monotonic() < deadline_s, f"expected {expected}, seen {seen}\n{self.log_ends()}"
            time.sleep(0.1)

    def log_ends(self) -> str:
        """What coordinator and boards said last, and whose process is there."""
        told = [f"coordinator at {self.address}", self.coordinator.log_end(15)]
        if self.testbed is not None:
            told += [f"{board.name}: process {board.pid} {board.state}" for board in self.testbed.status().boards]
        for log in sorted((self.folder / "testbed").glob("logs/*")):
            told += [str(log), *log.read_text(errors="replace").splitlines()[-20:]]
        return "\n".join(told)

    def restart_coordinator(self) -> None:
        self.address = self.coordinator.start()

    def await_broker_gone(self, timeout_s: float = 30.0) -> None:
        """Wait until nothing listens where the broker of a killed coordinator did. It ends a moment later; who starts
        again before that takes other ports, and links that are shaped lead to the old ones."""
        host, port = self.address["mqtt_url"].removeprefix("mqtt://").split(":")
        deadline_s = time.monotonic() + timeout_s
        while True:
            with socket.socket() as probe:
                if probe.connect_ex((host, int(port))) != 0:
                    return
            assert time.monotonic() < deadline_s, f"{host}:{port} is still there"
            time.sleep(0.05)


def prefer_own_ports(folder: Path) -> None:
    """Have a coordinator begin with ports that it finds again after it was killed: the usual ones are taken by
    whichever of the other tests' coordinators starts meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    write_ports(folder, Ports(free_port("127.0.0.1", 0), free_port("127.0.0.1", 0)))


def board_names(count: int) -> list[str]:
    return [f"board{number}" for number in range(1, count + 1)]


@contextmanager
def running_site(
    folder: Path,
    boards: int,
    arguments: tuple[str, ...] = (),
    memory_bytes: int = 1 << 30,
    without_broker: frozenset[str] = frozenset(),
    link: LinkSpec | None = None,
) -> Iterator[Site]:
    """A coordinator and equal boards, without shaped links unless one is given, all found over mDNS on loopback. Boards
    in `without_broker` have none of their own."""
    name = f"t{os.getpid()}-{os.urandom(3).hex()}"
    prefer_own_ports(folder)
    coordinator = CoordinatorProcess(folder, name, arguments)
    address = coordinator.start()
    site = Site(folder, coordinator, address)
    try:
        specs = tuple(
            BoardSpec(name=board, memory_bytes=memory_bytes, data_broker=board not in without_broker, link=link)
            for board in board_names(boards)
        )
        site.testbed = commands.up(commands.UpOptions(site=name, boards=specs, state_dir=folder / "testbed"))
        site.testbed.await_connected(print)
        site.await_states(dict.fromkeys(board_names(boards), "online"))
        yield site
    except BaseException:
        print(coordinator.log_end(60))
        for log in sorted((folder / "testbed").glob("logs/*")):
            print(log, "\n".join(log.read_text(errors="replace").splitlines()[-25:]), sep="\n")
        raise
    finally:
        if site.testbed is not None:
            site.testbed.down()
        coordinator.stop()


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    config = tiny_config("llama")
    return write_gguf(folder / f"tiny{seed}.gguf", config, random_tensors(config, seed), "F32")


def processes_of(folder: Path) -> list[psutil.Process]:
    """Processes whose command line or environment names `folder`."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if str(folder) in words and process.pid != os.getpid():
            found.append(process)
    return found


@contextmanager
def catalog_site(model: str, boards: int) -> Iterator[Site]:
    """The same for a model of the catalog; skips where it was not fetched. Its folder has room for real weights, and is
    gone afterwards."""
    entry = find(model)
    assert entry is not None
    if not is_cached(entry, cache_dir()):
        pytest.skip(f"{entry.name} is not in the cache: edgelam model fetch {model}")
    with tempfile.TemporaryDirectory(prefix="edgelam-test-") as folder, running_site(Path(folder), boards) as running:
        yield running
