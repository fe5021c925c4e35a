"""The control connection: where the broker is, and one session with it at a time.

The address is told (--broker), found by mDNS, or remembered. An address that does not answer is left for the next one
that was found, and mDNS is asked again: a coordinator may have moved. A connection that is up is given up in one case:
when nothing of our coordinator was heard on it and mDNS names another address. Another site's may be where ours was.
"""

from __future__ import annotations

import logging
import time
from typing import Final, Protocol

from agent.config import AgentConfig
from agent.finder import Finder, Whereabouts
from agent.outside import Outside
from agent.records import LastBroker, Records
from agent.session import Listener, Session
from wire import topics
from wire.ids import DEFAULT_SITE
from wire.messages import DeviceState, encode
from wire.transport import REFUSED_US, Link, Will

LOG = logging.getLogger("edgelam.control")

DIAL_PATIENCE_S: Final = 5.0
"""An address that does not answer for so long is left for the next one."""

HEAR_PATIENCE_S: Final = 5.0
"""A coordinator's kit is retained and comes at once; without a word of it for so long, mDNS is asked."""

DOUBT_PERIOD_S: Final = 30.0

TELL_PERIOD_S: Final = 30.0
FIRST_TELL_S: Final = 1.0
"""The first attempt gets a moment before people are told that it fails."""


class Owner(Listener, Protocol):
    """Whose connection it is."""

    def link_up(self) -> None: ...

    def link_down(self, reason: str) -> None: ...


class Control:
    """`boot` is this run's identity; `owner` hears what comes, in `poll`."""

    def __init__(self, config: AgentConfig, outside: Outside, boot: str, records: Records, owner: Owner) -> None:
        self.session: Session | None = None
        self.site = ""
        self.url = ""
        """The address in use, '' before the first."""
        self._config = config
        self._outside = outside
        self._boot = boot
        self._records = records
        self._owner = owner
        self._finder: Finder | None = None
        self._told: Whereabouts | None = None
        self._urls: tuple[str, ...] = ()
        self._silent_since_s = 0.0
        self._complained_s = -TELL_PERIOD_S
        self._heard = False
        """Our coordinator's kit came on this connection."""
        self._doubt_s = 0.0
        """When to ask mDNS, if nothing was heard until then."""

    def start(self) -> None:
        """Begin to look."""
        if self._config.broker:
            site = self._config.site or DEFAULT_SITE
            via = self._config.via.mqtt
            url, how = (f"mqtt://{via}", "as told by --via") if via else (self._config.broker, "as told by --broker")
            self._told = Whereabouts(site=site, urls=(url,), how=how)
            return
        self._finder = Finder(self._config, self._outside.find, self._records.load("broker", LastBroker))
        self._finder.start()

    @property
    def local_host(self) -> str:
        """Our own address on the way to the broker, '' without a connection."""
        return self.session.transport.local_host if self.session is not None else ""

    def poll(self, timeout_s: float) -> None:
        """Let the connection work, or wait."""
        if self.session is not None:
            self.session.transport.poll(timeout_s)
        else:
            time.sleep(min(timeout_s, 0.1))

    def wake(self) -> None:
        """End a `poll` early. Any thread."""
        session = self.session
        if session is not None:
            session.transport.wake()

    def news(self, now_s: float) -> bool:
        """Whether there is an address to `dial` now."""
        found, self._told = self._told, None
        if found is None and self._finder is not None:
            found = self._finder.take()
        if found is not None and self._accept(found):
            return True
        if self.session is None or self.session.transport.link is Link.UP:
            self._silent_since_s = now_s
            self._doubt(now_s)
            return False
        self._complain(now_s)
        if self._finder is None or now_s - self._silent_since_s < DIAL_PATIENCE_S:
            return False
        self._silent_since_s = now_s
        self._finder.search()
        self._urls = (*self._urls[1:], *self._urls[:1])
        return len(self._urls) > 1

    def dial(self) -> None:
        """Connect to the first address; the session before is closed."""
        if self.session is not None:
            self.session.transport.close()
        self.url = self._urls[0]
        self._silent_since_s = self._outside.clock()
        name = self._config.name
        gone = DeviceState(state="offline", boot=self._boot, since_unix=time.time(), reason="connection lost")
        will = Will(topics.STATE.on(self.site, name), encode(gone))
        transport = self._outside.connect(self.url, f"{name}-{self._boot}-control", will)
        self.session = Session(transport, self.site, name, self._owner)
        transport.on_up(self._on_up)
        transport.on_down(self._owner.link_down)
        transport.start()

    def heard(self) -> None:
        """Our coordinator speaks on this connection."""
        self._heard = True

    def remember(self) -> None:
        """This address works: try it next time while mDNS is silent."""
        self._records.save("broker", LastBroker(site=self.site, url=self.url))

    def close(self) -> None:
        """Disconnect in order and stop looking. Idempotent."""
        if self._finder is not None:
            self._finder.close()
        if self.session is not None:
            self.session.transport.close()
            self.session = None

    def _on_up(self) -> None:
        self._heard = False
        self._doubt_s = self._outside.clock() + HEAR_PATIENCE_S
        self._complained_s = -TELL_PERIOD_S
        self._owner.link_up()

    def _accept(self, found: Whereabouts) -> bool:
        if self.site and found.site != self.site:
            LOG.warning("a coordinator of site %s was found, this device belongs to %s", found.site, self.site)
            return False
        if self.session is not None and ((self.session.up and self._heard) or self.url in found.urls):
            return False
        LOG.info("site %s: broker %s (%s)", found.site, found.urls[0], found.how)
        self.site, self._urls = found.site, found.urls
        return True

    def _doubt(self, now_s: float) -> None:
        """Ask mDNS where the coordinator is, if nothing of it is heard where we are."""
        if self._finder is None or self.session is None or self._heard or now_s < self._doubt_s:
            return
        self._doubt_s = now_s + DOUBT_PERIOD_S
        self._finder.search()

    def _complain(self, now_s: float) -> None:
        """Say once, and then every 30 s, that the broker does not answer."""
        if now_s - self._silent_since_s < FIRST_TELL_S or now_s - self._complained_s < TELL_PERIOD_S:
            return
        self._complained_s = now_s
        reason = self.session.transport.last_error if self.session is not None else ""
        if REFUSED_US in reason:
            key, hint = _about_key(bool(self._config.site_key))
            LOG.warning("the broker %s does not let us in (%s); trying on", self.url, key)
            LOG.warning("  try: %s", hint)
            return
        LOG.warning("broker %s: %s; trying on", self.url, reason or "no answer yet")


def _about_key(given: bool) -> tuple[str, str]:
    """What is wrong with the site key, and what to do about it."""
    where = "the coordinator says at its start in which file it keeps it"
    if given:
        return "wrong site key", f"give --site-key-file a file with this site's key; {where}"
    return "no site key was given", f"--site-key-file FILE, with this site's key; {where}"
