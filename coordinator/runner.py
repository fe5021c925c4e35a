"""The coordinator as a process: broker, hub, HTTP door, mDNS; started in this order and ended in the reverse."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

import uvicorn
from msgspec import Struct

from coordinator.adapters import AdapterShelf
from coordinator.api import make_app
from coordinator.asked import check_precision
from coordinator.config import (
    DEFAULT_HTTP_PORT,
    Address,
    Ports,
    forget_address,
    read_address,
    read_ports,
    write_address,
    write_atomically,
    write_ports,
)
from coordinator.guard import door_names
from coordinator.hub import Hub
from coordinator.inference.serve import Serving
from coordinator.items.serve import ItemServing
from coordinator.notices import notice
from coordinator.operations import Operations
from coordinator.pump import end_stalled
from coordinator.replanning import Replanner
from coordinator.rounds.door import JobsDoor
from coordinator.rounds.store import JobStore
from coordinator.rounds.tuning import Tuning
from coordinator.service import Coordinator
from coordinator.shelf import Shelf
from models.cache import cache_dir
from wire.addresses import DEFAULT_MQTT_PORT, host_addresses, is_loopback
from wire.broker import PORT_TRIES, Broker, Credential, start_broker
from wire.client import parse_url
from wire.discovery import COORDINATOR_NAME, Advertiser, Browser, Found, coordinator_properties
from wire.errors import EdgelamError, Refused, Unreachable, UsageError
from wire.ids import SITE_USER, checked_name, new_boot_id
from wire.limits import CONTROL_KEEPALIVE_S
from wire.mqtt import MqttTransport
from wire.ports import kept_ports
from wire.transport import Transport

LOG = logging.getLogger("edgelam.up")
BROKER_WAIT_S = 10.0
WATCH_PERIOD_S = 1.0
BROKER_WATCH_PERIOD_S = 0.1
"""While the connection to the broker is lost: everybody waits for it."""


class _Server(uvicorn.Server):
    """Signals are ours: uvicorn must not take them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class Options(Struct, frozen=True, kw_only=True):
    """What `edgelam up` was told. Port 0 means the default if it is free, else any."""

    site: str
    listen: str
    mqtt_port: int
    http_port: int
    broker_url: str
    models: tuple[str, ...]
    precision: str
    state: Path
    replan: bool = True
    """Whether deployments move away from boards that became too slow."""


def listening(host: str, wanted: int, default: int, last: int = 0) -> socket.socket:
    """A listening socket on `wanted` if given (taken: UsageError), else on the first that is free of `last`, if there
    is one, `default`, and any other."""
    reason = ""
    for port in (wanted,) if wanted else (last or default, default, *kept_ports()):
        door = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((host, port))
            door.listen()  # two may be bound to one port, only one can listen; who comes early waits for the server
        except (OSError, OverflowError) as error:
            door.close()
            reason = str(getattr(error, "strerror", "") or error)
            continue
        return door
    raise UsageError(
        f"can't listen on {host}:{wanted or default} ({reason.lower()})", try_="another port or address, see --help"
    )


def chosen_port(host: str, wanted: int, default: int, last: int = 0) -> int:
    """The port that `listening` would take now."""
    with listening(host, wanted, default, last) as door:
        return int(door.getsockname()[1])


def artifacts_host(listen: str, broker_elsewhere: bool) -> str:
    """Where boards fetch weights. 0.0.0.0 tells a board: where you reach the broker; which of our addresses that is,
    only the board knows (a laptop may have Wi-Fi, and its boards on a cable without any route).

    With a broker on another machine the board can't know, and is told our address of the default route.
    """
    if listen != "0.0.0.0" or not broker_elsewhere:
        return listen
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737 test network: chooses a route, sends nothing
        except OSError:
            return host_addresses()[0].address if host_addresses() else listen
        return str(probe.getsockname()[0])


def site_key(state: Path, listen: str) -> str:
    """The key that boards must know; '' on loopback. Made once, kept readable by its owner only."""
    if is_loopback(listen):
        return ""
    path = state / "site.key"
    if not path.exists():
        write_atomically(path, (secrets.token_urlsafe(24) + "\n").encode(), mode=0o600)
    return path.read_text().strip()


class Runner:
    """All parts of one coordinator process."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.boot = new_boot_id()
        self.key = ""
        self.http_port = 0
        self.broker: Broker | None = None
        self.coordinator: Coordinator | None = None
        self.shelf: Shelf | None = None
        self._advertiser: Advertiser | None = None
        self._browser: Browser | None = None
        self._server: uvicorn.Server | None = None
        self._door: socket.socket | None = None
        self._lock: IO[bytes] | None = None
        self.tuning: Tuning | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.stopping = asyncio.Event()

    def check(self) -> None:
        """Refuse what can't work, before anything is started; take the state folder for ourselves."""
        checked_name(self.options.site, "site")
        check_precision(self.options.precision)
        state = self.options.state
        try:
            state.mkdir(parents=True, exist_ok=True)
            self._lock = (state / "lock").open("ab")
        except OSError as error:
            raise UsageError(
                f"state folder {state}: {(error.strerror or str(error)).lower()}",
                try_="a folder that you may write: --state, or $EDGELAM_STATE",
            ) from None
        try:
            # Ends with this process, however it ends: a process id in a file may be anybody's after a crash.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            running = read_address(state)
            who = f"of site {running.site!r} (pid {running.pid}) " if running is not None else ""
            raise Refused(
                f"a coordinator {who}runs already with the state folder {state}",
                try_="stop it, or give another --state folder",
            ) from None

    async def start(self) -> Address:
        """Start all parts; give where clients and boards find us."""
        options = self.options
        self.key = site_key(options.state, options.listen)
        url, broker_text = self._start_broker()
        transport = MqttTransport(
            url,
            f"edgelam-coordinator-{self.boot}",
            keepalive_s=CONTROL_KEEPALIVE_S,
            username=SITE_USER if self.key else "",
            password=self.key,
        )
        last = read_ports(options.state)
        self._door = listening(options.listen, options.http_port, DEFAULT_HTTP_PORT, last.http)
        end_stalled(self._door)
        self.http_port = int(self._door.getsockname()[1])
        write_ports(options.state, Ports(self.broker.port if self.broker is not None else last.mqtt, self.http_port))
        artifacts_url = f"http://{artifacts_host(options.listen, bool(options.broker_url))}:{self.http_port}"
        self.coordinator = Coordinator(
            site=options.site,
            boot=self.boot,
            state=options.state,
            artifacts_url=artifacts_url,
            mqtt_url=url,
            broker_text=broker_text,
            hub=Hub(transport, options.site, self.boot, asyncio.get_running_loop()),
        )
        self.shelf = Shelf(cache_dir())
        operations = Operations(self.coordinator, self.shelf)
        jobs = options.state / "jobs"
        adapters = AdapterShelf(jobs, cache_dir())
        operations.superseded = adapters.superseded
        serving = Serving(self.coordinator, operations, adapters)
        items = ItemServing(self.coordinator, operations, adapters, self.shelf)
        self.tuning = Tuning(self.coordinator, operations, JobStore(jobs, self.coordinator.journal))
        self.coordinator.open()
        await self._await_broker(transport, url)
        self.tuning.restore()
        self._tasks.append(asyncio.create_task(self._serve_http(operations, serving, items, self.tuning)))
        self._advertise(url)
        self._tasks.append(asyncio.create_task(self._watch()))
        replanner = Replanner(self.coordinator, operations, serving.why_stay, options.replan)
        self._tasks.append(asyncio.create_task(replanner.run()))
        self._tasks.append(asyncio.create_task(self._prepare_models(operations)))
        self._tasks.append(asyncio.create_task(operations.replicas.run()))
        address = Address(
            site=options.site,
            boot=self.boot,
            pid=os.getpid(),
            http_url=f"http://{'127.0.0.1' if options.listen == '0.0.0.0' else options.listen}:{self.http_port}",
            mqtt_url=url,
            broker=broker_text,
        )
        write_address(options.state, address)
        self._greet(url, broker_text)
        return address

    def _start_broker(self) -> tuple[str, str]:
        options = self.options
        if options.broker_url:
            return options.broker_url, f"given: {options.broker_url}"
        self.broker = self._broker_on(self._free_mqtt_port())
        return self.broker.url, f"{self.broker.name}: {self.broker.because}"

    def _free_mqtt_port(self) -> int:
        options = self.options
        return chosen_port(options.listen, options.mqtt_port, DEFAULT_MQTT_PORT, read_ports(options.state).mqtt)

    def _broker_on(self, port: int) -> Broker:
        """Start it there; on another port if somebody took that one between our look and its start."""
        credentials = (Credential(SITE_USER, self.key),) if self.key else ()
        folder, host = self.options.state / "broker", self.options.listen
        for _ in range(PORT_TRIES - 1):
            try:
                return start_broker(folder, host, port, credentials)
            except Unreachable:
                other = self._free_mqtt_port()
                if other == port:  # it is not the port that is wrong
                    raise
                port = other
        return start_broker(folder, host, port, credentials)

    async def _await_broker(self, transport: Transport, url: str) -> None:
        assert self.coordinator is not None
        coordinator = self.coordinator
        if not await coordinator.changes.wait(lambda: coordinator.broker_up, BROKER_WAIT_S):
            raise Unreachable(
                f"no broker at {url} ({transport.last_error or 'no answer'})",
                try_="start it, or leave --broker away to have one started",
            )

    async def run(self) -> None:
        """Serve until `stopping` is set; raise what ends a part of us that must not end."""
        stopping = asyncio.create_task(self.stopping.wait())
        waiting: set[asyncio.Task[Any]] = {stopping, *self._tasks}
        while not stopping.done():
            ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in ended - {stopping}:
                task.result()

    async def _serve_http(self, operations: Operations, serving: Serving, items: ItemServing, tuning: Tuning) -> None:
        assert self.coordinator is not None and self._door is not None
        config = uvicorn.Config(
            make_app(
                self.coordinator,
                operations,
                serving,
                items,
                self.key,
                door_names(self.options.listen),
                JobsDoor(tuning).routes(),
            ),
            host=self.options.listen,
            port=self.http_port,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config)
        await self._server.serve(sockets=[self._door])
        if not self._server.should_exit:
            raise EdgelamError("the HTTP door ended", try_="start the coordinator again; its log may say why")

    def _advertise(self, url: str) -> None:
        options = self.options
        interfaces = [options.listen] if options.listen != "0.0.0.0" else None
        if is_loopback(options.listen):
            interfaces = ["127.0.0.1"]
        broker_host, port = parse_url(url)
        elsewhere = bool(options.broker_url) and not is_loopback(broker_host)
        self._advertiser = Advertiser(
            options.site,
            COORDINATOR_NAME,
            "coordinator",
            self.boot,
            port,
            coordinator_properties(self.http_port, broker_host if elsewhere else ""),
            interfaces=interfaces,
        )
        self._advertiser.start()
        loop, coordinator = asyncio.get_running_loop(), self.coordinator
        assert coordinator is not None

        def seen(found: Found) -> None:
            loop.call_soon_threadsafe(coordinator.mdns_seen, found)

        def gone(found: Found) -> None:
            loop.call_soon_threadsafe(coordinator.mdns_gone, found)

        self._browser = Browser(
            seen,
            gone,
            site=options.site,
            interfaces=interfaces,
        )
        self._browser.start()

    async def _watch(self) -> None:
        """Once a second: is the broker alive, has time changed anything in the fleet?"""
        assert self.coordinator is not None
        while True:
            await _next_look(self.coordinator)
            self.coordinator.tick()
            if not self.coordinator.hub.alive:
                raise EdgelamError("the connection to the broker failed", try_="start the coordinator again")
            if self.broker is not None:
                happened = await asyncio.to_thread(self.broker.poll)
                if happened:
                    LOG.warning("%s", happened)
                    self.coordinator.note(notice("broker-ended", what=happened))

    async def _prepare_models(self, operations: Operations) -> None:
        for model in self.options.models:
            try:
                await operations.preparing.prepare(model, self.options.precision, lambda text: LOG.info("%s", text))
                LOG.info("%s at %s is ready to be planned", model, self.options.precision)
            except EdgelamError as error:
                LOG.error("%s: %s (try: %s)", model, error.message, error.try_)

    def _greet(self, url: str, broker_text: str) -> None:
        options = self.options
        LOG.info("site %s: broker %s (%s)", options.site, url, broker_text)
        door = f"http://{options.listen}:{self.http_port}"
        LOG.info("site %s: HTTP door %s (OpenAI-compatible: %s/v1)", options.site, door, door)
        if self.key:
            LOG.info("boards: edgelam-agent run --site %s --site-key-file FILE", options.site)
            LOG.info("the site key is in %s", options.state / "site.key")
        else:
            LOG.info("boards on this machine only: edgelam-agent run --site %s --interfaces 127.0.0.1", options.site)

    async def stop(self) -> None:
        """End everything in order; what is retained stays with the broker until it ends too."""
        forget_address(self.options.state, self.boot)
        if self.shelf is not None:
            await self.shelf.close()
        if self._advertiser is not None:
            await asyncio.to_thread(self._advertiser.close)
        if self._browser is not None:
            await asyncio.to_thread(self._browser.close)
        if self._server is not None:
            self._server.should_exit = True
        if self.tuning is not None:
            await self.tuning.close()
        for task in self._tasks[1:]:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=5.0)
        elif self._door is not None:
            self._door.close()
        if self.coordinator is not None:
            await asyncio.to_thread(self.coordinator.hub.stop)
            self.coordinator.close()
        if self.broker is not None:
            await asyncio.to_thread(self.broker.stop)
        if self._lock is not None:
            self._lock.close()


async def serve(options: Options, on_ready: Callable[[Address], None] = lambda _address: None) -> None:
    """Run a coordinator until SIGINT or SIGTERM; `on_ready` is called once when it can be reached."""
    runner = Runner(options)
    runner.check()
    loop = asyncio.get_running_loop()
    interrupted = False

    def stop(number: int) -> None:
        nonlocal interrupted
        interrupted = interrupted or number == signal.SIGINT
        runner.stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        on_ready(await runner.start())
        await runner.run()
    finally:
        await runner.stop()
    if interrupted:
        raise KeyboardInterrupt


async def _next_look(coordinator: Coordinator) -> None:
    """Wait until it is time to look after the broker and the fleet."""
    if coordinator.broker_up:
        await coordinator.changes.wait(lambda: not coordinator.broker_up, WATCH_PERIOD_S)
    else:
        await asyncio.sleep(BROKER_WATCH_PERIOD_S)
