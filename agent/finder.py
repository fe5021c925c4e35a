"""Finds the coordinator's broker: as told, by mDNS, or where it was last time. One thread, since mDNS blocks.

mDNS is asked until it answers; then the thread rests until `search` is called, as after a lost connection. Silence is
reported once, and every TELL_PERIOD_S while it lasts.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from msgspec import Struct

from agent.config import AgentConfig, HostPort
from agent.records import LastBroker
from wire.advertisement import Found
from wire.errors import EdgelamError

LOG = logging.getLogger("edgelam.finder")

SEARCH_S: Final = 5.0
"""One search: mDNS answers within 1.3 s on a bad link; five give room for a slow one."""

SILENT_S: Final = 3.0
"""After so long without an answer, the remembered address is tried while the search goes on."""

TELL_PERIOD_S: Final = 30.0

Find = Callable[[str | None, float, Sequence[str] | None], Found]


class Whereabouts(Struct, frozen=True, kw_only=True):
    """Where a broker may be reached; `urls` in the order to try them."""

    site: str
    urls: tuple[str, ...]
    how: str


class Finder:
    """`find` is wire.discovery.find_coordinator, or None where the broker is told by its address."""

    def __init__(self, config: AgentConfig, find: Find, last: LastBroker | None) -> None:
        self._config = config
        self._find = find
        self._last = last
        self._answers: queue.SimpleQueue[Whereabouts] = queue.SimpleQueue()
        self._asked = threading.Event()
        self._stopping = threading.Event()
        self._told_s = 0.0

    def start(self) -> None:
        """Begin to search."""
        self._asked.set()
        threading.Thread(target=self._run, name="finder", daemon=True).start()

    def search(self) -> None:
        """Search again, unless that is under way."""
        self._asked.set()

    def take(self) -> Whereabouts | None:
        """The newest answer since the last call."""
        newest = None
        while not self._answers.empty():
            newest = self._answers.get_nowait()
        return newest

    def close(self) -> None:
        self._stopping.set()
        self._asked.set()

    def _run(self) -> None:
        tried_memory = False
        while True:
            self._asked.wait()
            if self._stopping.is_set():
                return
            timeout_s = SEARCH_S if tried_memory else SILENT_S
            try:
                found = self._find(self._config.site or None, timeout_s, self._config.interfaces or None)
            except (EdgelamError, OSError) as error:
                self._say(error)
                fallback = None if tried_memory else self._from_memory()
                tried_memory = True
                if fallback is not None:
                    self._answers.put(fallback)
                self._stopping.wait(0.2)
                continue
            self._asked.clear()
            if self._stopping.is_set():
                return
            self._answers.put(whereabouts(found, self._config.via.mqtt))

    def _from_memory(self) -> Whereabouts | None:
        """What to try when mDNS is silent: the address of last time, or the tunnel that was given."""
        last, wanted, via = self._last, self._config.site, self._config.via.mqtt
        known = last is not None and wanted in ("", last.site)
        site = last.site if known and last is not None else wanted
        if via is not None and site:
            return Whereabouts(site=site, urls=(f"mqtt://{via}",), how="as told by --via")
        if known and last is not None:
            return Whereabouts(site=last.site, urls=(last.url,), how="where it was last time")
        return None

    def _say(self, error: Exception) -> None:
        now_s = time.monotonic()
        if self._told_s and now_s - self._told_s < TELL_PERIOD_S:
            return
        self._told_s = now_s
        LOG.warning("%s; searching on", error)
        hint = getattr(error, "try_", "")
        if hint:
            LOG.warning("  try: %s", hint)


def whereabouts(found: Found, via: HostPort | None) -> Whereabouts:
    """Where to dial: the tunnel if there is one, else each address that was found."""
    if via is not None:
        return Whereabouts(site=found.site, urls=(f"mqtt://{via}",), how="found by mDNS, dialled as told by --via")
    urls = tuple(f"mqtt://{HostPort(address, found.port)}" for address in found.broker_hosts)
    return Whereabouts(site=found.site, urls=urls, how="found by mDNS")
