"""A lab of network namespaces: real addresses, real links, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed import namespaces
from testbed.links import LinkSpec
from testbed.namespaces import Lan
from wire.errors import Refused, UsageError

lab = [
    pytest.mark.lab,
    pytest.mark.skipif(bool(namespaces.why_not()), reason=namespaces.why_not() or "available"),
]

FIND = """
from wire.discovery import find_coordinator
found = find_coordinator("lab", 20.0)
print(found.addresses[0], found.port, flush=True)
"""

ADVERTISE = """
import time
from wire.discovery import Advertiser
Advertiser("lab", "coordinator", "coordinator", "aa", 1883, {}).start()
time.sleep(60)
"""


def round_trip_ms(lan: Lan, source: str, target: str, count: int = 5) -> float:
    """Least round trip of a few pings; fail if none came back."""
    program = textwrap.dedent(f"""
        import socket, sys, time
        near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        near.settimeout(1.0)
        least = 1e9
        for number in range({count}):
            began = time.perf_counter()
            near.sendto(b"ping", ("{lan.address(target)}", 7777))
            try:
                near.recv(10)
            except TimeoutError:
                continue
            least = min(least, time.perf_counter() - began)
        print(least * 1e3)
    """)
    done = lan.run(source, [sys.executable, "-c", program])
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


ECHO = """
import socket
near = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
near.bind(("0.0.0.0", 7777))
while True:
    data, sender = near.recvfrom(100)
    near.sendto(data, sender)
"""


@pytest.fixture
def log(tmp_path: Path) -> Iterator[int]:
    with (tmp_path / "log").open("wb") as opened:
        yield opened.fileno()


def remaining() -> list[str]:
    folder = Path("/run/netns")
    prefix = f"edgelam{os.getpid()}-"
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(prefix)] if folder.is_dir() else []


class TestLab:
    pytestmark = lab

    @pytest.mark.parametrize("delay_s", [0.0, 0.01])
    def test_hosts_reach_each_other_over_their_links_and_leave_nothing(self, delay_s: float, log: int) -> None:
        with Lan({"a": LinkSpec(delay_s=delay_s), "b": None}) as lan:
            echo = lan.start("b", [sys.executable, "-c", ECHO], log)
            time.sleep(0.3)
            trip_ms = round_trip_ms(lan, "a", "b")
            assert 2e3 * delay_s <= trip_ms < 2e3 * delay_s + 15
            lan.pull("b")
            assert round_trip_ms(lan, "a", "b", 1) > 1e6, "a pulled cable passed a packet"
            lan.plug("b")
            assert round_trip_ms(lan, "a", "b") < 1e3
        assert echo.returncode is not None
        assert remaining() == []
        lan.close()

    @pytest.mark.parametrize("delay_s", [0.0, 0.002])
    def test_a_rate_holds_in_both_directions(self, delay_s: float, log: int) -> None:
        serve = textwrap.dedent("""
            import socket
            listener = socket.create_server(("0.0.0.0", 7000))
            while True:
                near, _ = listener.accept()
                with near, near.makefile("rb") as stream:
                    stream.read(1_000_000)
                    near.sendall(b"x" * 1_000_000)
        """)
        ask = textwrap.dedent("""
            import socket, sys, time
            far = socket.create_connection((sys.argv[1], 7000), 5)
            began = time.perf_counter()
            far.sendall(b"x" * 1_000_000)
            with far.makefile("rb") as stream:
                got = len(stream.read(1_000_000))
            print(got, time.perf_counter() - began)
        """)
        rate = 20e6 / 8
        with Lan({"a": LinkSpec(rate_bytes_per_s=rate, delay_s=delay_s), "b": None}) as lan:
            lan.start("b", [sys.executable, "-c", serve], log)
            time.sleep(0.3)
            done = lan.run("a", [sys.executable, "-c", ask, lan.address("b")])
            count, took_s = done.stdout.split()
            assert count == "1000000", done.stderr
            assert 0.8 <= float(took_s) <= 1.3, "2 MB at 20 Mbit/s take 0.8 s, headers not counted"

    def test_a_coordinator_is_found_by_its_real_address_over_slow_lossy_links(self, log: int) -> None:
        slow = LinkSpec(delay_s=0.015, jitter_s=0.01)
        with Lan({"coordinator": slow, "board": slow}) as lan:
            lan.set_link("board", slow, loss=0.1)
            lan.start("coordinator", [sys.executable, "-c", ADVERTISE], log)
            done = lan.run("board", [sys.executable, "-c", FIND])
            assert done.stdout == f"{lan.address('coordinator')} 1883\n", done.stderr

    def test_a_board_that_gets_its_address_after_its_agent_started_is_found(self, log: int) -> None:
        with Lan({"coordinator": None, "board": None}) as lan:
            subprocess.run(["ip", "-n", lan.namespace("coordinator"), "addr", "flush", "dev", "eth0"], check=True)
            lan.start("coordinator", [sys.executable, "-c", ADVERTISE], log)
            time.sleep(1.0)
            address = f"{lan.address('coordinator')}/24"
            subprocess.run(
                ["ip", "-n", lan.namespace("coordinator"), "addr", "add", address, "dev", "eth0"], check=True
            )
            began = time.monotonic()
            done = lan.run("board", [sys.executable, "-c", FIND])
            assert done.stdout == f"{lan.address('coordinator')} 1883\n", done.stderr
            assert time.monotonic() - began < 10

    def test_what_a_killed_lab_left_is_removed_by_the_next_one(self) -> None:
        program = textwrap.dedent("""
            import sys, time
            from testbed.links import LinkSpec
            from testbed.namespaces import Lan
            with Lan({"a": LinkSpec(delay_s=0.001), "b": None}) as lan:
                lan.start("a", ["sleep", "600"], 2)
                print(lan.namespace("a"), flush=True)
                time.sleep(600)
        """)
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as killed:
            assert killed.stdout is not None
            name = killed.stdout.readline().strip()
            assert (namespaces.NETNS_FOLDER / name).exists()
            killed.kill()
        assert (namespaces.NETNS_FOLDER / name).exists()
        namespaces.remove_stale()
        assert not (namespaces.NETNS_FOLDER / name).exists()

    def test_delay_on_a_bridge_is_refused_not_ignored(self) -> None:
        with Lan({"a": None}) as lan:
            assert "bridge" in lan.how
            with pytest.raises(Refused, match="makes no delay"):
                lan.set_link("a", LinkSpec(delay_s=0.1))
        assert "switch" in Lan({"a": LinkSpec(delay_s=0.1)}).how


def test_a_lab_that_can_not_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Refused, match="network namespaces need root"), Lan({"a": None}):
        pass
    with pytest.raises(UsageError, match="0 hosts"):
        Lan({})
