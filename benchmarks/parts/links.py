"""One stream over links of several kinds, through the site's broker and through the boards' own.

Bound: the stages' own seconds, measured in the same answers, and one crossing of the link for each hop, measured as
half of a round trip of 1.2 KB by plain TCP over a link of the same kind. Efficiency is bound / measured.

A link of the ring carries one message per token and rests in between; whoever wakes up after 14 ms takes longer than
after 1 ms (processors sleep deeper, caches are cold), plain TCP as well as ours. So plain TCP rests as long between its
round trips as the ring does. What it takes back to back is told, too.

Of the answers the quieter half counts: that in which the host of this machine took least of it (benchmarks.quiet).
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

from benchmarks.parts.sites import compute_s
from benchmarks.quiet import Watched, quieter_half, quietly, watched
from benchmarks.report import Figure, at_least

PAYLOAD_BYTES = 1_200
TRIPS = 60
TARGETS = {"none": 0.85, "ethernet": 0.9, "wifi": 0.9}
"""Least efficiency of one stream without speculation."""

Ask = Callable[[str], dict[str, Any]]
"""topology -> one answer."""


def one_way_s(link: str, rest_s: float = 0.0) -> float:
    """Half the median round trip of a small message over a link of this kind, plain TCP, with a rest before each."""
    with _echo() as address, over(link, address) as reached:
        host, _, port = reached.rpartition(":")
        with socket.create_connection((host, int(port)), 10.0) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return median(_trip_s(connection, rest_s) for _ in range(TRIPS)) / 2


def _trip_s(connection: socket.socket, rest_s: float) -> float:
    time.sleep(rest_s)
    began_s = time.perf_counter()
    connection.sendall(bytes(PAYLOAD_BYTES))
    left = PAYLOAD_BYTES
    while left:
        left -= len(connection.recv(left))
    return time.perf_counter() - began_s


@contextlib.contextmanager
def _echo() -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while data := connection.recv(65536):
                    connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


@contextlib.contextmanager
def over(link: str, address: str) -> Iterator[str]:
    """The address through a shaped link; the address itself for 'none'."""
    if link == "none":
        yield address
        return
    command = [sys.executable, "-m", "testbed.shaper", "--control", "--preset", link]
    with subprocess.Popen(
        [*command, "--forward", f"echo=127.0.0.1:0,{address}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as shaper:
        assert shaper.stdout is not None and shaper.stdin is not None
        yield json.loads(shaper.stdout.readline())["result"]["echo"]
        shaper.stdin.close()


def measure(ask: Ask, topologies: list[str], rounds: int, answers: int) -> dict[str, list[Watched[dict[str, Any]]]]:
    """Answers by topology, interleaved: a machine has good and bad minutes."""
    found: dict[str, list[Watched[dict[str, Any]]]] = {topology: [] for topology in topologies}
    for _ in range(rounds):
        for topology in topologies:
            ask(topology)  # deploys, and warms up
            found[topology] += [watched(partial(ask, topology)) for _ in range(answers)]
    return found


def figures(link: str, found: dict[str, list[Watched[dict[str, Any]]]], boards: int) -> list[Figure]:
    """Rows for one kind of link. The target holds for what a user gets, `auto`."""
    at_once_s = quietly(partial(one_way_s, link)).value
    rows = [Figure(f"{link}: one way by plain TCP, back to back", at_once_s * 1e3, "ms")]
    for topology, all_answers in found.items():
        kept = quieter_half(all_answers)
        answers = [one.value for one in kept]
        token_s = median(answer["token_s"] for answer in answers)
        rested_s = quietly(partial(one_way_s, link, token_s)).value
        name = f"{link}, {topology}"
        rows += [
            Figure(f"{name}: lost while these were given", median(one.lost_share for one in kept) * 1e2, "%"),
            Figure(f"{name}: one stream", 1 / token_s, "tokens/s"),
            Figure(f"{name}: one way by plain TCP, a message per token", rested_s * 1e3, "ms"),
            Figure(f"{name}: efficiency to TCP back to back", _efficiency(answers, boards * at_once_s), "ratio"),
            at_least(f"{name}: efficiency", _efficiency(answers, boards * rested_s), "ratio", TARGETS[link])
            if topology == "auto"
            else Figure(f"{name}: efficiency", _efficiency(answers, boards * rested_s), "ratio"),
            Figure(
                f"{name}: predicted / measured",
                median(answer["predicted_token_s"] / answer["token_s"] for answer in answers),
                "ratio",
            ),
        ]
    return rows


def _efficiency(answers: list[dict[str, Any]], ways_s: float) -> float:
    return median((compute_s(answer) + ways_s) / answer["token_s"] for answer in answers)
