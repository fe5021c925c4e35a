"""The brokers we run ourselves: mosquitto where it is installed, else amqtt in a child process.

A broker is never the store of record: it loses acknowledged messages when it is killed, so agents and coordinator
publish their retained state again at every connect, and persistence is off unless somebody asks for it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from wire.addresses import host_port_text, is_loopback
from wire.child import Child
from wire.errors import Refused, Unreachable, UsageError
from wire.limits import MAX_DEVICES, MAX_PUBLISH_BYTES
from wire.ports import kept_ports

READY_TIMEOUT_S: Final = 15.0
"""A broker that doesn't listen by then has failed: mosquitto takes 0.1 s, Python on a loaded board some seconds."""

FIRST_BACKOFF_S: Final = 0.1
"""Doubled each time. All that use a broker try again after RECONNECT_DELAY_S: by then it should be there."""

MAX_BACKOFF_S: Final = 30.0
HIDDEN_S: Final = 1.0
"""Where we can't see whose port it is: a broker that could not have it has ended by then."""

PORT_TRIES: Final = 3
"""Of a port that we choose: between our choice and the broker's start somebody else may take it."""

STEADY_AFTER_S: Final = 10.0
"""A broker that ran for so long begins with the first backoff again."""

MAX_PACKET_BYTES: Final = MAX_PUBLISH_BYTES + 65_536
"""A payload of MAX_PUBLISH_BYTES with its topic and properties; larger packets cost their sender the connection."""

MAX_QUEUED_BYTES: Final = 64 * 1024 * 1024
MEMORY_LIMIT_BYTES: Final = 256 * 1024 * 1024
MAX_QUEUED_MESSAGES: Final = 8 * MAX_DEVICES
"""Per client. Only this bounds QoS 0 messages to a stalled client, and beyond it mosquitto drops silently. A subscriber
to everything gets five retained messages per device at once, which must all fit; tensors are bounded by credit."""

PASSWORD_ITERATIONS: Final = 1000
"""Ten times what mosquitto_passwd takes; a connect then costs the broker, which has one thread, half a millisecond."""

EMBEDDED_COST: Final = "5 to 6 times slower than mosquitto for 1 KB messages, 20 times the processor time for 1 MB"
INSTALL_HINT: Final = "sudo apt install mosquitto, or give the address of a running broker: --broker mqtt://HOST:PORT"


class Credential(NamedTuple):
    username: str
    password: str


class Broker(ABC):
    """A broker as our child process. `start`, then `poll` every second or so, then `stop`."""

    def __init__(
        self, directory: Path, host: str, port: int, credentials: Sequence[Credential] = (), *, because: str = ""
    ) -> None:
        """Store what is given. `port` 0 takes a free one. Raises Refused for an open broker that others can reach.

        `directory` is made if it is missing; configuration, log and database lie there. `because` says why this kind
        of broker was chosen.
        """
        if not credentials and not is_loopback(host):
            raise Refused(
                f"a broker on {host} without passwords would be open to the whole network",
                try_="give credentials, or bind it to 127.0.0.1",
            )
        for credential in credentials:
            if not re.fullmatch(r"[^\s:\0]{1,64}", credential.username) or not credential.password:
                raise UsageError(
                    f"user {credential.username!r}: not a user name, or without a password",
                    try_="a name of 1 to 64 characters without spaces and colons, and a password",
                )
        self.directory = directory
        self.host = host
        self.port = port
        self.because = because
        self.restarts = 0
        self._credentials = tuple(credentials)
        self._child: Child | None = None
        self._started_s = 0.0
        self._backoff_s = FIRST_BACKOFF_S
        self._restart_at_s: float | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """'mosquitto 2.0.11'."""

    @abstractmethod
    def _command(self) -> list[str]:
        """Write what the broker needs and give its command line."""

    @property
    def url(self) -> str:
        """Where a client on this machine connects."""
        return f"mqtt://{host_port_text({'0.0.0.0': '127.0.0.1', '::': '::1'}.get(self.host, self.host), self.port)}"

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.exit_code is None

    def start(self) -> None:
        """Start and wait until it listens; raise Unreachable with its last words if it doesn't."""
        self.directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        wanted = self.port
        for _ in range(PORT_TRIES - 1 if wanted == 0 else 0):
            self.port = free_port(self.host, wanted)
            with contextlib.suppress(Unreachable):
                return self._launch()
        self.port = free_port(self.host, wanted)
        return self._launch()

    def poll(self) -> str:
        """Look after it: start it again if it died. Give what happened in words, '' if nothing did."""
        if self._child is None or self._child.exit_code is None:
            return ""
        now_s = time.monotonic()
        if self._restart_at_s is None:
            if now_s - self._started_s > STEADY_AFTER_S:
                self._backoff_s = FIRST_BACKOFF_S
            self._restart_at_s = now_s + self._backoff_s
            self._backoff_s = min(MAX_BACKOFF_S, self._backoff_s * 2)
            return f"{self.name} ended ({_exit_words(self._child.exit_code)}): it will be started again"
        if now_s < self._restart_at_s:
            return ""
        self._restart_at_s = None
        self.restarts += 1
        try:
            self._launch()
        except Unreachable as error:
            return error.message
        return f"{self.name} was started again (restart {self.restarts})"

    def stop(self) -> None:
        """End it and wait. Idempotent."""
        child, self._child = self._child, None
        if child is not None:
            child.stop()

    def _launch(self) -> None:
        self._started_s = time.monotonic()
        self._child = child = Child(self._command(), self.directory / "broker.log")
        while not (_listens(self.url) and self._is_ours(child)):
            if child.exit_code is not None or time.monotonic() - self._started_s > READY_TIMEOUT_S:
                code, words = child.exit_code, child.last_words()
                child.stop()
                raise Unreachable(
                    f"{self.name} did not start on {self.host}:{self.port} ({words or _exit_words(code)})",
                    try_=f"see {child.log}",
                )
            time.sleep(0.01)

    def _is_ours(self, child: Child) -> bool:
        """Whether it is our broker that answers there, and not one that took the port before ours could."""
        listens = child.listens(self.port)
        if listens is None:
            return child.exit_code is None and time.monotonic() - self._started_s > HIDDEN_S
        return listens


class MosquittoBroker(Broker):
    """mosquitto with a configuration that we write."""

    def __init__(
        self,
        directory: Path,
        host: str,
        port: int,
        credentials: Sequence[Credential] = (),
        *,
        binary: str,
        persistence: bool = False,
        because: str = "",
    ) -> None:
        super().__init__(directory, host, port, credentials, because=because)
        self._binary = binary
        self._persistence = persistence
        self._version = ""

    @property
    def name(self) -> str:
        if not self._version:
            self._version = _mosquitto_version(self._binary)
        return f"mosquitto {self._version}"

    def configuration(self) -> str:
        """The text of mosquitto.conf; the reasons stand beside the constants."""
        lines = [
            f"listener {self.port} {self.host}",
            "set_tcp_nodelay true",
            f"max_packet_size {MAX_PACKET_BYTES}",
            f"max_queued_messages {MAX_QUEUED_MESSAGES}",
            f"max_queued_bytes {MAX_QUEUED_BYTES}",
            f"memory_limit {MEMORY_LIMIT_BYTES}",
            "max_inflight_messages 20",
            "sys_interval 5",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "connection_messages false",
            f"persistence {'true' if self._persistence else 'false'}",
            f"allow_anonymous {'false' if self._credentials else 'true'}",
        ]
        if self._credentials:
            lines.append(f"password_file {self._password_file}")
        if self._persistence:
            lines += [f"persistence_location {self._database_directory}/", "autosave_interval 60"]
        if os.geteuid() == 0:
            lines.append(f"user {self._user()}")
        return "\n".join(lines) + "\n"

    @property
    def _password_file(self) -> Path:
        return self.directory / "passwords"

    @property
    def _database_directory(self) -> Path:
        return self.directory / "database"

    def _user(self) -> str:
        """Whom mosquitto becomes when root starts it: its own user, unless that one can't reach passwords or database
        (in a directory under /root, say), which it opens after it has changed."""
        account = _account("mosquitto") or _account("nobody")
        if account is None:
            return "root"
        reachable = all(parent.stat().st_mode & 0o001 for parent in self.directory.resolve().parents)
        reachable = reachable and bool(self.directory.stat().st_mode & 0o001)
        return account.pw_name if reachable or not (self._persistence or self._credentials) else "root"

    def _command(self) -> list[str]:
        if self._credentials:
            self._write_passwords()
        if self._persistence:
            self._database_directory.mkdir(mode=0o700, exist_ok=True)
            account = _account(self._user()) if os.geteuid() == 0 else None
            if account is not None:
                os.chown(self._database_directory, account.pw_uid, account.pw_gid)
        configuration = self.directory / "mosquitto.conf"
        configuration.write_text(self.configuration(), encoding="utf-8")
        return [self._binary, "-c", str(configuration)]

    def _write_passwords(self) -> None:
        """mosquitto's own format 7: user:$7$iterations$salt$PBKDF2-HMAC-SHA512, both in base64."""
        lines = []
        for user, password in self._credentials:
            salt = secrets.token_bytes(12)
            digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, PASSWORD_ITERATIONS)
            words = (str(PASSWORD_ITERATIONS), base64.b64encode(salt).decode(), base64.b64encode(digest).decode())
            lines.append(f"{user}:$7${'$'.join(words)}\n")
        fresh = self.directory / "passwords.new"
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)
        fresh.write_text("".join(lines), encoding="utf-8")
        account = _account(self._user()) if os.geteuid() == 0 else None
        if account is not None:
            os.chown(fresh, account.pw_uid, account.pw_gid)
        fresh.replace(self._password_file)


class EmbeddedBroker(Broker):
    """amqtt in a Python process: needs nothing but pip, costs what EMBEDDED_COST says.

    MQTT 3.1.1, no persistence, no caps on what it queues, and two clients with one id are both left connected.
    """

    @property
    def name(self) -> str:
        return f"amqtt {importlib.metadata.version('amqtt')}"

    def _command(self) -> list[str]:
        from wire.embedded import password_hash  # imports amqtt, which not every machine has

        users = {}
        for user, password in self._credentials:
            salt = secrets.token_bytes(16)
            users[user] = [salt.hex(), password_hash(password, salt).hex()]
        configuration = self.directory / "embedded.json"
        configuration.touch(mode=0o600)
        configuration.write_text(json.dumps({"host": self.host, "port": self.port, "users": users}), encoding="utf-8")
        return [sys.executable, "-m", "wire.embedded", str(configuration)]


def start_broker(
    directory: Path, host: str, port: int, credentials: Sequence[Credential] = (), *, persistence: bool = False
) -> Broker:
    """Start the best broker that this machine has; its `because` says which and why.

    Raises Refused (open to the network without credentials), Unreachable (none installed, port taken, failed to start).
    """
    broker: Broker
    if mosquitto_path() is not None:
        return start_mosquitto(directory, host, port, credentials, persistence=persistence)
    if importlib.util.find_spec("amqtt") is not None:
        because = f"mosquitto is not installed; the embedded broker is {EMBEDDED_COST}"
        broker = EmbeddedBroker(directory, host, port, credentials, because=because)
    else:
        raise Unreachable("no broker: neither mosquitto nor the Python package amqtt is installed", try_=INSTALL_HINT)
    broker.start()
    return broker


def mosquitto_path() -> str | None:
    """Where mosquitto is on this machine; None if it is not."""
    return _find("mosquitto")


def start_mosquitto(
    directory: Path, host: str, port: int, credentials: Sequence[Credential] = (), *, persistence: bool = False
) -> Broker:
    """Start a mosquitto. Raises Refused (open to the network without credentials), Unreachable (not installed, port
    taken, failed to start)."""
    binary = mosquitto_path()
    if binary is None:
        raise Unreachable("mosquitto is not installed", try_=INSTALL_HINT)
    because = f"mosquitto found: {binary}"
    broker = MosquittoBroker(
        directory, host, port, credentials, binary=binary, persistence=persistence, because=because
    )
    broker.start()
    return broker


def _find(program: str) -> str | None:
    """Path of a program; the sbin folders are looked into too, ordinary users often lack them in PATH."""
    folders = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin", "/sbin"])
    return shutil.which(program, path=folders)


def _mosquitto_version(binary: str) -> str:
    shown = subprocess.run([binary, "-h"], capture_output=True, text=True, timeout=10, check=False).stdout
    found = re.search(r"mosquitto version (\S+)", shown)
    return found.group(1) if found else "of unknown version"


def _account(name: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        return None


def free_port(host: str, port: int) -> int:
    """Give `port`, or a free one for 0 that can be kept; raise Unreachable if it can't be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    reason = ""
    for tried in (port,) if port else kept_ports():
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, tried))
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                continue
            return int(probe.getsockname()[1])
    raise Unreachable(
        f"the broker can't have {host}:{port} ({reason})",
        try_=f"see who has it: ss -ltnp 'sport = :{port}'; or give another port",
    )


def _listens(url: str) -> bool:
    host, _, port = url.removeprefix("mqtt://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=1):
            return True
    except OSError:
        return False


def _exit_words(code: int | None) -> str:
    if code is None:
        return "no answer in time"
    if code < 0 or code > 128:
        return f"signal {-code if code < 0 else code - 128}"
    return f"exit code {code}"
