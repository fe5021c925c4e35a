"""Ports for servers that come back after a restart.

Linux gives outgoing connections, and servers that ask for any port, one of `ip_local_port_range`. A server that had
one of those and was away for a moment may find it taken, and whoever knew it there waits in vain: so a port that is
to be kept is chosen beyond them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_LOCAL_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_WIDTH: Final = 10_000
_FEWEST: Final = 100
_ENOUGH: Final = 16
"""Tries: so many that are taken in a row are not chance."""

_draw: Final = random.SystemRandom()


def kept_ports(outgoing: tuple[int, int] | None = None) -> Iterator[int]:
    """Ports to try, in this order, for a server that is to have the same again: some that no outgoing connection gets,
    then 0, any. `outgoing` is this machine's range unless given."""
    low, high = outgoing or _outgoing()
    below, above = range(max(1024, low - _WIDTH), low), range(high + 1, 65536)
    beyond = below if len(below) >= _FEWEST else above
    if len(beyond) >= _FEWEST:
        yield from _draw.sample(beyond, _ENOUGH)
    yield 0


def _outgoing() -> tuple[int, int]:
    """The range that Linux has unless told otherwise, where it can't be read."""
    try:
        low, high = _LOCAL_RANGE.read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32768, 60999
