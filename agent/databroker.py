"""The broker of this board, through which the stage before reaches the stages here (docs/decisions/0007).

A small mosquitto, started as soon as the site is known, looked after in a thread of its own: starting one may take
seconds on a loaded board, and the supervisor's loop must not wait. Its port is kept, so that the addresses in a plan
still hold when the agent was started again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from agent.records import Records
from agent.workers.pipe import DataBrokerAt
from wire.addresses import host_addresses, host_port_text, is_loopback
from wire.broker import Broker, Credential, mosquitto_path, start_mosquitto
from wire.errors import EdgelamError
from wire.ids import SITE_USER

LOG = logging.getLogger("edgelam.databroker")

WATCH_PERIOD_S: Final = 0.2
"""Stages behind a broker that died wait for it: it should be back before they try again."""
START_AGAIN_S: Final = 30.0
"""After a start that failed."""


class DataPort(Struct, frozen=True, kw_only=True):
    """The port that the broker had last."""

    port: int


class Wanted(Struct, frozen=True, kw_only=True):
    """What this board's broker should be. `address` HOST:PORT is told to others instead of its own (tunnels)."""

    allowed: bool = True
    interfaces: tuple[str, ...] = ()
    port: int = 0
    address: str = ""
    key: str = ""


def listen_on(wanted: Wanted, reached_from: str) -> tuple[str, str]:
    """Give the address to listen on and '', or '' and why there is none. `reached_from` is our own address on the way
    to the site's broker; a site without a key is all on one machine, and it is loopback there."""
    if not wanted.allowed:
        return "", "switched off (--data-broker off)"
    if wanted.interfaces and all(map(is_loopback, wanted.interfaces)):
        return "127.0.0.1", ""
    if not wanted.key:
        unsafe = "without a site key it would be open to the whole network"
        return ("127.0.0.1", "") if is_loopback(reached_from) else ("", unsafe)
    return (wanted.interfaces[0] if len(wanted.interfaces) == 1 else "0.0.0.0"), ""


def address_of(wanted: Wanted, host: str, port: int, reached_from: str) -> str:
    """The URL by which other boards reach a broker that listens on `host`. Where it is every address of ours, the one
    by which the site's broker is reached is near to the others; if that is on this machine, the first one is taken."""
    if wanted.address:
        return f"mqtt://{wanted.address}"
    seen = host
    if host == "0.0.0.0":
        seen = host_addresses()[0].address if is_loopback(reached_from) and host_addresses() else reached_from
    return f"mqtt://{host_port_text(seen, port)}"


class DataBroker:
    """`changed` is called, in the broker's thread, whenever `at` or `because` may have changed."""

    def __init__(self, folder: Path, wanted: Wanted, records: Records, changed: Callable[[], None]) -> None:
        self.at: DataBrokerAt | None = None
        """Where it is; None while there is none."""
        self.because = "not started yet"
        """What it is, or why there is none."""
        self._folder = folder
        self._wanted = wanted
        self._records = records
        self._changed = changed
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._broker: Broker | None = None
        self._told = threading.Event()
        """Where it is, or why there is none, was said."""
        self._host = ""
        self._reached_from = ""

    @property
    def starting(self) -> bool:
        """Whether it is not known yet how the first start ends."""
        return self._thread is not None and not self._told.is_set()

    def await_started(self, timeout_s: float) -> None:
        """Wait until it is known how the first start ends, if one is under way."""
        if self._thread is not None:
            self._told.wait(timeout_s)

    def reached(self, reached_from: str) -> None:
        """The way to the site's broker stands, and this is our address on it: start, or see whether others must be told
        another address."""
        if self._stop.is_set():
            return
        self._reached_from = reached_from
        if self._thread is not None:
            self._say()
            return
        self._host, refused = listen_on(self._wanted, reached_from)
        if not refused and mosquitto_path() is None:
            refused = "mosquitto is not installed (sudo apt install mosquitto)"
        if refused:
            self._tell(None, refused)
            return
        self._thread = threading.Thread(target=self._run, name="data broker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End it and wait. Idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._broker = broker = self._started(self._host)
            except (EdgelamError, OSError) as error:
                self._tell(None, str(error))
                self._stop.wait(START_AGAIN_S)
                continue
            self._records.save("data-port", DataPort(port=broker.port))
            self._say()
            while not self._stop.wait(WATCH_PERIOD_S):
                try:
                    happened = broker.poll()
                except OSError as error:
                    happened = f"it could not be started again: {error}"
                if happened:
                    LOG.warning("the board's broker: %s", happened)
            broker.stop()

    def _say(self) -> None:
        """Tell where the broker is, if that is news. Called from both threads: what they say is the same."""
        broker = self._broker
        if broker is None:
            return
        address = address_of(self._wanted, self._host, broker.port, self._reached_from)
        at = DataBrokerAt(address=address, url=broker.url)
        if at != self.at:
            self._tell(at, broker.name)

    def _started(self, host: str) -> Broker:
        """Start it on the port that it had, if that is still free."""
        key = self._wanted.key
        credentials: Sequence[Credential] = (Credential(SITE_USER, key),) if key else ()
        last = self._records.load("data-port", DataPort)
        ports = [self._wanted.port] if self._wanted.port else [last.port, 0] if last is not None else [0]
        for port in ports[:-1]:
            try:
                return start_mosquitto(self._folder, host, port, credentials)
            except EdgelamError as error:
                LOG.info("the board's broker gets another port: %s", error)
        return start_mosquitto(self._folder, host, ports[-1], credentials)

    def _tell(self, at: DataBrokerAt | None, because: str) -> None:
        self.at, self.because = at, because
        LOG.info("the board's own broker: %s", f"{at.address} ({because})" if at is not None else because)
        self._changed()
        self._told.set()
