"""Ports for servers that come back: not those that outgoing connections get."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from wire.broker import free_port
from wire.errors import Unreachable
from wire.ports import kept_ports


@pytest.mark.parametrize(
    ("outgoing", "low", "high"),
    [((32768, 60999), 22768, 32767), ((1024, 60999), 61000, 65535), ((1100, 65535), 0, 0), ((2000, 65535), 1024, 1999)],
)
def test_they_lie_beyond_those_of_connections(outgoing: tuple[int, int], low: int, high: int) -> None:
    *tried, last = kept_ports(outgoing)
    assert last == 0 and len(set(tried)) == len(tried)
    assert all(low <= port <= high for port in tried)
    assert bool(tried) == bool(high)


def test_a_port_that_the_broker_chose_is_none_that_a_connection_takes() -> None:
    low, high = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    port = free_port("127.0.0.1", 0)
    assert not low <= port <= high


def test_a_port_that_is_asked_for_is_had_or_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unreachable, match=f"can't have 127.0.0.1:{port}"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port
