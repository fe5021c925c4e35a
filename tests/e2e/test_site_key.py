"""A site on a real network: one key lets boards in, and who has another or none is told so and does no harm."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from testbed import namespaces
from testbed.namespaces import Lan
from tests.e2e.site import write_tiny_model
from wire.errors import ExitCode

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(bool(namespaces.why_not()), reason=namespaces.why_not() or "available"),
]

HOSTS = ("coordinator", "good", "wrong", "keyless")
PATIENCE_S = 60.0


class Network:
    """One coordinator as `edgelam up --listen 0.0.0.0`, and hosts for agents; each with a home of its own."""

    def __init__(self, lan: Lan, folder: Path) -> None:
        self.lan = lan
        self.folder = folder
        self.key_file = folder / "coordinator" / "site.key"
        for host in HOSTS:
            (folder / host).mkdir()

    def environment(self, host: str) -> Mapping[str, str]:
        home = self.folder / host
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGELAM_")}
        own = {"HOME": str(home), "EDGELAM_STATE": str(home), "EDGELAM_CACHE": str(home / "cache")}
        return {**kept, **own, "EDGELAM_MEASURE_BUDGET": "0.02"}

    def start(self, host: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / host / "log").open("ab") as log:
            return self.lan.start(host, [sys.executable, "-m", *arguments], log, self.environment(host))

    def agent(self, host: str, *arguments: str) -> subprocess.Popen[bytes]:
        return self.start(host, "agent", "run", "--site", "lab", "--name", host, *arguments)

    def cli(self, host: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`edgelam` on a host."""
        return subprocess.run(
            ["ip", "netns", "exec", self.lan.namespace(host), sys.executable, "-m", "coordinator.cli", *arguments],
            env=self.environment(host), capture_output=True, text=True, timeout=PATIENCE_S,
        )  # fmt: skip

    def log(self, host: str) -> str:
        return (self.folder / host / "log").read_text()

    def states(self) -> dict[str, Any]:
        done = self.cli("coordinator", "devices", "--json")
        assert done.returncode == 0, done.stderr
        return {row["device"]: row["state"] for row in json.loads(done.stdout)["devices"]}

    def dialled(self, host: str) -> int:
        """Connections that a host has tried to make."""
        head, row = [
            line.split() for line in self.lan.run(host, ["cat", "/proc/net/snmp"]).stdout.splitlines()
            if line.startswith("Tcp:")
        ]  # fmt: skip
        return int(row[head.index("ActiveOpens")])

    def until(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s, "\n".join([what, *(self.log(host) for host in HOSTS)])
            time.sleep(0.1)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Lan(dict.fromkeys(HOSTS)) as lan:
        # As on a cable without a router: which address boards reach is then nothing that a route could say.
        subprocess.run(["ip", "-n", lan.namespace("coordinator"), "route", "del", "default"], check=True)
        network = Network(lan, tmp_path)
        for host in HOSTS:
            (tmp_path / host / "log").touch()
        network.start("coordinator", "coordinator.cli", "up", "--listen", "0.0.0.0", "--site", "lab")
        network.until((tmp_path / "coordinator" / "coordinator.json").exists, "no coordinator")
        yield network


def test_the_key_lets_a_board_in_and_others_are_told_and_kept_out(network: Network, tmp_path: Path) -> None:
    assert stat.S_IMODE(network.key_file.stat().st_mode) == 0o600
    key = network.key_file.read_text().strip()
    assert len(key) >= 32
    said = network.log("coordinator")
    assert "edgelam-agent run --site lab --site-key-file FILE" in said
    assert str(network.key_file) in said
    assert key not in said, "the key stands in a log"
    wrong_key = tmp_path / "wrong.key"
    wrong_key.write_text("not-the-key-of-this-site\n")
    network.agent("good", "--site-key-file", str(network.key_file))
    refused = network.agent("wrong", "--site-key-file", str(wrong_key))
    network.agent("keyless", "--broker", f"mqtt://{network.lan.address('coordinator')}:8570")
    _assert_serves(network, tmp_path)
    _assert_refused(network)
    refused.terminate()
    assert refused.wait(10) == 0
    wrong_key.write_text(key + "\n")
    network.agent("wrong", "--site-key-file", str(wrong_key))
    network.until(lambda: network.states().get("wrong") == "online", "the right key in the file did not help")


def _assert_serves(network: Network, folder: Path) -> None:
    """The board with the key runs a request; people ask from the coordinator's host, or from another with the key."""
    network.until(lambda: network.states().get("good") == "online", "the board with the key did not come")
    model = str(write_tiny_model(folder))
    asked = ("run", model, "--prompt", "hello", "--raw", "--max-tokens", "4", "--context", "128", "--ignore-stop")
    done = network.cli("coordinator", *asked, "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["token_ids"]) == 4
    assert network.cli("coordinator", "devices", "--coordinator", "http://127.0.0.1:8571").returncode == 0
    door = ("devices", "--coordinator", f"http://{network.lan.address('coordinator')}:8571")
    assert network.cli("good", *door, "--site-key-file", str(network.key_file)).returncode == 0
    stranger = network.cli("keyless", *door)
    assert stranger.returncode == int(ExitCode.REFUSED)
    assert "wrong or missing site key" in stranger.stderr and "--site-key-file" in stranger.stderr


def _assert_refused(network: Network) -> None:
    """Told on the board and at the coordinator, never a member, and patient."""
    network.until(lambda: "does not let us in (wrong site key)" in network.log("wrong"), "not told: wrong key")
    network.until(lambda: "does not let us in (no site key was given)" in network.log("keyless"), "not told: no key")
    for host in ("wrong", "keyless"):
        assert "try: " in network.log(host) and "--site-key-file" in network.log(host)
    before, began_s = {host: network.dialled(host) for host in ("wrong", "keyless")}, time.monotonic()

    def noticed() -> bool:
        text = network.cli("coordinator", "devices").stdout
        return all(f"{host} is visible over mDNS" in text for host in before) and "is its site key right?" in text

    network.until(noticed, "no notice at the coordinator")
    for host, dialled in before.items():
        per_second = (network.dialled(host) - dialled) / (time.monotonic() - began_s)
        assert 0 < per_second <= 2, f"{host} dials {per_second:.1f} times a second"
        assert network.log(host).count("does not let us in") <= 2, "it repeats itself"
        assert network.states().get(host) == "seen"
