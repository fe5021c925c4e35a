"""mDNS: how agents find their coordinator, and how a person sees which sites and boards are there.

mDNS finds; it does not tell who is alive: a killed host stays in caches for 19 to 75 minutes. Liveness is MQTT's.
Nothing here is believed beyond an address to try: every field is checked, what is malformed is counted and dropped.

This is the only file that imports zeroconf. All of its work is done in threads of its own; no call here blocks on the
network except `find_coordinator` and `close`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Final, Literal, NamedTuple

import psutil
from msgspec import Struct
from zeroconf import DNSQuestionType, IPVersion, ServiceBrowser, ServiceInfo, ServiceListener, Zeroconf
from zeroconf import Error as ZeroconfError

from wire import limits
from wire.addresses import DEFAULT_MQTT_PORT, checked_interfaces, host_addresses, nearest_first
from wire.advertisement import (
    COORDINATOR_NAME,
    Found,
    Role,
    agent_properties,
    coordinator_properties,
    instance_label,
    read_record,
    txt_record,
)
from wire.errors import PeerError, Refused, Unreachable
from wire.ids import DEFAULT_SITE, checked_name, site_option
from wire.version import PROTOCOL

__all__ = [
    "COORDINATOR_NAME",
    "Advertiser",
    "Browser",
    "Counters",
    "Found",
    "agent_properties",
    "coordinator_properties",
    "find_coordinator",
]

SERVICE_TYPE: Final = "_edgelam._tcp.local."
"""At most 15 characters after the underscore (RFC 6763, 7.2). No subtypes: zeroconf then hides the base type."""

FOLLOW_PERIOD_S: Final = 3.0
"""How often addresses of this host are read: a board that boots before its DHCP lease is found 3 s after it."""

RESOLVE_TIMEOUT_S: Final = 3.0
"""Three queries of a resolver; a service that doesn't answer them is a ghost of somebody's cache."""

SETTLE_S: Final = 0.6
"""How long to listen on after the first coordinator when no site was asked for: responders of a shared record wait
20 to 120 ms (RFC 6762, 6), so a second site has answered by then, even over a slow link."""

MAX_EVENTS: Final = 1024
"""Changes that may wait to be looked at; a flood beyond it is dropped and counted."""

MAX_RESOLVING: Final = 64
"""Instances asked for details at one time."""


class _Radio:
    """A Zeroconf that follows this host's addresses. Used by one thread."""

    def __init__(self, interfaces: tuple[str, ...] | None) -> None:
        self._interfaces = interfaces
        self.zeroconf: Zeroconf | None = None
        self.addresses: tuple[str, ...] = ()
        self.problem = "not started"

    def wanted(self) -> tuple[str, ...]:
        """The addresses that are to be used now."""
        if self._interfaces is None:
            return tuple(entry.address for entry in host_addresses())
        # Named addresses need not exist yet: they are used once they do. 127.0.0.0/8 always does.
        known = {entry.address for addresses in psutil.net_if_addrs().values() for entry in addresses}
        return tuple(text for text in self._interfaces if text in known or ipaddress.ip_address(text).is_loopback)

    def _without_address(self) -> str:
        named = " or ".join(self._interfaces or ())
        return f"this host has no address {named}" if named else "this host has no address yet"

    def follow(self, wanted: tuple[str, ...]) -> bool:
        """Open, move or close so as to use these addresses; True if something changed."""
        if wanted == self.addresses and (self.zeroconf is not None or not wanted):
            self.problem = self.problem if wanted else self._without_address()
            return False
        try:
            if not wanted:
                self.close()
            elif self.zeroconf is None:
                self.zeroconf = Zeroconf(interfaces=list(wanted))
            else:
                self.zeroconf.update_interfaces(list(wanted))
        except (OSError, RuntimeError, ZeroconfError) as error:
            self.close()
            self.problem = f"mDNS on {', '.join(wanted)}: {error}"
            return False
        self.addresses = wanted
        self.problem = ""
        return True

    def close(self) -> None:
        zeroconf, self.zeroconf, self.addresses = self.zeroconf, None, ()
        if zeroconf is None:
            return
        try:
            zeroconf.close()
        except (OSError, RuntimeError, ZeroconfError) as error:
            # The goodbye could not be sent, because the network went first. Whoever listens learns it from MQTT.
            self.problem = f"mDNS goodbye: {error}"


class Advertiser:
    """Keeps one instance advertised, whatever happens to this host's addresses, until `close`.

    With `interfaces` None all addresses of this host are used as they come and go. `problem` says why nobody can
    find us just now, '' if they can.
    """

    def __init__(
        self,
        site: str,
        name: str,
        role: Role,
        boot: str,
        port: int,
        properties: Mapping[str, str],
        interfaces: Sequence[str] | None = None,
    ) -> None:
        self._identity = (site, name, role, boot)
        self._port = port
        self._record = txt_record(site, name, role, boot, properties)
        self._radio = _Radio(checked_interfaces(interfaces))
        self._label = instance_label(site, name)
        self._registered: ServiceInfo | None = None
        self._published: tuple[tuple[str, ...], dict[str, str]] = ((), {})
        self._problem = "not started"
        self._closing = False
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mdns-advertise", daemon=True)

    @property
    def problem(self) -> str:
        return self._problem

    @property
    def instance(self) -> str:
        """The label in use: `site-name`, or `site-name-2` when another host has that name."""
        return self._label

    def start(self) -> None:
        """Begin to advertise; returns at once. It takes about two seconds until others see it (RFC 6762, 8.1)."""
        self._thread.start()

    def update(self, properties: Mapping[str, str]) -> None:
        """Replace the properties; raise UsageError as the constructor does."""
        self._record = txt_record(*self._identity, properties)
        self._changed.set()

    def close(self) -> None:
        """Say goodbye and stop. Idempotent; takes up to two seconds when registration has just begun."""
        self._closing = True
        self._changed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            self._changed.clear()
            try:
                self._advance()
            except (OSError, RuntimeError, ZeroconfError) as error:
                # Start afresh at the next turn: a half-registered instance can't be told from a lost one.
                self._problem = f"mDNS: {type(error).__name__}: {error}"
                self._registered = None
                self._radio.close()
            self._changed.wait(FOLLOW_PERIOD_S)
        self._radio.close()

    def _advance(self) -> None:
        """Bring what is advertised in line with addresses and properties of now."""
        addresses = self._radio.wanted()
        if self._registered is not None and self._radio.zeroconf is not None and addresses:
            # Before it moves: zeroconf announces on a new interface what was registered last, and whoever hears
            # an old address there (127.0.0.1, say) dials it.
            self._publish(self._radio.zeroconf, addresses)
        self._radio.follow(addresses)
        zeroconf = self._radio.zeroconf
        if zeroconf is None:
            self._registered = None
            self._problem = self._radio.problem
            return
        self._publish(zeroconf, addresses)

    def _publish(self, zeroconf: Zeroconf, addresses: tuple[str, ...]) -> None:
        """Register, or update what is registered, if it is not this already."""
        wanted = (addresses, self._record)
        if self._registered is None:
            info = self._info(f"{self._label}.{SERVICE_TYPE}", wanted)
            zeroconf.register_service(info, allow_name_change=True)
            self._label = info.name[: -len(SERVICE_TYPE) - 1]
        elif wanted != self._published:
            info = self._info(self._registered.name, wanted)
            zeroconf.update_service(info)
        else:
            return
        self._registered, self._published, self._problem = info, wanted, ""

    def _info(self, full_name: str, wanted: tuple[tuple[str, ...], dict[str, str]]) -> ServiceInfo:
        addresses, record = wanted
        return ServiceInfo(
            SERVICE_TYPE,
            full_name,
            port=self._port,
            properties=dict(record),
            # A host name of its own: two hosts that claim one label must not share addresses too.
            server=f"edgelam-{record['boot']}.local.",
            parsed_addresses=list(addresses),
        )


class Counters(Struct):
    """What a browser dropped, for people who look and for tests."""

    malformed: int = 0
    flooded: int = 0
    last_malformed: str = ""


class _Change(NamedTuple):
    kind: Literal["seen", "resolved", "gone"]
    name: str
    info: ServiceInfo | None = None


class Browser:
    """Calls `on_found` for everyone who appears or changes, and `on_gone` for those who say goodbye or expire.

    Both are called in the browser's own thread, one at a time, and must not raise. With `site` None all sites are
    shown. A host that is killed says no goodbye: see the module's docstring.
    """

    def __init__(
        self,
        on_found: Callable[[Found], None],
        on_gone: Callable[[Found], None],
        site: str | None = None,
        interfaces: Sequence[str] | None = None,
    ) -> None:
        self._on_found = on_found
        self._on_gone = on_gone
        self._site = None if site is None else checked_name(site, "site")
        self._radio = _Radio(checked_interfaces(interfaces))
        self._changes: queue.Queue[_Change | None] = queue.Queue(MAX_EVENTS)
        self._known: dict[str, Found] = {}
        self._resolving: set[str] = set()
        self._browsing: ServiceBrowser | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mdns-browse", daemon=True)
        self.counters = Counters()

    @property
    def problem(self) -> str:
        """Why nobody can be found just now; '' if there is no such reason."""
        return self._radio.problem

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses of this host on which it listens."""
        return self._radio.addresses

    def start(self) -> None:
        """Begin to browse; returns at once."""
        self._thread.start()

    def close(self) -> None:
        """Stop. No callback runs after it, unless it is called from one. Idempotent."""
        self._closing.set()
        self._note(None)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _note(self, change: _Change | None) -> None:
        try:
            self._changes.put_nowait(change)
        except queue.Full:
            self.counters.flooded += 1

    def _run(self) -> None:
        follow_at = time.monotonic()
        while not self._closing.is_set():
            if time.monotonic() >= follow_at:
                self._follow()
                follow_at = time.monotonic() + FOLLOW_PERIOD_S
            try:
                change = self._changes.get(timeout=max(0.0, follow_at - time.monotonic()))
            except queue.Empty:
                continue
            if change is not None and not self._closing.is_set():
                self._take(change)
        self._stop_browsing()
        self._radio.close()

    def _follow(self) -> None:
        before = self._radio.zeroconf
        changed = self._radio.follow(self._radio.wanted())
        zeroconf = self._radio.zeroconf
        if not changed and zeroconf is before:
            return
        # A new browser asks at once on all interfaces; one that is kept would ask on a new interface in an hour.
        self._stop_browsing()
        if zeroconf is not None:
            # Questions for multicast answers: a unicast answer reaches one of the programs of this host that share
            # the port, mostly not the one that asked, and the next question is a second later.
            self._browsing = ServiceBrowser(
                zeroconf, SERVICE_TYPE, listener=_Listener(self._note), question_type=DNSQuestionType.QM
            )

    def _stop_browsing(self) -> None:
        browsing, self._browsing = self._browsing, None
        self._resolving.clear()
        if browsing is not None:
            browsing.cancel()

    def _take(self, change: _Change) -> None:
        if change.kind == "gone":
            known = self._known.pop(change.name, None)
            if known is not None:
                self._on_gone(known)
        elif change.kind == "seen":
            self._resolve(change.name)
        elif change.info is not None:
            self._take_info(change.name, change.info)

    def _resolve(self, name: str) -> None:
        """Ask for SRV, TXT and addresses of an instance without waiting; the answer comes back as a change."""
        zeroconf = self._radio.zeroconf
        if zeroconf is None or zeroconf.loop is None or name in self._resolving:
            return
        info = ServiceInfo(SERVICE_TYPE, name)
        if info.load_from_cache(zeroconf):
            self._take_info(name, info)
            return
        if len(self._resolving) >= MAX_RESOLVING:
            self.counters.flooded += 1
            return
        self._resolving.add(name)

        def done(answer: Future[bool]) -> None:
            self._resolving.discard(name)
            complete = not answer.cancelled() and answer.exception() is None and answer.result()
            self._note(_Change("resolved", name, info if complete else None))

        request = info.async_request(zeroconf, RESOLVE_TIMEOUT_S * 1000, DNSQuestionType.QM)
        asyncio.run_coroutine_threadsafe(request, zeroconf.loop).add_done_callback(done)

    def _take_info(self, name: str, info: ServiceInfo) -> None:
        networks = [entry.network for entry in host_addresses()]
        addresses = info.parsed_scoped_addresses(IPVersion.V4Only) + info.parsed_scoped_addresses(IPVersion.V6Only)
        if not any(ipaddress.ip_address(own).is_loopback for own in self._radio.addresses):
            # Nobody else's loopback address is of use to us, and nobody shall make us dial our own.
            addresses = [text for text in addresses if not ipaddress.ip_address(text).is_loopback]
        try:
            found = read_record(info.properties, nearest_first(addresses, networks), info.port)
        except PeerError as error:
            self.counters.malformed += 1
            self.counters.last_malformed = error.message
            return
        if self._site is not None and found.site != self._site:
            return
        if self._known.get(name) == found:
            return
        if name not in self._known and len(self._known) >= limits.MAX_DEVICES:
            self.counters.flooded += 1
            return
        self._known[name] = found
        self._on_found(found)


class _Listener(ServiceListener):
    """Hands zeroconf's events over to the browser's thread."""

    def __init__(self, note: Callable[[_Change | None], None]) -> None:
        self._note = note

    def add_service(self, zc: Zeroconf, type_: str, name: str) -> None:  # noqa: ARG002
        self._note(_Change("seen", name))

    def update_service(self, zc: Zeroconf, type_: str, name: str) -> None:  # noqa: ARG002
        self._note(_Change("seen", name))

    def remove_service(self, zc: Zeroconf, type_: str, name: str) -> None:  # noqa: ARG002
        self._note(_Change("gone", name))


def find_coordinator(site: str | None, timeout_s: float, interfaces: Sequence[str] | None = None) -> Found:
    """Find the coordinator of `site`, or the only one there is; block up to `timeout_s`.

    Raises Unreachable when none answers, saying who was seen instead, and Refused when several sites answer and none
    was asked for, or when the coordinator speaks another protocol version.
    """
    seen: list[Found] = []
    news = threading.Condition()

    def on_found(found: Found) -> None:
        with news:
            seen.append(found)
            news.notify_all()

    def wanted() -> list[Found]:
        return [found for found in seen if found.role == "coordinator" and site in (None, found.site)]

    if site is not None:
        checked_name(site, "site")
    browser = Browser(on_found, lambda gone: None, None, interfaces)  # noqa: ARG005
    browser.start()
    try:
        with news:
            news.wait_for(wanted, timeout_s)
            if wanted() and site is None:
                news.wait_for(lambda: len({found.site for found in wanted()}) > 1, SETTLE_S)
            answers, others = wanted(), list(seen)
            where = f" on {', '.join(browser.addresses)}" if browser.addresses else f" ({browser.problem})"
    finally:
        browser.close()
    if not answers:
        raise _nobody(site, timeout_s, where, others)
    return chosen(answers)


def chosen(answers: Sequence[Found]) -> Found:
    """The coordinator to use out of one or more that answered; raise Refused if that is not clear."""
    latest = {found.site: found for found in answers}
    if len(latest) > 1:
        raise Refused(
            f"coordinators of {len(latest)} sites answered: {_listed(list(latest.values()))}",
            try_=f"say which one: --site {min(latest)}",
        )
    found = answers[-1]
    if found.protocol != PROTOCOL:
        raise Refused(
            f"the coordinator of site {found.site} at {found.addresses[0]} speaks protocol {found.protocol}, "
            f"this is {PROTOCOL}",
            try_="install the same edgelam version on coordinator and boards",
        )
    return found


def _nobody(site: str | None, timeout_s: float, where: str, others: Sequence[Found]) -> Unreachable:
    what = f"no coordinator of site {site!r}" if site else "no coordinator"
    instead = f"; seen instead: {_listed(others)}" if others else "; nobody else was seen"
    return Unreachable(
        f"{what} answered over mDNS within {timeout_s:g} s{where}{instead}",
        try_=f"edgelam up{site_option(site or DEFAULT_SITE)} on the coordinator in the same network, "
        f"or give its address: --broker mqtt://HOST:{DEFAULT_MQTT_PORT}",
    )


def _listed(found: Sequence[Found]) -> str:
    """Coordinators first: whoever looks for one has most likely named another site."""
    latest = {(one.role != "coordinator", one.site, one.name): one for one in found}
    texts = [
        f"{f'agent {name}' if agent else 'coordinator'} of site {site} at {one.addresses[0]}"
        for (agent, site, name), one in sorted(latest.items())
    ]
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")
