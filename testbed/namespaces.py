"""Hosts with real addresses on one machine: network namespaces on a bridge, or on a user-space switch. Needs root.

    with Lan({"coordinator": None, "pi4": WIFI}) as lan:
        lan.start("pi4", [sys.executable, "-m", "agent", "run", ...], log)

Each host has eth0 with an address in 10.77.0.0/24 and nothing of the machine's own network. Where no host has delay,
jitter or loss, the hosts hang on a kernel bridge and rates are kept by token bucket filters (5 Gbit/s and more without
a rate); otherwise on testbed.switch. Names carry our pid, so that two labs don't meet and what a killed one left is
known: it is removed when the next one starts.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final

import msgspec

from testbed.links import LinkSpec, checked_link
from testbed.processes import start_child
from testbed.state import ProcessRecord, record_of, send
from testbed.switch import Plug, PortSpec, SetPort
from wire.errors import Refused, UsageError
from wire.ids import checked_name

NETNS_FOLDER: Final = Path("/run/netns")
SUBNET: Final = "10.77.0"
MAX_HOSTS: Final = 64

BURST_S: Final = 0.005
MIN_BURST_BYTES: Final = 16_384
"""A token bucket must hold what arrives between two timer interrupts, and one large segment."""

QUEUE_MS: Final = 50
"""As deep as the user-space shaper's queue."""

END_S: Final = 3.0
STDERR: Final = 2

_OURS: Final = re.compile(r"^edgelam(\d+)-\w+$")


class Unavailable(Refused):
    """This machine, or this user, can't make network namespaces; the text says why."""


def why_not() -> str:
    """Why no lab can be made here; '' if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"{missing[0]} is not installed (package iproute2)"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun is missing"
    return ""


class Lan:
    """Hosts by name, each with a link (None: unlimited). A context manager that always cleans up."""

    def __init__(self, hosts: Mapping[str, LinkSpec | None]) -> None:
        if not 1 <= len(hosts) <= MAX_HOSTS:
            raise UsageError(f"a lab of {len(hosts)} hosts", try_=f"1 to {MAX_HOSTS}")
        self._links = {checked_name(name, "host"): checked_link(link or LinkSpec()) for name, link in hosts.items()}
        self._numbers = {name: number for number, name in enumerate(self._links, 1)}
        self._switch: subprocess.Popen[bytes] | None = None
        self._bridged = not any(link.delay_s or link.jitter_s for link in self._links.values())
        self._started: list[subprocess.Popen[bytes]] = []

    @property
    def how(self) -> str:
        """What the hosts hang on, and why."""
        if self._bridged:
            return "kernel bridge and token bucket filters: no host has a delay"
        return "user-space switch: a host has a delay, which plain token bucket filters don't make"

    def address(self, host: str) -> str:
        return f"{SUBNET}.{self._numbers[host]}"

    def namespace(self, host: str) -> str:
        return f"edgelam{os.getpid()}-{self._numbers[host]}"

    @property
    def _bridge(self) -> str:
        return f"edgelam{os.getpid()}-sw"

    def __enter__(self) -> Lan:
        reason = why_not()
        if reason:
            raise Unavailable(f"no network lab: {reason}", try_="the user-space shaper (testbed.shaper) needs no root")
        remove_stale()
        try:
            for host in self._links:
                _ip("netns", "add", self.namespace(host))
            if self._bridged:
                self._make_bridge()
            else:
                self._start_switch()
            for host in self._links:
                self._give_address(host)
                if self._bridged:
                    self._set_rate(host)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _make_bridge(self) -> None:
        """A bridge in a namespace of its own, one port per host. Multicast is flooded: mDNS must reach everybody."""
        _ip("netns", "add", self._bridge)
        lines = ["link add br0 type bridge stp_state 0 mcast_snooping 0", "link set br0 up"]
        for host, number in self._numbers.items():
            lines.append(f"link add p{number} type veth peer name eth0 netns {self.namespace(host)}")
            lines.append(f"link set p{number} master br0 up")
        _ip("-n", self._bridge, "-batch", "-", lines=lines)

    def _start_switch(self) -> None:
        ports = {host: PortSpec(namespace=self.namespace(host), link=link) for host, link in self._links.items()}
        argument = msgspec.json.encode(ports).decode()
        self._switch = start_child(
            [sys.executable, "-m", "testbed.switch", argument],
            STDERR,
            os.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._answer()

    def _give_address(self, host: str) -> None:
        lines = [
            "link set lo up",
            f"addr add {self.address(host)}/24 dev eth0",
            "link set eth0 up",
            # Programs that join multicast groups look for an interface by the default route.
            f"route add default via {SUBNET}.254",
        ]
        _ip("-n", self.namespace(host), "-batch", "-", lines=lines)

    def _set_rate(self, host: str) -> None:
        """Token buckets on both ends of the host's cable: each shapes what leaves through it."""
        rate = self._links[host].rate_bytes_per_s
        for namespace, device in ((self.namespace(host), "eth0"), (self._bridge, f"p{self._numbers[host]}")):
            if rate is None:
                subprocess.run(
                    ["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"], capture_output=True, check=False
                )
                continue
            burst = max(int(rate * BURST_S), MIN_BURST_BYTES)
            shape = ["tbf", "rate", f"{int(rate * 8)}bit", "burst", str(burst), "latency", f"{QUEUE_MS}ms"]
            _checked(["tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *shape])

    def set_link(self, host: str, link: LinkSpec, loss: float = 0.0) -> None:
        """Change a link while it is in use. Delay, jitter and loss need the switch: raises Refused on a bridge."""
        checked_link(link)
        if self._bridged:
            if link.delay_s or link.jitter_s or loss:
                raise Refused(
                    f"host {host} hangs on a kernel bridge, which makes no delay",
                    try_="give one host of the lab a delay from the start",
                )
            self._links[host] = link
            self._set_rate(host)
        else:
            self._links[host] = link
            self._tell(SetPort(port=host, link=link, loss=loss))

    def pull(self, host: str) -> None:
        """Pull a host's cable."""
        self._plug(host, False)

    def plug(self, host: str) -> None:
        self._plug(host, True)

    def _plug(self, host: str, up: bool) -> None:
        if self._bridged:
            _ip("-n", self._bridge, "link", "set", f"p{self._numbers[host]}", "up" if up else "down")
        else:
            self._tell(Plug(port=host, up=up))

    def start(
        self, host: str, arguments: Sequence[str], log: IO[bytes] | int, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program on a host; it ends with the lab."""
        program = start_child(
            ["ip", "netns", "exec", self.namespace(host), *arguments],
            log,
            os.environ if environment is None else environment,
        )
        self._started.append(program)
        return program

    def run(self, host: str, arguments: Sequence[str], timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a program on a host to its end."""
        command = ["ip", "netns", "exec", self.namespace(host), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)

    def close(self) -> None:
        """End all programs of the lab and remove its namespaces. Idempotent."""
        names = [self.namespace(host) for host in self._links]
        for name in names:
            _end_all(name)
        for program in self._started:
            program.wait()
        self._started.clear()
        switch, self._switch = self._switch, None
        if switch is not None:
            for pipe in (switch.stdin, switch.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                switch.wait(END_S)
            except subprocess.TimeoutExpired:
                switch.kill()
                switch.wait()
        for name in (*names, self._bridge):
            _remove(name)

    def _tell(self, command: SetPort | Plug) -> None:
        assert self._switch is not None
        assert self._switch.stdin is not None
        self._switch.stdin.write(msgspec.json.encode(command) + b"\n")
        self._switch.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        assert self._switch is not None
        assert self._switch.stdout is not None
        answer = msgspec.json.decode(self._switch.stdout.readline() or b'{"ok": false, "error": "it has ended"}')
        if not answer["ok"]:
            raise Refused(f"the lab's switch: {answer['error']}")


def remove_stale() -> None:
    """Remove namespaces of labs whose process has ended."""
    if not NETNS_FOLDER.is_dir():
        return
    for entry in NETNS_FOLDER.iterdir():
        ours = _OURS.match(entry.name)
        if ours and int(ours[1]) != os.getpid() and record_of(int(ours[1])) is None:
            _end_all(entry.name)
            _remove(entry.name)


def _members(namespace: str) -> list[ProcessRecord]:
    """Processes in a namespace."""
    try:
        wanted = (NETNS_FOLDER / namespace).stat()
    except FileNotFoundError:
        return []
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                inside = (entry / "ns" / "net").stat()
                record = record_of(int(entry.name))
                if record is not None and (inside.st_ino, inside.st_dev) == (wanted.st_ino, wanted.st_dev):
                    found.append(record)
    return found


def _end_all(namespace: str) -> None:
    deadline = time.monotonic() + END_S
    number = signal.SIGTERM
    while members := _members(namespace):
        if time.monotonic() > deadline:
            number = signal.SIGKILL
        for process in members:
            send(process, number)
        time.sleep(0.05)


def _remove(namespace: str) -> None:
    if (NETNS_FOLDER / namespace).exists():
        _ip("netns", "del", namespace)


def _ip(*arguments: str, lines: Sequence[str] = ()) -> None:
    _checked(["ip", *arguments], "".join(f"{line}\n" for line in lines))


def _checked(command: Sequence[str], given: str = "") -> None:
    done = subprocess.run(command, input=given, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise Unavailable(
            f"{' '.join(command)}: {done.stderr.strip() or done.returncode}",
            try_="run as root, on a kernel with bridge, veth, tun and sch_tbf",
        )
